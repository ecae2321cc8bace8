"""What both InfoNCE kernels share: a tile of similarities, the labels in it, and a block's tensors as arguments."""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from umer1_kernels.infonce_tiles import Tile, architecture
from umer1_kernels.variants import INTERPRETED

LOG2_E = tl.constexpr(math.log2(math.e))
GROUP = 8  # row blocks that go through all columns together: their rows and the columns they meet stay in the L2


@triton.jit
def _place_of(number, row_blocks, column_blocks, GROUP_ROWS: tl.constexpr):
    """(row block, column block) of a tile."""
    per_group = GROUP_ROWS * column_blocks
    first = number // per_group * GROUP_ROWS
    size = tl.minimum(row_blocks - first, GROUP_ROWS)
    return first + number % per_group % size, number % per_group // size


@triton.jit
def _similarities(
    query,
    columns,
    first_row,
    first_column,
    num_rows,
    num_columns,
    width,
    query_stride,
    columns_stride,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A tile of Q C^T, fp32 [ROWS, COLUMNS]; entries outside of the block are 0."""
    tile = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, width, INNER):
        if TMA:
            left = query.load([first_row, start])
            right = columns.load([first_column, start])
        else:
            inner = start + tl.arange(0, INNER)
            rows = first_row + tl.arange(0, ROWS)
            cols = first_column + tl.arange(0, COLUMNS)
            left = tl.load(
                query + rows[:, None].to(tl.int64) * query_stride + inner[None, :],
                mask=(rows < num_rows)[:, None] & (inner < width)[None, :],
                other=0.0,
            )
            right = tl.load(
                columns + cols[:, None].to(tl.int64) * columns_stride + inner[None, :],
                mask=(cols < num_columns)[:, None] & (inner < width)[None, :],
                other=0.0,
            )
        if INTERPRET:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        tile = tl.dot(left, right.T, tile, input_precision="tf32x3")
    return tile


@triton.jit
def tile_of(
    number,
    block,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """(similarities fp32 [ROWS, COLUMNS], row block, column block) of the tile of this number.

    block: query, columns, num_rows, num_columns, width, query_stride, columns_stride of the launch.
    """
    query, columns, num_rows, num_columns, width, query_stride, columns_stride = block
    row_block, column_block = _place_of(number, tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS), GROUP_ROWS)
    tile = _similarities(
        query,
        columns,
        row_block * ROWS,
        column_block * COLUMNS,
        num_rows,
        num_columns,
        width,
        query_stride,
        columns_stride,
        TMA,
        ROWS,
        COLUMNS,
        INNER,
        INTERPRET,
    )
    return tile, row_block, column_block


@triton.jit
def scale_of(temperature, IS_TENSOR: tl.constexpr):
    """1 / t."""
    if IS_TENSOR:
        return 1.0 / tl.load(temperature)
    else:
        return 1.0 / temperature


@triton.jit
def labels_of_tile(labels, rows, inside, first_column, COLUMNS: tl.constexpr, num_columns, offset):
    """(column of each row's label in this launch's columns, -1 where in none of them; whether it is in this tile)."""
    label = tl.load(labels + rows, mask=inside, other=-1) - offset
    label = tl.where((label >= 0) & (label < num_columns), label, -1).to(tl.int32)
    return label, (label >= first_column) & (label < first_column + COLUMNS)


@triton.jit
def different_ids(row_ids, column_ids, rows, cols, inside_rows, inside_cols):
    """bool [rows, cols]."""
    row_id = tl.load(row_ids + rows, mask=inside_rows, other=0)
    column_id = tl.load(column_ids + cols, mask=inside_cols, other=0)
    return row_id[:, None] != column_id[None, :]


class Block:
    """A block's tensors as the kernels take them."""

    def __init__(self, query, columns, labels, temperature, row_ids, column_ids):
        self.query, self.columns = _rows_of_unit_stride(query), _rows_of_unit_stride(columns)
        self.labels = None if labels is None else labels.contiguous()
        self.row_ids = None if row_ids is None else row_ids.contiguous()
        self.column_ids = None if column_ids is None else column_ids.contiguous()
        self.temperature, self.on_device = temperature, isinstance(temperature, torch.Tensor)
        if self.on_device:
            self.temperature = temperature.detach().float()
        self.bulk_copies = _bulk_copies(self.query) and _bulk_copies(self.columns)

    def arguments(self, rows: slice, columns: slice, tile: Tile) -> dict:
        """Of a launch over these rows and columns; what it does not use stands in as the labels do: by None."""
        query, keys = self.query[rows], self.columns[columns]
        if self.bulk_copies:
            left = TensorDescriptor.from_tensor(query, [tile.rows, tile.inner])
            right = TensorDescriptor.from_tensor(keys, [tile.columns, tile.inner])
        else:
            left, right = query, keys
        return dict(
            query=left,
            columns=right,
            labels=None if self.labels is None else self.labels[rows],
            row_ids=None if self.row_ids is None else self.row_ids[rows],
            column_ids=None if self.column_ids is None else self.column_ids[columns],
            temperature=self.temperature,
            num_rows=len(query),
            num_columns=len(keys),
            width=query.shape[1],
            query_stride=query.stride(0),
            columns_stride=keys.stride(0),
            column_offset=columns.start,
            TMA=self.bulk_copies,
            LABELS=self.labels is not None,
            IDS=self.row_ids is not None,
            TEMPERATURE_TENSOR=self.on_device,
            **tile_arguments(tile),
        )


def tile_arguments(tile: Tile) -> dict:
    """What every tiled kernel is told of its tiles."""
    return dict(ROWS=tile.rows, COLUMNS=tile.columns, INNER=tile.inner, GROUP_ROWS=GROUP, INTERPRET=INTERPRETED)


def options(tile: Tile) -> dict[str, int]:
    """The launch's own settings."""
    return dict(num_warps=tile.num_warps, num_stages=tile.num_stages)


def _rows_of_unit_stride(rows: torch.Tensor) -> torch.Tensor:
    rows = rows.detach()
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


def _bulk_copies(rows: torch.Tensor) -> bool:
    """Whether bulk tensor copies can load these rows: 16-byte alignment throughout, Hopper or later."""
    aligned = rows.stride(0) * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0
    return aligned and architecture(rows.device) >= 90


def pieces(total: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover 0 to total, in order."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
