"""The gradients of InfoNCE: dS a tile at a time in the inputs' dtype, and what comes through the labels in fp32."""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from umer1_kernels.infonce_block import LOG2_E, Block, different_ids, labels_of_tile, options, scale_of, tile_of
from umer1_kernels.infonce_tiles import processors, tile_for

LABEL_WIDTH = 512  # of an embedding, per program


@triton.jit(do_not_specialize=("num_rows", "num_columns"))
def gradient_tiles(
    query,
    columns,
    labels,
    row_ids,
    column_ids,
    temperature,
    row_lse,
    column_lse,
    gradient,
    num_rows,
    num_columns,
    width,
    query_stride,
    columns_stride,
    gradient_stride,
    column_offset,
    factor,
    TMA: tl.constexpr,
    LABELS: tl.constexpr,
    IDS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    TEMPERATURE_TENSOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """gradient [num_rows, num_columns] = (exp(s - row_lse) + exp(s - column_lse)) factor / t, 0 at the labels."""
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
        lse = tl.load(row_lse + rows, mask=inside_rows, other=0.0) * LOG2_E
        slope = tl.exp2(tile * binary - lse[:, None])
        if SYMMETRIC:
            lse = tl.load(column_lse + cols, mask=inside_cols, other=0.0) * LOG2_E
            slope += tl.exp2(tile * binary - lse[None, :])
        if IDS:
            slope = tl.where(different_ids(row_ids, column_ids, rows, cols, inside_rows, inside_cols), slope, 0.0)
        if LABELS:
            label, _ = labels_of_tile(
                labels, rows, inside_rows, column_block * COLUMNS, COLUMNS, num_columns, column_offset
            )
            slope = tl.where(label[:, None] == cols[None, :], 0.0, slope)
        rounded = (slope * (scale * factor)).to(gradient.dtype if TMA else gradient.dtype.element_ty)
        if TMA:
            gradient.store([row_block * ROWS, column_block * COLUMNS], rounded)
        else:
            tl.store(
                gradient + rows[:, None].to(tl.int64) * gradient_stride + cols[None, :],
                rounded,
                mask=inside_rows[:, None] & inside_cols[None, :],
            )


@triton.jit
def label_gradients(
    query,
    columns,
    labels,
    order,
    positive_gradient,
    temperature,
    grad_query,
    grad_columns,
    num_rows,
    num_columns,
    width,
    query_stride,
    columns_stride,
    weight,
    TEMPERATURE_TENSOR: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add what comes through the rows' labels: to the row's gradient the column, to the column's gradient the rows.

    labels: int64 [num_rows], ascending; order: the row of each.  The program of a label's first row adds all of its
    rows to the column, in order: no two programs write one place.
    """
    scale = scale_of(temperature, TEMPERATURE_TENSOR) * weight
    place = tl.program_id(0)
    label = tl.load(labels + place)
    if (label >= 0) & (label < num_columns):
        inner = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = inner < width
        row = tl.load(order + place)
        slope = tl.load(positive_gradient + row) * scale
        key = tl.load(columns + label * columns_stride + inner, mask=inside, other=0.0).to(tl.float32)
        target = grad_query + row * width + inner
        tl.store(target, tl.load(target, mask=inside, other=0.0) + slope * key, mask=inside)
        before = tl.load(labels + place - 1, mask=place > 0, other=-1)
        if before != label:
            total = tl.zeros([WIDTH], tl.float32)
            following = label
            while following == label:
                row = tl.load(order + place)
                slope = tl.load(positive_gradient + row) * scale
                total += slope * tl.load(query + row * query_stride + inner, mask=inside, other=0.0).to(tl.float32)
                place += 1
                following = tl.load(labels + place, mask=place < num_rows, other=-1)
            target = grad_columns + label * width + inner
            tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)


def slopes_launch(block: Block, rows: slice, columns: slice, row_lse, column_lse, slope, factor: float) -> None:
    """Fill slope [rows, columns] by `gradient_tiles`; row_lse, column_lse: fp32, of these rows and columns alone."""
    tile = tile_for(block.query, *slope.shape)
    blocks = triton.cdiv(slope.shape[0], tile.rows) * triton.cdiv(slope.shape[1], tile.columns)
    target = TensorDescriptor.from_tensor(slope, [tile.rows, tile.columns]) if block.bulk_copies else slope
    gradient_tiles[(min(blocks, processors(slope.device)),)](
        **block.arguments(rows, columns, tile),
        row_lse=row_lse.contiguous(),
        column_lse=None if column_lse is None else column_lse.contiguous(),
        gradient=target,
        gradient_stride=slope.stride(0),
        factor=factor,
        SYMMETRIC=column_lse is not None,
        **options(tile),
    )


def add_labels(block: Block, positive_gradient, weight: float, grad_query, grad_columns) -> None:
    """`label_gradients` over all rows; positive_gradient: fp32 [num_rows], the accumulators contiguous fp32."""
    labels, order = block.labels.sort(stable=True)
    width = block.query.shape[1]
    label_gradients[(len(labels), triton.cdiv(width, LABEL_WIDTH))](
        block.query,
        block.columns,
        labels,
        order,
        positive_gradient.contiguous(),
        block.temperature,
        grad_query,
        grad_columns,
        len(labels),
        len(block.columns),
        width,
        block.query.stride(0),
        block.columns.stride(0),
        weight,
        TEMPERATURE_TENSOR=block.on_device,
        WIDTH=LABEL_WIDTH,
    )
