"""Model and optimizer as megatron's sharded state dicts, independent of TP, PP, VPP and DP, and how they are read back.

The sharded part holds tensors only: objects would be pickled, and nothing that umer1 needs is one.  What Transformer
Engine would pickle of FP8's delayed scaling goes with the optimizer's state as tensors (fp8_state.py).  Of weights in
FP8 a file has the optimizer's main weights, rounded to the type that they stand for: it is the file of a run whose
weights are in bf16.  What writes is shards.py.
"""

import gc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import umer1.megatron_import  # noqa: F401

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from umer1.checkpoints.fp8_state import scaling_to_load, take_scaling
from umer1.distributed.fp8_weights import cast_main_weights, is_fp8
from umer1.distributed.optimizer_checkpoint import mend, rounded_shapes
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.models.qwen2_vl.weights import unwrap

# Optimizer state as tensors of the parameters' shapes, so that it loads at any layout.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def read_sharded(
    directory: Path, models: list[torch.nn.Module], optimizer: Any, parallel: ParallelState
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Fill `models` and, unless None, `optimizer` from `directory`, which has been checked; collective.

    With an optimizer, weights in FP8 are cast from its main weights; without one, returned are the values that they
    were rounded from, for an optimizer to start from.
    """
    strategy = TorchDistLoadShardedStrategy()
    if parallel.dp_size > 1:
        strategy = FullyParallelLoadStrategyWrapper(strategy, parallel.groups.dp)
    try:
        state = sharded_state(models, optimizer, is_loading=True)
        if optimizer is not None:
            state["fp8_scaling"] = scaling_to_load(models, directory, parallel)
        with warnings.catch_warnings():
            # torch tells its callers, here megatron, not to use ShardedTensor any more
            warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
            loaded = dist_checkpointing.load(state, str(directory), strategy)
    except (CheckpointException, CheckpointingException, OSError) as error:
        raise UserError(f"{directory} cannot be loaded into this model: {cause_of(error)}") from error
    unrounded = {}
    for index, model in enumerate(map(unwrap, models)):
        missing, unexpected = model.load_state_dict(loaded[f"model{index}"], strict=False)
        in_fp8 = {name: parameter for name, parameter in model.named_parameters() if is_fp8(parameter)}
        unrounded |= {in_fp8[name]: value for name, value in loaded[f"model{index}"].items() if name in in_fp8}
        # Extra states (see _tensors_only), and FP8 weights where main weights are read, are all that is left out.
        left_out = in_fp8 if optimizer is not None else ()
        if unexpected or any(not name.endswith("_extra_state") and name not in left_out for name in missing):
            raise AssertionError(f"missing {missing}, unexpected {unexpected}")
    if optimizer is not None:
        take_scaling(models, loaded["fp8_scaling"], parallel)
        settings = [_own_settings(group) for group in optimizer.param_groups]
        optimizer.load_state_dict(loaded["optimizer"])
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
        cast_main_weights(optimizer, models)
    gc.collect()
    return unrounded


def sharded_state(models: list[torch.nn.Module], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """megatron's state dict of `models` and, unless None, `optimizer`.

    For a save, a distributed optimizer's tensors are shapes (umer1.distributed.optimizer_checkpoint.gather_states), and
    so are those of weights in FP8; for a load with an optimizer, these are not there.
    """
    state = {f"model{i}": unwrap(model).sharded_state_dict(metadata=dict(METADATA)) for i, model in enumerate(models)}
    state = of_models = _tensors_only(state)
    if optimizer is not None:
        mend(optimizer)
        of_optimizer = optimizer.sharded_state_dict(of_models, is_loading=is_loading, metadata=dict(METADATA))
        state = of_models | {"optimizer": of_optimizer}
    if not is_loading:
        shapes = rounded_shapes(optimizer)
        return _without_fp8(state, lambda weight: shapes[weight])
    return _without_fp8(state, _empty if optimizer is None else lambda weight: None)


def _tensors_only(value: Any) -> Any:
    """Without ShardedObjects: the extra states of layers, pickled and empty but for FP8 with delayed scaling."""
    if isinstance(value, dict):
        return {key: _tensors_only(item) for key, item in value.items() if not isinstance(item, ShardedObject)}
    return value


def _without_fp8(value: Any, plain: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """With plain(weight) in the place of each weight in FP8, or without those for which that is None."""
    if isinstance(value, dict):
        kept = {key: _without_fp8(item, plain) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None or value[key] is None}
    if isinstance(value, ShardedBase) and is_fp8(value.data):
        instead = plain(value.data)
        return None if instead is None else replace(value, data=instead)
    return value


def _empty(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _own_settings(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group's settings from this run's configuration, which win over the checkpoint's."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def cause_of(error: BaseException) -> str:
    """One line; torch's CheckpointException lists each rank's error."""
    failures = getattr(error, "failures", None)
    if failures:
        return "; ".join(sorted({f"{_single(failure[0])}" for failure in failures.values()}))
    return str(error)


def _single(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
