"""The order of forwards and backwards on one pipeline rank, as megatron's three schedules have it."""

from collections.abc import Iterator
from typing import Literal, NamedTuple


class Work(NamedTuple):
    """One pass of one micro-batch through one virtual stage."""

    kind: Literal["forward", "backward"]
    batch: int
    chunk: int


def one_f_one_b(batches: int, stage: int, stages: int, virtual: int) -> Iterator[Work]:
    """stages 1: forward, backward, forward, ...; else 1F1B, interleaved where there are virtual stages.

    Interleaved: micro-batches go through the virtual stages in groups of `stages`, so batches is a multiple of it.
    """
    total = batches * virtual
    if stages == 1:
        warm_up = 0
    elif virtual == 1:
        warm_up = stages - stage - 1
    else:
        warm_up = 2 * (stages - stage - 1) + (virtual - 1) * stages
    warm_up = min(warm_up, total)

    def work(kind: Literal["forward", "backward"], number: int) -> Work:
        group, place = divmod(number, stages * virtual)
        chunk, within = divmod(place, stages)
        return Work(kind, group * stages + within, chunk if kind == "forward" else virtual - 1 - chunk)

    for number in range(total):
        yield work("forward", number)
        if number >= warm_up:
            yield work("backward", number - warm_up)
    for number in range(total - warm_up, total):
        yield work("backward", number)
