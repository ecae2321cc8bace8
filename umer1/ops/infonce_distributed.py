"""InfoNCE of a process group: each rank takes its own rows against the columns of all ranks, 1/W of the work.

Gathered: chunks of every rank's columns arrive while the chunk before is computed on; column maxima and sums are
reduced over the ranks; the columns' gradients go back by reduce-scatter, chunk by chunk, while the next one is made.
Ring: each rank's columns travel once around for the first sweep and once for the second, their column sums and then
their gradients with them; a rank holds a fixed number of such blocks, however many ranks there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from umer1.ops.infonce_share import (
    KEPT_BYTES,
    Problem,
    Rows,
    Share,
    Terms,
    add_gradients,
    column_lse,
    log_scale_gradient,
    row_terms,
    statistics,
)
from umer1.ops.infonce_torch import Kept, merge

GATHER_CHUNK = 64 * 2**20
"""Bytes of a gathered chunk (all ranks together): some 20,000 columns of 1,536 bf16 values, long enough a product to
hide the next chunk's arrival, and several chunks in a large batch."""
GATHER_LIMIT = 2**30
"""Bytes of all ranks' columns up to which they are gathered: 262,144 pairs of 1,536 bf16 values still are.  Above, they
would crowd the activations, and a ring's messages are long enough to be hidden."""


def all_rank_counts(
    own: tuple[int, int, int], group: dist.ProcessGroup | None, device: torch.device
) -> list[list[int]]:
    """(queries, keys, negatives) of every rank, in rank order."""
    if group is None or dist.get_world_size(group) == 1:
        return [list(own)]
    mine = torch.tensor(own, device=device)
    gathered = mine.new_empty(dist.get_world_size(group) * 3)
    dist.all_gather_into_tensor(gathered, mine, group=group)
    return gathered.view(-1, 3).tolist()


def uses_ring(problem: Problem, counts: list[list[int]], columns: str) -> bool:
    """Whether the columns go round rather than are gathered; the same on every rank."""
    if columns != "auto":
        return columns == "ring"
    width = problem.key.shape[1] * problem.key.element_size()
    return sum(keys + negatives for _, keys, negatives in counts) * width > GATHER_LIMIT


def _all_gather_ragged(values: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The 1-dim values of every rank."""
    if not max(sizes):
        return [values for _ in sizes]
    padded = values.new_zeros(max(sizes))
    padded[: len(values)] = values
    gathered = values.new_empty(len(sizes) * max(sizes))
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return [row[:size] for row, size in zip(gathered.view(len(sizes), max(sizes)), sizes, strict=True)]


@dataclass(slots=True)
class _Chunk:
    """Rows [start, start + width) of every rank's keys (or negatives), as far as a rank has them."""

    source: torch.Tensor  # this rank's keys or negatives
    start: int
    width: int
    valid: list[int]  # rows by rank
    symmetric: bool
    columns: torch.Tensor | None = None  # [sum(valid), D], in rank order
    labels: torch.Tensor | None = None  # of this rank's rows, in this chunk's columns
    ids: torch.Tensor | None = None
    kept: Kept | None = None

    def gather(self, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
        own = self.source[self.start : self.start + self.width]
        if len(own) < self.width or not own.is_contiguous():
            padded = own.new_zeros(self.width, own.shape[1])
            padded[: len(own)] = own
            own = padded
        gathered = own.new_empty(len(self.valid) * self.width, own.shape[1])
        return gathered, dist.all_gather_into_tensor(gathered, own, group=group, async_op=True)

    def take(self, gathered: torch.Tensor) -> None:
        """Columns without the rows that only fill up."""
        if min(self.valid) < self.width:
            parts = gathered.view(len(self.valid), self.width, -1)
            gathered = torch.cat([part[:count] for part, count in zip(parts, self.valid, strict=True)])
        self.columns = gathered

    def scatter(self, gradient: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
        """Sum of the ranks' gradients of these columns, for each rank its own rows."""
        if min(self.valid) < self.width:
            padded = gradient.new_zeros(len(self.valid), self.width, gradient.shape[1])
            for part, rows in zip(padded, gradient.split(self.valid), strict=True):
                part[: len(rows)] = rows
            gradient = padded.flatten(0, 1)
        own = gradient.new_empty(self.width, gradient.shape[1])
        return own, dist.reduce_scatter_tensor(own, gradient, group=group, async_op=True)


def _chunks(source: torch.Tensor, sizes: list[int], symmetric: bool) -> list[_Chunk]:
    row_bytes = len(sizes) * source.shape[1] * source.element_size()
    width = max(1, GATHER_CHUNK // row_bytes)
    chunks = []
    for start in range(0, max(sizes), width):
        valid = [min(max(size - start, 0), width) for size in sizes]
        chunks.append(_Chunk(source, start, max(valid), valid, symmetric))
    return chunks


def _place_labels(chunks: list[_Chunk], labels: torch.Tensor, rank: int) -> None:
    """Positions of this rank's positives in each chunk, -1 where they are in another."""
    for chunk in chunks:
        position = labels - chunk.start
        inside = (position >= 0) & (position < chunk.valid[rank])
        chunk.labels = torch.where(inside, position + sum(chunk.valid[:rank]), -1)


def _in_chunk(by_rank: Sequence[torch.Tensor], chunk: _Chunk) -> torch.Tensor:
    """Values of the chunk's columns, from those of all."""
    return torch.cat([values[chunk.start : chunk.start + chunk.width] for values in by_rank])


def _own_part(chunk: _Chunk, values: torch.Tensor, rank: int) -> torch.Tensor:
    return values.split(chunk.valid)[rank]


def gathered_share(problem: Problem, group: dist.ProcessGroup, counts: list[list[int]]) -> Share:
    """The share of this rank, every rank's columns in its memory."""
    rank = dist.get_rank(group)
    _, key_sizes, negative_sizes = map(list, zip(*counts, strict=True))
    key_chunks = _chunks(problem.key, key_sizes, symmetric=True)
    chunks = key_chunks + _chunks(problem.negatives, negative_sizes, symmetric=False)
    labels = problem.own_labels()
    _place_labels(key_chunks, labels, rank)
    if problem.query_ids is not None:
        key_ids = _all_gather_ragged(problem.key_ids, key_sizes, group)
        negative_ids = _all_gather_ragged(problem.negative_ids, negative_sizes, group)
        for chunk in chunks:
            chunk.ids = _in_chunk(key_ids if chunk.symmetric else negative_ids, chunk)
    rows, maxima, sums = _sweep_gathered(problem, chunks, group)
    maxima, sums = _reduce_columns(maxima, sums, group)
    sizes = [sum(chunk.valid) for chunk in key_chunks]
    by_chunk = list(zip(key_chunks, maxima.split(sizes), sums.split(sizes), strict=True))
    own_max = torch.cat([_own_part(chunk, values, rank) for chunk, values, _ in by_chunk])
    own_sum = torch.cat([_own_part(chunk, values, rank) for chunk, _, values in by_chunk])
    # Whether every rank left its labels out is not known here, so every rank says how often each key is a positive.
    own_counts = torch.bincount(labels, minlength=len(problem.key)).to(problem.dtype)
    terms = row_terms(rows.partials, own_max[labels], own_sum[labels], own_counts[labels])
    share = Share(terms.loss, statistics(problem, rows.partials))
    if problem.with_gradients:
        all_counts = _all_gather_ragged(own_counts, key_sizes, group)
        lses = [column_lse(largest, total, _in_chunk(all_counts, chunk)) for chunk, largest, total in by_chunk]
        _gradients_gathered(problem, share, terms, chunks, lses, group)
    return share


def _sweep_gathered(
    problem: Problem, chunks: list[_Chunk], group: dist.ProcessGroup
) -> tuple[Rows, list[torch.Tensor], list[torch.Tensor]]:
    """This rank's rows, and the maxima and sums of the symmetric chunks' columns over them; fills `chunks`."""
    rows, maxima, sums, budget = Rows(), [], [], KEPT_BYTES
    arriving = chunks[0].gather(group)
    for position, chunk in enumerate(chunks):
        gathered, work = arriving
        work.wait()
        if position + 1 < len(chunks):
            arriving = chunks[position + 1].gather(group)
        chunk.take(gathered)
        chunk.kept = Kept(budget) if problem.with_gradients else None
        block = problem.sweep(chunk.columns, chunk.labels, chunk.ids, symmetric=chunk.symmetric, kept=chunk.kept)
        budget = chunk.kept.budget if chunk.kept else 0
        rows.add(block)
        if chunk.symmetric:
            maxima.append(block.column_max)
            sums.append(block.column_sum)
    return rows, maxima, sums


def _reduce_columns(
    maxima: list[torch.Tensor], sums: list[torch.Tensor], group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """(maximum, sum of exp(logit - maximum)) of every column over the rows of all ranks."""
    own, total = torch.cat(maxima), torch.cat(sums)
    largest = own.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    # Columns without entries here have maximum -inf and sum 0: merged with the others' maximum they stay 0.
    total = merge(own, total, largest, torch.zeros_like(total))[1]
    dist.all_reduce(total, group=group)
    return largest, total


def _gradients_gathered(
    problem: Problem,
    share: Share,
    terms: Terms,
    chunks: list[_Chunk],
    lses: list[torch.Tensor],
    group: dist.ProcessGroup,
) -> None:
    rank = dist.get_rank(group)
    share.query = problem.query.new_zeros(problem.query.shape, dtype=problem.dtype)
    own = {True: [problem.key.new_zeros(0, problem.key.shape[1], dtype=problem.dtype)]}
    own[False] = list(own[True])
    leaving = None
    for position, chunk in enumerate(chunks):
        gradient = chunk.columns.new_zeros(chunk.columns.shape, dtype=problem.dtype)
        lse = lses[position] if chunk.symmetric else None
        into = (share.query, gradient)
        add_gradients(problem, terms, chunk.columns, chunk.labels, chunk.ids, lse, *into, chunk.kept)
        if leaving is not None:
            leaving.wait()
        scattered, leaving = chunk.scatter(gradient, group)
        own[chunk.symmetric].append(scattered[: chunk.valid[rank]])
        chunk.columns = None
    leaving.wait()
    share.key, share.negatives = torch.cat(own[True]), torch.cat(own[False])
    share.log_scale = log_scale_gradient(problem, share.query)


class _Ring:
    """Neighbours in the group; a set of tensors goes to the next rank while its counterpart comes from the one before.

    Tensors without elements are not sent: both sides know every rank's counts.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self.previous = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def owner(self, step: int) -> int:
        """Whose block is here after `step` passes."""
        return (self.rank - step) % self.size

    def exchange(
        self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor], first_tag: int
    ) -> list[dist.Work]:
        """Started transfers; `outgoing` must stay as it is, and `incoming` is not there, before they are waited for."""
        operations = [
            dist.P2POp(dist.isend, tensor, self.next, self.group, first_tag + tag)
            for tag, tensor in enumerate(outgoing)
            if tensor.numel()
        ] + [
            dist.P2POp(dist.irecv, tensor, self.previous, self.group, first_tag + tag)
            for tag, tensor in enumerate(incoming)
            if tensor.numel()
        ]
        return dist.batch_isend_irecv(operations) if operations else []


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


COLUMN_TAG, SUM_TAG = 0, 16  # of the columns themselves; of what is added up for them


class _Travelling:
    """A rank's block of columns on its way: keys, negatives and what belongs to them, by rows of (keys, negatives)."""

    def __init__(self, ring: _Ring, counts: list[list[int]], tensors: list[torch.Tensor], kinds: list[int], tag: int):
        self.ring, self.counts, self.kinds, self.tag = ring, counts, kinds, tag
        self.tensors = [tensor.contiguous() for tensor in tensors]
        self.outgoing: list[torch.Tensor] = []
        self.arriving: list[torch.Tensor] = []
        self.works: list[dist.Work] = []

    def start(self, step: int) -> None:
        """Begin to pass on what is here at `step`, and to receive what is here at `step` + 1."""
        sizes = self.counts[self.ring.owner(step + 1)]
        self.outgoing = self.tensors
        self.arriving = [
            tensor.new_empty(sizes[kind], *tensor.shape[1:])
            for tensor, kind in zip(self.tensors, self.kinds, strict=True)
        ]
        self.works = self.ring.exchange(self.outgoing, self.arriving, self.tag)

    def finish(self) -> None:
        """What is here now is what `start` began to receive."""
        _wait(self.works)
        self.tensors, self.outgoing, self.arriving, self.works = self.arriving, [], [], []


KEYS, NEGATIVES = 1, 2  # places in a rank's counts


def ring_share(problem: Problem, group: dist.ProcessGroup, counts: list[list[int]]) -> Share:
    """The share of this rank, with a fixed number of ranks' blocks in its memory."""
    ring, labels = _Ring(group), problem.own_labels()
    rows, kept, largest, total = _sweep_ring(problem, ring, counts, labels)
    own_counts = torch.bincount(labels, minlength=len(problem.key)).to(problem.dtype)
    terms = row_terms(rows.partials, largest[labels], total[labels], own_counts[labels])
    share = Share(terms.loss, statistics(problem, rows.partials))
    if problem.with_gradients:
        lse = column_lse(largest, total, own_counts)
        _gradients_ring(problem, share, terms, ring, counts, labels, lse, kept)
    return share


def _columns(problem: Problem) -> tuple[list[torch.Tensor], list[int]]:
    """What a block brings: keys, negatives, and their ids where they are masked."""
    tensors, kinds = [problem.key, problem.negatives], [KEYS, NEGATIVES]
    if problem.query_ids is not None:
        tensors, kinds = [*tensors, problem.key_ids, problem.negative_ids], kinds * 2
    return tensors, kinds


def _sweep_ring(
    problem: Problem, ring: _Ring, counts: list[list[int]], labels: torch.Tensor
) -> tuple[Rows, list[tuple[Kept, Kept] | None], torch.Tensor, torch.Tensor]:
    """This rank's rows, tiles by step, and the maxima and sums of its own keys over the rows of all ranks."""
    rows, kept, budget = Rows(), [], KEPT_BYTES
    columns = _Travelling(ring, counts, *_columns(problem), COLUMN_TAG)
    sums: _Travelling | None = None
    for step in range(ring.size):
        key, negatives, *ids = columns.tensors
        key_ids, negative_ids = ids or (None, None)
        if step + 1 < ring.size:
            columns.start(step)
        kept.append((Kept(budget), Kept(0)) if problem.with_gradients else (None, None))
        own = labels if step == 0 else None
        block = problem.sweep(key, own, key_ids, symmetric=True, kept=kept[-1][0])
        rows.add(block)
        if len(negatives):
            if problem.with_gradients:
                kept[-1][1].budget = kept[-1][0].budget
            rows.add(problem.sweep(negatives, None, negative_ids, symmetric=False, kept=kept[-1][1]))
        if problem.with_gradients:
            budget = kept[-1][1].budget if len(negatives) else kept[-1][0].budget
        mine = [block.column_max, block.column_sum]
        if sums is None:
            sums = _Travelling(ring, counts, mine, [KEYS, KEYS], SUM_TAG)
        else:
            sums.finish()
            sums.tensors = list(merge(*sums.tensors, *mine))
        sums.start(step)
        if step + 1 < ring.size:
            columns.finish()
    sums.finish()
    return rows, kept, *sums.tensors


def _gradients_ring(
    problem: Problem,
    share: Share,
    terms: Terms,
    ring: _Ring,
    counts: list[list[int]],
    labels: torch.Tensor,
    lse: torch.Tensor,
    kept: list[tuple[Kept, Kept]],
) -> None:
    share.query = problem.query.new_zeros(problem.query.shape, dtype=problem.dtype)
    tensors, kinds = _columns(problem)
    columns = _Travelling(ring, counts, [lse, *tensors], [KEYS, *kinds], COLUMN_TAG)
    sums: _Travelling | None = None
    for step in range(ring.size):
        block_lse, key, negatives, *ids = columns.tensors
        key_ids, negative_ids = ids or (None, None)
        if step + 1 < ring.size:
            columns.start(step)
        mine = [part.new_zeros(part.shape, dtype=problem.dtype) for part in (key, negatives)]
        own, kept_key, kept_negatives = (labels if step == 0 else None), *kept[step]
        add_gradients(problem, terms, key, own, key_ids, block_lse, share.query, mine[0], kept_key)
        if len(negatives):
            add_gradients(problem, terms, negatives, None, negative_ids, None, share.query, mine[1], kept_negatives)
        if sums is None:
            sums = _Travelling(ring, counts, mine, [KEYS, NEGATIVES], SUM_TAG)
        else:
            sums.finish()
            sums.tensors = [arrived.add_(part) for arrived, part in zip(sums.tensors, mine, strict=True)]
        sums.start(step)
        if step + 1 < ring.size:
            columns.finish()
    sums.finish()
    share.key, share.negatives = sums.tensors
    share.log_scale = log_scale_gradient(problem, share.query)
