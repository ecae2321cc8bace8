"""Ranking x margin rewards of all rollouts of a comparison set, both sides from one sweep of the similarities.

Three launches over S = query @ target^T, of which only tiles exist:

    own      the tiles on the diagonal: the similarities within each pair, fp32 [rows, G]
    count    every tile: how many candidates rank before each of them, and the sums over the other pairs
    finish   ranking, margin and reward of each rollout

A similarity of the own pair is in the top n (n: the valid rollouts of the pair on the other side) if and only if fewer
than n candidates rank before it: that are greater, or equal and of a smaller index.  Counting needs no sort and adds up
in any order.  A tile of S serves its rows (the query's rollouts) and its columns (the target's), so that both sides
cost one matrix product.

Equal rows have equal similarities to the last bit wherever they stand: all tiles have one shape, one loop over D and
one tl.dot, so that every element is the result of the same sequence of tensor-core instructions on its own row and
column; what `own` stores is what `count` computes again at the same place.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from umer1_kernels.variants import INTERPRETED, Variant


class Config(NamedTuple):
    """Form of the similarities' tiles: rows x columns elements, `depth` elements of an embedding at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By chip and by bytes of an element.  Chosen by what the compiler reports for sm_90: `count` holds a tile and its
# masks, and spills registers with 128 x 128, with 128 x 64 too for rollouts that are no multiple of 16.  Not yet timed.
CONFIGS = {
    ("any", 2): Config(64, 64, 64, 8, 4),
    ("any", 4): Config(64, 64, 32, 8, 4),
    ("interpreter", 2): Config(32, 16, 32, 1, 1),
    ("interpreter", 4): Config(32, 16, 32, 1, 1),
}
FINISH_BLOCK = 128
# One compiled kernel serves every number of rollouts, also where it is 1 or a multiple of 16.  Not the size of a group:
# dividing by a number that is not known takes so many registers that `count` spills.
UNSPECIALIZED = ("rows", "row_tiles", "column_tiles")


@triton.jit
def _tile(query, target, row, column, rows, dimension, DEPTH: tl.constexpr, UP: tl.constexpr):
    """Similarities fp32 [row, column] of these rows of query and target, both [rows, dimension]; 0 outside."""
    part = tl.arange(0, DEPTH)
    query_at = query + row[:, None].to(tl.int64) * dimension + part[None, :]
    target_at = target + column[None, :].to(tl.int64) * dimension + part[:, None]
    similarity = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in range(0, dimension, DEPTH):
        there = start + part < dimension
        left = tl.load(query_at + start, mask=(row < rows)[:, None] & there[None, :], other=0.0)
        right = tl.load(target_at + start, mask=(column < rows)[None, :] & there[:, None], other=0.0)
        if UP:
            left, right = left.to(tl.float32), right.to(tl.float32)
        # One TF32 product alone would keep 11 bits of fp32 inputs; three keep 22.  Narrower inputs are exact.
        similarity = tl.dot(left, right, similarity, input_precision="tf32x3")
    return similarity


@triton.jit(do_not_specialize=UNSPECIALIZED)
def own_kernel(
    query,
    target,
    own,  # out: fp32 [rows, size], similarity of a row to the target at each place of its own pair
    rows,
    dimension,
    size: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UP: tl.constexpr,
):
    """Program (i, j): the j-th of the tiles that hold pairs of row block i."""
    first_row = tl.program_id(0) * ROWS
    first_column = (first_row // size * size // COLUMNS + tl.program_id(1)) * COLUMNS
    last_row = tl.minimum(first_row + ROWS, rows) - 1
    if first_column < (last_row // size + 1) * size:
        row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
        similarity = _tile(query, target, row, column, rows, dimension, DEPTH, UP)
        same = (row // size)[:, None] == (column // size)[None, :]
        place = row[:, None].to(tl.int64) * size + (column % size)[None, :]
        tl.store(own + place, similarity, mask=same & (row < rows)[:, None] & (column < rows)[None, :])


@triton.jit
def _flags(valid, index, rows):
    """Which of these rows are there and valid; all are where `valid` is None."""
    inside = index < rows
    if valid is None:
        return inside
    return inside & (tl.load(valid + index, mask=inside, other=0) != 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def count_kernel(
    query,
    target,
    query_valid,  # uint8 [rows] or None
    target_valid,  # uint8 [rows] or None
    ids,  # int64 [pairs] or None
    own,  # fp32 [rows, size]
    before,  # in, zeros, and out: int32 [sides, size, rows], candidates that rank before a row's own
    others,  # out: int32 [tiles, rows], a rollout's valid candidates of other pairs in each tile: first the query
    # side's, one for each tile of columns, then the target side's, one for each tile of rows
    other_sum,  # out: fp32 [tiles, rows], the sum of their similarities
    rows,
    dimension,
    size: tl.constexpr,
    column_tiles,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UP: tl.constexpr,
):
    """Program (i, j): one tile of S, counted for its rows and, with BOTH, for its columns."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    row, column = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
    similarity = _tile(query, target, row, column, rows, dimension, DEPTH, UP)
    row_there, column_there = row < rows, column < rows
    row_pair, column_pair = row // size, column // size
    same = row_pair[:, None] == column_pair[None, :]
    other = row_pair[:, None] != column_pair[None, :]
    if ids is not None:
        row_id = tl.load(ids + row_pair, mask=row_there, other=0)
        column_id = tl.load(ids + column_pair, mask=column_there, other=0)
        other = row_id[:, None] != column_id[None, :]

    valid = _flags(target_valid, column, rows)[None, :]
    out = column_tile.to(tl.int64) * rows + row
    tl.store(others + out, tl.sum((other & valid).to(tl.int32), 1), mask=row_there)
    tl.store(other_sum + out, tl.sum(tl.where(other & valid, similarity, 0.0), 1), mask=row_there)
    candidate = tl.where((same | other) & valid, similarity, float("-inf"))
    for place in range(size):
        it = row_pair * size + place
        its = tl.load(own + row.to(tl.int64) * size + place, mask=row_there, other=0.0)
        equal = (candidate == its[:, None]) & (column[None, :] < it[:, None])
        earlier = ((candidate > its[:, None]) & (column[None, :] != it[:, None])) | equal
        tl.atomic_add(before + place * rows + row, tl.sum(earlier.to(tl.int32), 1), mask=row_there)

    if BOTH:
        valid = _flags(query_valid, row, rows)[:, None]
        out = (column_tiles + row_tile).to(tl.int64) * rows + column
        tl.store(others + out, tl.sum((other & valid).to(tl.int32), 0), mask=column_there)
        tl.store(other_sum + out, tl.sum(tl.where(other & valid, similarity, 0.0), 0), mask=column_there)
        candidate = tl.where((same | other) & valid, similarity, float("-inf"))
        for place in range(size):
            it = column_pair * size + place
            its = tl.load(own + it.to(tl.int64) * size + column % size, mask=column_there, other=0.0)
            equal = (candidate == its[None, :]) & (row[:, None] < it[None, :])
            earlier = ((candidate > its[None, :]) & (row[:, None] != it[None, :])) | equal
            tl.atomic_add(before + (size + place) * rows + column, tl.sum(earlier.to(tl.int32), 0), mask=column_there)


@triton.jit
def _finish(
    scored_valid,
    candidate_valid,
    own,
    row_stride,
    place_stride,
    before,
    others,
    other_sum,
    out,
    rows,
    tiles,
    size: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One side's results: in its pair's block of `own`, a row's similarities are `place_stride` from each other."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    pair = row // size
    number, total = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
    for tile in range(tiles):
        at = tl.cast(tile, tl.int64) * rows + row
        number += tl.load(others + at, mask=there, other=0)
        total += tl.load(other_sum + at, mask=there, other=0.0)
    num_own, own_total = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
    base = own + (pair * size).to(tl.int64) * size + (row % size) * row_stride
    for place in range(size):
        valid = _flags(candidate_valid, pair * size + place, rows) & there
        own_total += tl.load(base + place * place_stride, mask=valid, other=0.0)
        num_own += valid.to(tl.int32)
    hits = tl.zeros([BLOCK], tl.int32)
    for place in range(size):
        valid = _flags(candidate_valid, pair * size + place, rows) & there
        earlier = tl.load(before + place * rows + row, mask=there, other=0)
        hits += (valid & (earlier < num_own)).to(tl.int32)
    share = tl.maximum(num_own, 1).to(tl.float32)
    margin = tl.div_rn(own_total, share) - tl.div_rn(total, tl.maximum(number, 1).to(tl.float32))
    ranking = tl.where(tl.abs(margin) < float("inf"), tl.div_rn(hits.to(tl.float32), share), float("nan"))
    scored = _flags(scored_valid, row, rows) & (num_own > 0)
    tl.store(out + row, tl.where(scored, ranking * margin, 0.0), mask=there)
    tl.store(out + rows + row, tl.where(scored, ranking, 0.0), mask=there)
    tl.store(out + 2 * rows + row, tl.where(scored, margin, 0.0), mask=there)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_kernel(
    query_valid,
    target_valid,
    own,
    before,
    others,
    other_sum,
    out,  # fp32 [sides, 3, rows]: reward, ranking, margin
    rows,
    size: tl.constexpr,
    row_tiles,
    column_tiles,
    BLOCK: tl.constexpr,
):
    """Program (i, side): the results of one block of rollouts of one side."""
    if tl.program_id(1) == 0:
        _finish(
            query_valid, target_valid, own, size, 1, before, others, other_sum, out, rows, column_tiles, size, BLOCK
        )
    else:
        before += size * rows
        others += tl.cast(column_tiles, tl.int64) * rows
        other_sum += tl.cast(column_tiles, tl.int64) * rows
        out += 3 * rows
        _finish(target_valid, query_valid, own, 1, size, before, others, other_sum, out, rows, row_tiles, size, BLOCK)


def own_tiles(size: int, form: Config) -> int:
    """The most tiles side by side that hold the pairs of one block of rows."""
    inside = form.rows % size == 0 or size % form.rows == 0
    # Columns of these pairs; where blocks and pairs do not fit, of those too that only begin or end in the block.
    width = max(form.rows, size) if inside else form.rows + 2 * (size - 1)
    aligned = inside and max(form.rows, size) % form.columns == 0
    return width // form.columns if aligned else (width - 1) // form.columns + 2


def rank_margin(
    query: torch.Tensor,
    target: torch.Tensor,
    size: int,
    *,
    query_valid: torch.Tensor | None,
    target_valid: torch.Tensor | None,
    ids: torch.Tensor | None,
    both: bool,
) -> torch.Tensor:
    """fp32 [sides, 3, rows]: reward, ranking and margin of the query's rollouts and, with `both`, of the target's.

    query, target: fp16, bf16 or fp32 [rows, D], contiguous; query_valid, target_valid: uint8 [rows] or None;
    ids: int64 [rows / size] or None.
    """
    rows, dimension = query.shape
    form = CONFIGS["interpreter" if INTERPRETED else "any", query.dtype.itemsize]
    sides, row_tiles, column_tiles = 1 + both, triton.cdiv(rows, form.rows), triton.cdiv(rows, form.columns)
    tiles = column_tiles + both * row_tiles
    own = torch.empty(rows, size, dtype=torch.float32, device=query.device)
    before = torch.zeros(sides, size, rows, dtype=torch.int32, device=query.device)
    others = torch.empty(tiles, rows, dtype=torch.int32, device=query.device)
    other_sum = torch.empty(tiles, rows, dtype=torch.float32, device=query.device)
    out = torch.empty(sides, 3, rows, dtype=torch.float32, device=query.device)
    shape = {"ROWS": form.rows, "COLUMNS": form.columns, "DEPTH": form.depth, "UP": INTERPRETED}
    options = {"num_warps": form.num_warps, "num_stages": form.num_stages}
    with torch.cuda.device_of(query):  # Triton launches on the current device
        own_kernel[row_tiles, own_tiles(size, form)](query, target, own, rows, dimension, size, **shape, **options)
        count_kernel[row_tiles, column_tiles](
            query,
            target,
            query_valid,
            target_valid,
            ids,
            own,
            before,
            others,
            other_sum,
            rows,
            dimension,
            size,
            column_tiles,
            BOTH=both,
            **shape,
            **options,
        )
        finish_kernel[triton.cdiv(rows, FINISH_BLOCK), sides](
            query_valid,
            target_valid,
            own,
            before,
            others,
            other_sum,
            out,
            rows,
            size,
            row_tiles,
            column_tiles,
            BLOCK=FINISH_BLOCK,
        )
    return out


def variants(arch: int) -> list[Variant]:
    """The forms of a GPU for groups of 8, flags and ids, by width of the elements."""
    size = 8
    numbers = ("dimension", *UNSPECIALIZED)
    types = dict.fromkeys(numbers, "i32") | dict.fromkeys(("own", "other_sum", "out"), "*fp32")
    types |= dict.fromkeys(("before", "others"), "*i32") | dict.fromkeys(("query_valid", "target_valid"), "*u8")
    types["ids"] = "*i64"

    def variant(name: str, kernel, constexprs: dict, types: dict, options: dict) -> Variant:
        arguments = [argument for argument in kernel.arg_names if argument not in constexprs]
        return Variant(
            name=f"rank_margin {name}",
            kernel=kernel,
            types={argument: types[argument] for argument in arguments},
            constexprs=constexprs,
            divisible_by_16=tuple(argument for argument in arguments if argument not in UNSPECIALIZED),
            options=options,
        )

    found = [variant("finish", finish_kernel, {"size": size, "BLOCK": FINISH_BLOCK}, types, {})]
    for itemsize, dtype in ((2, "bf16"), (4, "fp32")):
        form = CONFIGS["any", itemsize]
        shape = {"size": size, "ROWS": form.rows, "COLUMNS": form.columns, "DEPTH": form.depth, "UP": False}
        options = {"num_warps": form.num_warps, "num_stages": form.num_stages}
        name = f"{form.rows}x{form.columns}x{form.depth} {dtype}"
        given = types | {"query": f"*{dtype}", "target": f"*{dtype}"}
        found.append(variant(f"own {name}", own_kernel, shape, given, options))
        found.append(variant(f"count {name}", count_kernel, shape | {"BOTH": True}, given, options))
    return found
