"""Bytes of weights, gradients and optimizer states, as megatron-core 0.16.1 lays them out.

megatron.core.distributed.param_and_grad_buffer: trained parameters stand in reverse order in one buffer; with the
distributed optimizer each starts at a multiple of 64 elements, each bucket ends at a multiple of lcm(DP, 128), and a
data-parallel rank updates its equal share of each bucket.  Weights in FP8 have a buffer of their own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from umer1.distributed.parallel import ParallelConfig
from umer1.plan.parameters import Parameter

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Buffer:
    """A gradient buffer of one model chunk, and that of its weights."""

    numel: int
    """Elements, padding included."""
    shard: int
    """Elements of parameters that data-parallel rank `dp_rank` updates."""


def buffer_of(
    parameters: list[Parameter], *, dp: int, dp_rank: int, bucket_size: int | None, distributed: bool
) -> Buffer:
    """bucket_size: elements from which on a bucket is full; None: one bucket.  distributed: the optimizer is."""
    trained = [parameter for parameter in reversed(parameters) if parameter.trained]
    if not distributed:
        total = sum(parameter.numel for parameter in trained)
        return Buffer(total, total)
    divisor = math.lcm(dp, 128)
    buckets: list[tuple[int, int, list[tuple[int, int]]]] = []  # start, end, (start, end) of each parameter
    start = position = 0
    inside: list[tuple[int, int]] = []

    def close(end: int) -> int:
        nonlocal start, inside
        end = -(-end // divisor) * divisor
        buckets.append((start, end, inside))
        start, inside = end, []
        return end

    for parameter in trained:
        position = -(-position // _ALIGNMENT) * _ALIGNMENT
        if parameter.shared and inside:
            position = close(position)
        inside.append((position, position + parameter.numel))
        position += parameter.numel
        if parameter.shared or (bucket_size is not None and position - start >= bucket_size):
            position = close(position)
    if inside:
        position = close(position)
    shard = 0
    for low, high, places in buckets:
        size = (high - low) // dp
        mine = low + dp_rank * size, low + (dp_rank + 1) * size
        shard += sum(max(min(end, mine[1]) - max(begin, mine[0]), 0) for begin, end in places)
    return Buffer(position, shard)


@dataclass(frozen=True, slots=True)
class StateBytes:
    """What stays from step to step on one rank."""

    parameters: int
    """Weights in the model's dtype, those in FP8 a byte each, the buffers' padding included."""
    gradients: int
    """fp32 gradient buffers."""
    main_weights: int
    """fp32 copies of bf16 weights that the optimizer moves."""
    moments: int
    """AdamW's two fp32 moments."""
    largest_buffer: int
    """Weights of the largest buffer: what one collective gathers."""
    trained: int
    """Trained parameters, a number of elements without padding."""
    updated: int
    """Elements that this rank's optimizer moves."""
    host: int = 0
    """In host memory, under optimizer_cpu_offload; not part of the sums."""

    @property
    def optimizer(self) -> int:
        return self.main_weights + self.moments

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def state_bytes(
    chunks: list[list[Parameter]],
    parallel: ParallelConfig,
    *,
    stage: int,
    dp: int,
    itemsize: int,
    dp_rank: int = 0,
    in_fp8: Callable[[Parameter], bool] = lambda parameter: False,
) -> StateBytes:
    """chunks: of the rank's pipeline stage.  itemsize: 2 for bf16, which has fp32 main weights, or 4.  in_fp8: whether
    a weight is there in FP8 alone."""
    distributed = parallel.use_distributed_optimizer
    parameters = gradients = updated = largest = 0
    for number, chunk in enumerate(chunks):
        bucketed = parallel.overlap_grad_reduce and stage == 0 and number == 0
        bucket_size = max(40_000_000, 1_000_000 * dp) if bucketed else None
        parameters += sum(parameter.numel for parameter in chunk if not parameter.trained) * itemsize
        for size, wanted in ((1, True), (itemsize, False)):
            part = [parameter for parameter in chunk if in_fp8(parameter) == wanted]
            buffer = buffer_of(part, dp=dp, dp_rank=dp_rank, bucket_size=bucket_size, distributed=distributed)
            parameters += buffer.numel * size
            gradients += buffer.numel * 4
            updated += buffer.shard
            largest = max(largest, buffer.numel * size)
    main = 4 * updated if itemsize < 4 else 0
    trained = sum(parameter.numel for chunk in chunks for parameter in chunk if parameter.trained)
    return StateBytes(parameters, gradients, main, 8 * updated, largest, trained, updated)


def offloaded(states: StateBytes, *, device: str) -> StateBytes:
    """With main weights and moments in the host's memory, and a copy of the gradients beside them."""
    gradients = 4 * states.updated
    if device == "cpu":  # the host's memory is the device's
        return replace(states, main_weights=states.main_weights + gradients)
    return replace(states, main_weights=0, moments=0, host=states.optimizer + gradients)
