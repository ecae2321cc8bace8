"""Weights in FP8 (--fp8-param-gather) as what they are: casts of the distributed optimizer's fp32 main weights.

The main weights are the truth, and every way out of a run takes them: a checkpoint, an export.  Every way in ends in
them, and the FP8 weights are then cast from them as after an optimizer step.  What makes that cast, and what tells an
FP8 weight from others, is megatron's and Transformer Engine's own.
"""

from collections.abc import Mapping
from typing import Any

import umer1.megatron_import  # noqa: F401

import torch
from megatron.core import fp8_utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def is_fp8(tensor: Any) -> bool:
    """Whether a weight is kept in FP8: it says that it is bf16, and its elements are not."""
    return fp8_utils.is_float8tensor(tensor)


def distributed_parts(optimizer: Any) -> list[DistributedOptimizer]:
    """The distributed optimizers in one from get_megatron_optimizer that update anything on this rank."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer]


@torch.no_grad()
def set_main_weights(optimizer: Any, values: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
    """Let the main weights of FP8 weights start from `values` [as the weight], which are of a finer type than FP8."""
    for part in distributed_parts(optimizer):
        for weight in part.model_param_group_index_map:
            if weight in values:
                place = part._get_model_param_range_map(weight)["param"]
                main = part._get_main_param_and_optimizer_states(weight)["param"]
                main.copy_(values[weight].view(-1)[place.start : place.end])


@torch.no_grad()
def cast_main_weights(optimizer: Any, models: list[torch.nn.Module]) -> None:
    """The weights of `models` (megatron's DDP) from the main weights, as an optimizer step does it; collective over DP.

    Nothing for a run without FP8 weights: there a weight is as good as what was read.
    """
    if not any(is_fp8(parameter) for model in models for parameter in model.parameters()):
        return
    for part in distributed_parts(optimizer):
        part._copy_main_params_to_model_params()
    for model in models:
        model.start_param_sync(force_sync=True)
        finish_gather(model)


def finish_gather(model: torch.nn.Module) -> None:
    """After a gather of weights that megatron was told to wait for: what it leaves out then for FP8 weights.

    Their transposed copies, which backward multiplies with, are made anew after a gather; megatron 0.16.1 does it in
    the forward that a gather is overlapped with, and not when such a gather is waited for before (`force_sync`).
    """
    weights = [parameter for parameter in model.parameters() if is_fp8(parameter)]
    if weights:
        fp8_utils.post_all_gather_processing(weights)
