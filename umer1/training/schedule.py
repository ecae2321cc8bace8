"""Megatron's pipeline schedule over a list of micro-batches."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import umer1.megatron_import  # noqa: F401

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from umer1.models.fp8_amax import amax_kept


def run_schedule(
    models: list[torch.nn.Module],
    batches: list[Any],
    step_func: Callable,
    forward_only: bool = False,
) -> list:
    """none, 1F1B or interleaved; what the last stage's loss function returned for each micro-batch ([] elsewhere).

    batches: anything with `input_ids`.  forward_only: no graph and no backward; step_func's second result is called
    with `non_loss_data=True`, and what it returns is collected; FP8's histories of largest values stay as they were.
    """
    iterators = [iter(batches) for _ in models]
    kept = amax_kept(models) if forward_only else nullcontext()
    with kept, torch.set_grad_enabled(not forward_only):  # megatron leaves gradients to its caller
        return get_forward_backward_func()(
            forward_step_func=step_func,
            data_iterator=iterators if len(models) > 1 else iterators[0],
            model=models if len(models) > 1 else models[0],
            num_microbatches=len(batches),
            seq_length=len(batches[0].input_ids),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
