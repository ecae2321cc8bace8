"""What the copies of the model (data parallelism) and the ranks of one copy tell each other as Python objects."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError

T = TypeVar("T")


def any_rank(flag: bool, state: ParallelState) -> bool:
    """Whether any rank of the world raised its flag; collective."""
    value = torch.tensor([float(flag)], device=state.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def share_with_all(value: Any, state: ParallelState) -> list[Any]:
    """Every rank's small `value`, by rank, on every rank; collective."""
    parts: list[Any] = [None] * state.world_size
    dist.all_gather_object(parts, value)
    return parts


def on_first(function: Callable[[], T], state: ParallelState) -> T:
    """What `function` gives on rank 0, on every rank; its UserError or OSError is a UserError on all; collective."""
    value, failure = None, None
    if state.rank == 0:
        try:
            value = function()
        except (UserError, OSError) as error:
            failure = str(error)
    outcome = [value, failure]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def share_in_replica(value: Any, state: ParallelState) -> list[Any]:
    """The small `value` of every rank that holds a part of this copy of the model, on each of them; collective."""
    size = state.tp_size * state.pp_size
    if size == 1:
        return [value]
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, value, group=state.groups.mp)
    return parts


def gather_to_first(value: Any, state: ParallelState) -> list[Any]:
    """Each copy's `value`, by data-parallel rank, on rank 0 and [] elsewhere; collective, also for large values.

    It goes over CPU memory (gloo): embeddings of a large corpus would not fit beside the model on a GPU.
    """
    if state.world_size == 1:
        return [value]
    leads = state.tp_rank == 0 and state.pp_rank == 0
    parts: list[Any] | None = [None] * state.world_size if state.rank == 0 else None
    dist.gather_object((state.dp_rank, value) if leads else None, parts, dst=0, group=_cpu_group(dist.group.WORLD))
    by_replica = dict(part for part in parts or [] if part is not None)
    return [by_replica[number] for number in sorted(by_replica)]


@cache
def _cpu_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group of all ranks, made once for a default group; collective."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")
