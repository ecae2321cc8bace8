"""Delayed scaling's memory: what Transformer Engine's modules know of largest values, kept over a pass without a graph
and taken out and put back for checkpoints.

Under delayed scaling a module's `fp8_meta["scaling_fwd"]` and `["scaling_bwd"]` hold `amax_history` [length, tensors]
and `scale` [tensors].  A forward pass writes its largest values into row 0 of the history; leaving the autocast region
with gradients switched on turns histories into scales and moves them on by a row.  A pass without gradients does only
the first half, so that its values would count in the next scale although no gradient came of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import umer1.megatron_import  # noqa: F401

import torch
from megatron.core import fp8_utils

_DIRECTIONS = ("scaling_fwd", "scaling_bwd")


@contextmanager
def amax_kept(models: list[torch.nn.Module]) -> Iterator[None]:
    """Leave histories and scales as they were, and nothing behind for a recomputation that will not come.

    Tensors are written in place: Transformer Engine's table for its reductions holds the same ones.  A module's first
    pass makes them; after it they are as new, largest values 0 and scales 1.  For every other recipe, and without
    Transformer Engine, there is nothing to keep.
    """
    modules = [module for model in models for module in model.modules() if hasattr(module, "fp8_meta")]
    before = [{key: [t.clone() for t in tensors] for key, tensors in _delayed(module)} for module in modules]
    training = [module.training for module in modules]
    # Not `eval()`, whose recursion is not wanted.  A module in training puts a copy of its history aside for each layer
    # that is to be recomputed; without a backward pass nobody takes it away, and the next one would get it.
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, was_training in zip(modules, training, strict=True):
            module.training = was_training
    with torch.no_grad():
        for module, kept in zip(modules, before, strict=True):
            for key, (history, scale) in _delayed(module):
                if key in kept:
                    history.copy_(kept[key][0])
                    scale.copy_(kept[key][1])
                else:
                    history.zero_()
                    scale.fill_(1.0)


def _delayed(module: Any) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """(direction, (history, scale)) of a module with delayed scaling; other recipes' states have no history."""
    for key in _DIRECTIONS:
        state = module.fp8_meta.get(key)
        if hasattr(state, "amax_history"):
            yield key, (state.amax_history, state.scale)


def delayed_linears(layer: torch.nn.Module) -> dict[str, Any]:
    """Name -> module of `layer`'s FP8 linears, their histories and scales made where no pass has yet.

    Attention's module has an `fp8_meta` too; its scales stay 1, for attention does not multiply in FP8.
    """
    found = {name: m for name, m in layer.named_modules() if hasattr(m, "fp8_meta") and hasattr(m, "weight")}
    for module in found.values():
        if not all(key in module.fp8_meta for key in _DIRECTIONS):
            # What Transformer Engine's own `set_extra_state` does before it copies; the first pass keeps what it finds.
            recipe = fp8_utils.get_fp8_recipe(module.config)
            module.fp8_meta |= {"num_gemms": 1, "recipe": recipe}
            module.init_fp8_meta_tensors(recipe)
    return found


def scaling_state(module: Any) -> torch.Tensor:
    """fp32 [length + 1, tensors]: histories with the newest row last, then the scales; forward's tensors first."""
    return torch.cat([torch.cat([history, scale[None]]) for _, (history, scale) in _delayed(module)], dim=1)


@torch.no_grad()
def set_scaling_state(module: Any, state: torch.Tensor) -> None:
    """Put a `scaling_state` back, in place; of a longer history the newest rows, to a shorter one zeros before them."""
    sizes = [scale.numel() for _, (_, scale) in _delayed(module)]
    for (_, (history, scale)), part in zip(_delayed(module), state.split(sizes, dim=1), strict=True):
        # Row 0 is the one that the next pass writes: it is zero between two steps.  (A weight in FP8 has the largest
        # value of its last cast there; so it has after a load, for it is cast anew.)
        rows = min(len(history), len(part) - 1) - 1
        history.zero_()
        history[len(history) - rows :].copy_(part[len(part) - 1 - rows : -1])
        scale.copy_(part[-1])
