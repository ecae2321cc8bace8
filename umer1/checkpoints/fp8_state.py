"""Delayed scaling's histories and scales in a checkpoint, as plain tensors and not as the layers' pickled extra states.

One fp32 tensor for each FP8 linear layer, [data-parallel ranks, history + 1, tensors], under the layer's number in the
whole decoder: tensor-parallel ranks have the same values, which they reduced together, and pipeline stages other
layers.  Data-parallel ranks have values of their own.
"""

from pathlib import Path
from typing import Any

import umer1.megatron_import  # noqa: F401

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from umer1.distributed.parallel import ParallelState
from umer1.models.fp8_amax import delayed_linears, scaling_state, set_scaling_state
from umer1.models.qwen2_vl.weights import unwrap


def scaling_to_save(models: list[torch.nn.Module], parallel: ParallelState) -> dict[str, ShardedTensor]:
    """This rank's part; nothing unless the decoder scales by histories."""
    own = (0, parallel.dp_rank, parallel.dp_size)
    return {
        key: ShardedTensor.from_rank_offsets(key, scaling_state(module)[None], own, replica_id=parallel.tp_rank)
        for key, module in _modules(models).items()
    }


def scaling_to_load(
    models: list[torch.nn.Module], directory: Path, parallel: ParallelState
) -> dict[str, ShardedTensor]:
    """Places for what `directory` holds of all data-parallel ranks; nothing of a run that scaled otherwise."""
    modules = _modules(models)
    stored = dist_checkpointing.load_tensors_metadata(str(directory)) if modules else {}
    replica = (0, parallel.tp_rank, parallel.dp_rank)
    return {
        key: ShardedTensor.from_rank_offsets(
            key, torch.empty(stored[key].global_shape, device=parallel.device), replica_id=replica
        )
        for key in modules
        if key in stored
    }


def take_scaling(models: list[torch.nn.Module], loaded: dict[str, torch.Tensor], parallel: ParallelState) -> None:
    """Give each module its own rank's values; with another number of ranks the most careful of them all.

    Those are the largest values that any rank has seen, and the smallest scale: nothing that was in range overflows.
    """
    modules = _modules(models)
    for key, ranks in loaded.items():
        if len(ranks) == parallel.dp_size:
            state = ranks[parallel.dp_rank]
        else:
            state = torch.cat([ranks[:, :-1].amax(0), ranks[:, -1:].amin(0)])
        set_scaling_state(modules[key], state)


def _modules(models: list[torch.nn.Module]) -> dict[str, Any]:
    """Key -> FP8 linear layer of this rank's chunks."""
    found = {}
    for decoder in (unwrap(model).decoder for model in models):
        if decoder.config.fp8 is None or decoder.config.fp8_recipe != "delayed":
            continue
        for layer in decoder.layers:
            for name, module in delayed_linears(layer).items():
                found[f"fp8_scaling.layers.{layer.layer_number - 1}.{name}"] = module
    return found
