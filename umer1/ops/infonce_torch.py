"""InfoNCE on one block of rows against one block of columns, in plain torch: logits exist one tile at a time.

`sweep` and `gradients` are the block interface: every implementation offers both with these signatures, and what
stands above them (one process, gathered columns, a ring) combines blocks without knowing which one ran.

With logits s_ij = q_i . c_j / t, entry (i, j) takes part unless both sides have ids, the ids are equal and j is not
row i's label.  Row log-sum-exps r_i run over all columns of all blocks; column log-sum-exps x_j over the rows of all
ranks, for columns of symmetric blocks.  With w_j the number of rows whose label is column j, both directions' losses

    sum_i (r_i - s_i,label(i)) + sum_j w_j x_j - sum_i s_i,label(i)

have d / d s_ij = exp(s_ij - r_i) + w_j exp(s_ij - x_j) - 2 [j = label(i)], so that one sweep over s gives every sum and
a second one every gradient: 4 matrix products for both directions, 3 for tiles that are kept in between.
"""

from typing import NamedTuple

import torch

CPU_TILE = 1024  # rows and columns of a tile: 4 MiB of fp32 logits stay in a core's share of the caches
CUDA_TILE = 8192  # 256 MiB of fp32 logits: enough work for each launch


class Entries(NamedTuple):
    """A block's rows against its columns."""

    query: torch.Tensor  # [B, D], fp16, bf16, fp32 or fp64; B may be 0; rows of any stride
    columns: torch.Tensor  # [C, D], as query
    labels: torch.Tensor | None
    """int64 [B], column of each row's positive; any value outside of [0, C) says that it is in another block, None that
    all are."""
    temperature: float | torch.Tensor
    """Above 0, or a 0-dim fp32 (fp64) tensor on the same device (never read on the host for CUDA)."""
    row_ids: torch.Tensor | None  # int64 [B]
    column_ids: torch.Tensor | None
    """int64 [C]; None where row_ids is None: entries of equal ids take no part unless they are positives."""


class Partials(NamedTuple):
    """What a sweep leaves of a block [B, C]; fp32 (fp64 for fp64 inputs), natural logarithms and exponentials.

    An empty set of entries has maximum -inf and sum 0.  NaN in a row or column makes its sum NaN, +inf likewise.
    """

    row_max: torch.Tensor  # [B] largest logit that takes part, the positive's included
    row_sum: torch.Tensor  # [B] sum of exp(logit - row_max)
    column_max: torch.Tensor | None  # [C] largest logit that takes part; None for a block that is not symmetric
    column_sum: torch.Tensor | None  # [C] sum of exp(logit - column_max)
    positive: torch.Tensor  # [B] logit at the row's label; 0 where the label is in another block
    row_best_other: torch.Tensor  # [B] largest logit that takes part and is not the positive
    negative_sum: torch.Tensor | None  # [B] sum of the logits that row_best_other is the largest of; None unless asked
    negative_count: torch.Tensor | None  # [B] their number


class Kept:
    """Tiles of logits that `sweep` leaves for `gradients` within a number of bytes; an implementation may ignore it."""

    def __init__(self, budget: int):
        self.budget = budget
        self.tiles: dict[tuple[int, int], torch.Tensor] = {}

    def reserve(self, count: int, like: torch.Tensor) -> bool:
        """Whether `count` more elements may be kept; they are then counted."""
        size = count * like.element_size()
        if size > self.budget:
            return False
        self.budget -= size
        return True


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of logits, sums and gradients' accumulators."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(max_a, sum_a, max_b, sum_b) -> tuple[torch.Tensor, torch.Tensor]:
    """(maximum, sum of exp(logit - maximum)) of two sets of entries together, either of which may be empty."""
    largest = torch.maximum(max_a, max_b)
    shift = _finite_shift(largest)
    return largest, sum_a * torch.exp(max_a - shift) + sum_b * torch.exp(max_b - shift)


def _finite_shift(maximum: torch.Tensor) -> torch.Tensor:
    """The maximum to subtract: an empty set's -inf would make exp(-inf - -inf) NaN, where 0 is meant."""
    return maximum.clamp_min(torch.finfo(maximum.dtype).min)


def sweep(
    entries: Entries,
    *,
    symmetric: bool,
    statistics: bool = False,
    kept: Kept | None = None,
) -> Partials:
    """Maxima, sums of exponentials and positives of the block's logits.

    symmetric: the columns' direction is wanted (keys; not so for hard negatives).
    statistics: negative_sum and negative_count are wanted.
    kept: filled with what `gradients` may take over.
    """
    query, columns, labels, temperature, row_ids, column_ids = entries
    tile, scale = _tile_size(query), scale_of(temperature)
    by_rows: dict[int, _Row] = {}
    by_columns: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    logits_buffer = exponentials = None
    for start in range(0, len(columns), tile):
        c = slice(start, start + tile)
        keys = operand(columns[c])
        for first in range(0, len(query), tile):
            r = slice(first, first + tile)
            rows = operand(query[r])
            shape, size = (len(rows), len(keys)), len(rows) * len(keys)
            if exponentials is None:
                exponentials = _tile_buffer(query, columns, tile)
            if kept is not None and kept.reserve(size, exponentials):
                logits = kept.tiles[first, start] = exponentials.new_empty(shape)
            else:
                logits_buffer = torch.empty_like(exponentials) if logits_buffer is None else logits_buffer
                logits = logits_buffer[:size].view(shape)
            place = None if labels is None else _place(labels[r], start, len(keys))
            logits_of(rows, keys, scale, logits)
            _leave_out(logits, _part(row_ids, r), _part(column_ids, c), place)
            scratch = exponentials[:size].view(shape)
            row = _row_partials(logits, place, scratch, statistics, masked=row_ids is not None)
            by_rows[first] = by_rows[first].merged(row) if first in by_rows else row
            if symmetric:
                column = _maximum_and_sum(logits, 0, logits.amax(0), scratch)
                by_columns[start] = merge(*by_columns[start], *column) if start in by_columns else column
    if not by_rows:
        row = _no_entries(query, len(query), statistics)
    else:
        row = next(iter(by_rows.values())) if len(by_rows) == 1 else _joined(list(by_rows.values()))
    column_max = column_sum = None
    if symmetric and not by_columns:
        column_max, column_sum = _no_entries(query, len(columns), False)[:2]
    elif symmetric:
        column_max, column_sum = (torch.cat(parts) for parts in zip(*by_columns.values(), strict=True))
    return Partials(row.maximum, row.sum, column_max, column_sum, *row[2:])


def gradients(
    entries: Entries,
    *,
    row_lse: torch.Tensor,
    column_lse: torch.Tensor | None,
    positive_gradient: torch.Tensor | None,
    weight: float,
    grad_query: torch.Tensor,
    grad_columns: torch.Tensor,
    kept: Kept | None = None,
) -> None:
    """Add this block's part of d (weight * sum of losses) / d query and / d columns to the accumulators.

    entries, kept: those of `sweep`.
    row_lse: [B], r_i over all blocks, fp32 (fp64).
    column_lse: [C], x_j - log(w_j) over the rows of all ranks, +inf where w_j = 0, so that exp(s_ij - column_lse_j) is
        the whole second term; None for a block that is not symmetric.
    positive_gradient: [B], what stands at the label in place of the formula, `exp(..) + exp(..) - 2`: there the 1s
        cancel, and the caller has them accurately (expm1 of the maximum and the sum's logarithm apart).  It is used
        where the label is in this block; None with labels None.
    weight: multiplies every gradient, positive_gradient's too; 1 / (2 G) for the mean over G pairs and both directions.
    grad_query [B, D], grad_columns [C, D]: contiguous fp32 (fp64), added to; weight / t is included.

    d loss / d log(1/t) is no output: it equals sum_i <q_i, d loss / d q_i> over all columns, since q enters as q/t.
    """
    query, columns, labels, temperature, row_ids, column_ids = entries
    tile, scale = _tile_size(query), scale_of(temperature)
    logits_buffer = probability_buffer = None
    for start in range(0, len(columns), tile):
        c = slice(start, start + tile)
        keys = operand(columns[c])
        for first in range(0, len(query), tile):
            r = slice(first, first + tile)
            rows = operand(query[r])
            size = len(rows) * len(keys)
            place = None if labels is None else _place(labels[r], start, len(keys))
            if kept is not None and (first, start) in kept.tiles:
                logits = kept.tiles.pop((first, start))
            else:
                if logits_buffer is None:
                    logits_buffer = _tile_buffer(query, columns, tile)
                logits = logits_of(rows, keys, scale, logits_buffer[:size].view(len(rows), len(keys)))
                _leave_out(logits, _part(row_ids, r), _part(column_ids, c), place)
            if column_lse is None:
                gradient = logits.sub_(row_lse[r, None]).exp_()
            else:
                if probability_buffer is None:
                    probability_buffer = _tile_buffer(query, columns, tile)
                gradient = probability_buffer[:size].view(len(rows), len(keys))
                torch.sub(logits, row_lse[r, None], out=gradient).exp_()
                gradient += logits.sub_(column_lse[None, c]).exp_()
            if place is not None:
                index, inside = place
                wanted = torch.where(inside, positive_gradient[r, None], gradient.gather(1, index))
                gradient.scatter_(1, index, wanted)
            factor = scale * weight
            if isinstance(factor, torch.Tensor):
                gradient, factor = gradient.mul_(factor), 1.0
            _add_product(grad_query[r], gradient, keys, factor)
            _add_product(grad_columns[c], gradient.T, rows, factor)


class _Row(NamedTuple):
    """A tile's partials by row, or those of tiles side by side; see Partials."""

    maximum: torch.Tensor
    sum: torch.Tensor
    positive: torch.Tensor
    best_other: torch.Tensor
    negative_sum: torch.Tensor | None
    negative_count: torch.Tensor | None

    def merged(self, other: "_Row") -> "_Row":
        counts = (None, None)
        if self.negative_sum is not None:
            counts = (self.negative_sum + other.negative_sum, self.negative_count + other.negative_count)
        return _Row(
            *merge(self.maximum, self.sum, other.maximum, other.sum),
            self.positive + other.positive,
            torch.maximum(self.best_other, other.best_other),
            *counts,
        )


def _joined(parts: list[_Row]) -> _Row:
    """Tiles below one another."""
    return _Row(*(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)))


def _no_entries(like: torch.Tensor, size: int, statistics: bool) -> _Row:
    zero = torch.zeros(size, dtype=accumulator_dtype(like.dtype), device=like.device)
    nothing = zero - torch.inf
    return _Row(nothing, zero, zero, nothing, *((zero, zero) if statistics else (None, None)))


def _row_partials(
    logits: torch.Tensor,
    place: tuple[torch.Tensor, torch.Tensor] | None,
    scratch: torch.Tensor,
    statistics: bool,
    masked: bool,
) -> _Row:
    """Of one tile, whose left out entries are -inf where `masked`."""
    if place is None:
        best_other = maximum = logits.amax(1)
        positive = torch.zeros_like(maximum)
    else:
        index, inside = place
        found = logits.gather(1, index)
        logits.scatter_(1, index, found.masked_fill(inside, -torch.inf))
        best_other = logits.amax(1)
        logits.scatter_(1, index, found)
        positive = found.masked_fill(~inside, 0)[:, 0]
        maximum = torch.maximum(best_other, found[:, 0])  # a found value that is no positive is among the others
    negative_sum = negative_count = None
    if statistics:
        others = torch.full_like(maximum, logits.shape[1])
        values = logits
        if masked:
            left_out = logits == -torch.inf
            others -= left_out.sum(1, dtype=others.dtype)
            values = logits.masked_fill(left_out, 0)
        negative_sum = values.sum(1) - positive
        negative_count = others if place is None else others - inside[:, 0].to(others.dtype)
    return _Row(*_maximum_and_sum(logits, 1, maximum, scratch), positive, best_other, negative_sum, negative_count)


def _maximum_and_sum(
    logits: torch.Tensor, dim: int, maximum: torch.Tensor, scratch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(maximum, sum of exp(logit - maximum)) along `dim`; `scratch` is overwritten."""
    torch.sub(logits, _finite_shift(maximum).unsqueeze(dim), out=scratch)
    return maximum, scratch.exp_().sum(dim)


def _tile_size(like: torch.Tensor) -> int:
    return CPU_TILE if like.device.type == "cpu" else CUDA_TILE


def _tile_buffer(query: torch.Tensor, columns: torch.Tensor, tile: int) -> torch.Tensor:
    """Room for the logits of any tile of the block."""
    size = min(tile, len(query)) * min(tile, len(columns))
    return torch.empty(size, dtype=accumulator_dtype(query.dtype), device=query.device)


def scale_of(temperature: float | torch.Tensor) -> float | torch.Tensor:
    """1 / temperature: a number wherever no device has to be waited for, because products scale by numbers for free."""
    if isinstance(temperature, torch.Tensor):
        return 1 / temperature.item() if temperature.device.type == "cpu" else temperature.reciprocal()
    return 1 / temperature


def _part(ids: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if ids is None else ids[part]


def operand(rows: torch.Tensor) -> torch.Tensor:
    """What products are made from: CUDA multiplies 16-bit values into fp32; the CPU is given fp32."""
    return rows if rows.device.type == "cuda" else rows.to(accumulator_dtype(rows.dtype))


def logits_of(rows: torch.Tensor, keys: torch.Tensor, scale: float | torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """rows @ keys.T * scale in fp32 (fp64), in `out`."""
    if rows.dtype == out.dtype and isinstance(scale, float):
        return torch.addmm(out, rows, keys.T, beta=0, alpha=scale, out=out)
    if isinstance(scale, float):
        return torch.addmm(out, rows, keys.T, out_dtype=out.dtype, beta=0, alpha=scale, out=out)
    if rows.dtype == out.dtype:
        torch.mm(rows, keys.T, out=out)
    else:
        torch.mm(rows, keys.T, out_dtype=out.dtype, out=out)
    return out.mul_(scale)


def _add_product(accumulator: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float) -> None:
    """accumulator += factor * left @ right; `left` is rounded to the dtype of 16-bit inputs."""
    if left.dtype == right.dtype:
        accumulator.addmm_(left, right, alpha=factor)
    else:
        product = torch.mm(left.to(right.dtype), right, out_dtype=accumulator.dtype)
        accumulator.add_(product, alpha=factor)


def _place(labels: torch.Tensor, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(column of each row's positive in the tile [R, 1], whether it is in the tile [R, 1]); a legal column anyway."""
    wanted = (labels - start)[:, None]
    index = wanted.clamp(0, size - 1)
    return index, index == wanted


def _leave_out(
    logits: torch.Tensor,
    row_ids: torch.Tensor | None,
    column_ids: torch.Tensor | None,
    place: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """-inf where both sides have the same id and the entry is no positive."""
    if row_ids is None:
        return
    equal = row_ids[:, None] == column_ids[None]
    if place is not None:
        index, inside = place
        equal.scatter_(1, index, equal.gather(1, index) & ~inside)
    logits.masked_fill_(equal, -torch.inf)
