"""The sweep of InfoNCE: one tile of similarities gives its rows' and its columns' maxima and sums of exponentials.

They are written per block of columns and of rows and combined by a second, small kernel: no atomics, the result is the
same in every run, and tiles need no order, so that a small batch is split over all multiprocessors like a large one.
"""

import torch
import triton
import triton.language as tl
from umer1_kernels.infonce_block import LOG2_E, Block, different_ids, labels_of_tile, options, scale_of, tile_of
from umer1_kernels.infonce_tiles import processors, tile_for

COMBINE_SIZE, COMBINE_DEPTH = 64, 16  # numbers per program, and blocks of them read at once


@triton.jit
def _or_zero(maximum):
    """What to subtract before an exponential: the maximum, or 0 for an empty set (-inf), so that its sum is 0."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit(do_not_specialize=("num_rows", "num_columns"))  # a 1 among them would have no .to()
def sweep_tiles(
    query,
    columns,
    labels,
    row_ids,
    column_ids,
    temperature,
    row_parts,
    column_parts,
    positive,
    num_rows,
    num_columns,
    width,
    query_stride,
    columns_stride,
    column_offset,
    TMA: tl.constexpr,
    LABELS: tl.constexpr,
    IDS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    STATISTICS: tl.constexpr,
    TEMPERATURE_TENSOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Every tile's part of the sums; similarities are not yet divided by t here, the positives are.

    labels are columns of the whole block, this launch's columns begin at column_offset of it.
    row_parts: fp32 [3 or 5, column blocks, num_rows]: maximum, sum of exponentials, largest but the positive, and with
    STATISTICS sum and number of the others.  column_parts: fp32 [2, row blocks, num_columns].
    positive: fp32 [num_rows], written where the label is in these columns.

    Entries that take no part become -inf in the tile itself, one condition at a time: masks kept beside it would not
    fit the registers.
    """
    scale = scale_of(temperature, TEMPERATURE_TENSOR)
    binary = scale * LOG2_E
    block = (query, columns, num_rows, num_columns, width, query_stride, columns_stride)
    row_blocks = tl.cdiv(num_rows, ROWS)
    column_blocks = tl.cdiv(num_columns, COLUMNS)
    for number in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=True):
        tile, row_block, column_block = tile_of(number, block, TMA, ROWS, COLUMNS, INNER, GROUP_ROWS, INTERPRET)
        rows = row_block * ROWS + tl.arange(0, ROWS)
        cols = column_block * COLUMNS + tl.arange(0, COLUMNS)
        inside_rows = rows < num_rows
        inside_cols = cols < num_columns
        if LABELS:
            label, labelled = labels_of_tile(
                labels, rows, inside_rows, column_block * COLUMNS, COLUMNS, num_columns, column_offset
            )
            own = tl.sum(tl.where(label[:, None] == cols[None, :], tile, 0.0), 1)
            tl.store(positive + rows, own * scale, mask=labelled)
            tile = tl.where(label[:, None] == cols[None, :], -float("inf"), tile)
        tile = tl.where(inside_rows[:, None] & inside_cols[None, :], tile, -float("inf"))
        if IDS:
            different = different_ids(row_ids, column_ids, rows, cols, inside_rows, inside_cols)
            tile = tl.where(different, tile, -float("inf"))
        best = tl.max(tile, 1)
        place = row_parts + column_block.to(tl.int64) * num_rows + rows
        part = column_blocks.to(tl.int64) * num_rows
        tl.store(place + 2 * part, best, mask=inside_rows)
        if STATISTICS:
            absent = tile == -float("inf")
            tl.store(place + 3 * part, tl.sum(tl.where(absent, 0.0, tile), 1), mask=inside_rows)
            tl.store(place + 4 * part, tl.sum(tl.where(absent, 0.0, 1.0), 1), mask=inside_rows)
        if LABELS:
            tile = tl.where(label[:, None] == cols[None, :], own[:, None], tile)
            best = tl.where(labelled, tl.maximum(best, own), best)
        tl.store(place, best, mask=inside_rows)
        shift = _or_zero(best) * binary
        tl.store(place + part, tl.sum(tl.exp2(tile * binary - shift[:, None]), 1), mask=inside_rows)
        if SYMMETRIC:
            best = tl.max(tile, 0)
            place = column_parts + row_block.to(tl.int64) * num_columns + cols
            tl.store(place, best, mask=inside_cols)
            shift = _or_zero(best) * binary
            total = tl.sum(tl.exp2(tile * binary - shift[None, :]), 0)
            tl.store(place + row_blocks.to(tl.int64) * num_columns, total, mask=inside_cols)


@triton.jit(do_not_specialize=("size", "blocks"))
def combine_parts(
    parts,
    combined,
    temperature,
    size,
    blocks,
    combined_stride,
    CONTINUE: tl.constexpr,
    KINDS: tl.constexpr,
    TEMPERATURE_TENSOR: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """parts [KINDS, blocks, size] -> combined [KINDS, size], from similarities to logits.

    KINDS: 2 (maximum, sum of exponentials), 3 (and largest but the positive), 5 (and sum and number of the others).
    CONTINUE: what stands in `combined` belongs to the result.
    """
    scale = scale_of(temperature, TEMPERATURE_TENSOR)
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = place < size
    largest = tl.full([SIZE], -float("inf"), tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    best = tl.full([SIZE], -float("inf"), tl.float32)
    others = tl.zeros([SIZE], tl.float32)
    count = tl.zeros([SIZE], tl.float32)
    if CONTINUE:
        largest = tl.load(combined + place, mask=inside, other=0.0)
        total = tl.load(combined + combined_stride + place, mask=inside, other=0.0)
        if KINDS > 2:
            best = tl.load(combined + 2 * combined_stride + place, mask=inside, other=0.0)
        if KINDS > 3:
            others = tl.load(combined + 3 * combined_stride + place, mask=inside, other=0.0)
            count = tl.load(combined + 4 * combined_stride + place, mask=inside, other=0.0)
    kind = blocks.to(tl.int64) * size
    for first in tl.range(0, blocks, DEPTH):
        block = first + tl.arange(0, DEPTH)
        here = (block < blocks)[:, None] & inside[None, :]
        part = parts + block.to(tl.int64)[:, None] * size + place[None, :]
        maxima = tl.load(part, mask=here, other=-float("inf")) * scale
        sums = tl.load(part + kind, mask=here, other=0.0)
        larger = tl.maximum(largest, tl.max(maxima, 0))
        shift = _or_zero(larger)
        sums = tl.sum(sums * tl.exp2((maxima - shift[None, :]) * LOG2_E), 0)
        total = total * tl.exp2((largest - shift) * LOG2_E) + sums
        largest = larger
        if KINDS > 2:
            best = tl.maximum(best, tl.max(tl.load(part + 2 * kind, mask=here, other=-float("inf")), 0) * scale)
        if KINDS > 3:
            others += tl.sum(tl.load(part + 3 * kind, mask=here, other=0.0), 0) * scale
            count += tl.sum(tl.load(part + 4 * kind, mask=here, other=0.0), 0)
    tl.store(combined + place, largest, mask=inside)
    tl.store(combined + combined_stride + place, total, mask=inside)
    if KINDS > 2:
        tl.store(combined + 2 * combined_stride + place, best, mask=inside)
    if KINDS > 3:
        tl.store(combined + 3 * combined_stride + place, others, mask=inside)
        tl.store(combined + 4 * combined_stride + place, count, mask=inside)


def sweep_launch(block: Block, rows: slice, columns: slice, by_row, by_column, positive) -> None:
    """One launch over rows and columns few enough for their partial sums, added to what earlier launches found."""
    num_rows, num_columns = rows.stop - rows.start, columns.stop - columns.start
    tile = tile_for(block.query, num_rows, num_columns)
    row_blocks, column_blocks = triton.cdiv(num_rows, tile.rows), triton.cdiv(num_columns, tile.columns)
    row_parts = by_row.new_empty(len(by_row), column_blocks, num_rows)
    column_parts = None if by_column is None else by_row.new_empty(2, row_blocks, num_columns)
    sweep_tiles[(min(row_blocks * column_blocks, processors(by_row.device)),)](
        **block.arguments(rows, columns, tile),
        row_parts=row_parts,
        column_parts=column_parts,
        positive=positive[rows],
        SYMMETRIC=by_column is not None,
        STATISTICS=len(by_row) == 5,
        **options(tile),
    )
    _combine(block, row_parts, by_row[:, rows], columns.start > 0)
    if column_parts is not None:
        _combine(block, column_parts, by_column[:, columns], rows.start > 0)


def _combine(block: Block, parts: torch.Tensor, combined: torch.Tensor, more: bool) -> None:
    kinds, blocks, size = parts.shape
    combine_parts[(triton.cdiv(size, COMBINE_SIZE),)](
        parts,
        combined,
        block.temperature,
        size,
        blocks,
        combined.stride(0),
        CONTINUE=more,
        KINDS=kinds,
        TEMPERATURE_TENSOR=block.on_device,
        SIZE=COMBINE_SIZE,
        DEPTH=COMBINE_DEPTH,
    )
