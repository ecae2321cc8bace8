"""InfoNCE on one block of rows against one block of columns: similarities live in registers, one tile at a time.

The block interface of umer1.ops.infonce_torch (`sweep`, `gradients`: its docstrings are the contract), for fp16, bf16
and fp32 on GPUs.  A persistent grid takes tiles of S = Q C^T, loaded by bulk tensor copies where the inputs are aligned
for them, and works on each tile's fp32 accumulator:

- `sweep`: one tile gives its rows' and its columns' maxima and sums of exponentials; they are written per block of
  columns and of rows and combined by a second, small kernel: no atomics, the result is the same in every run, and the
  tiles need no order, so that a small batch is split over all multiprocessors like a large one.
- `gradients`: S once more; a tile of dS goes to memory in the inputs' dtype, for as many rows and columns at a time as
  fit CHUNK_BYTES, and two matrix products of cuBLAS add it to the gradients' fp32 accumulators.

dS at a row's positive weighs most and must not be rounded to 16 bits: it is 0 in the tiles, and a third kernel adds its
fp32 value, times the two embeddings, to both gradients.  Exponentials are base 2 of one fused multiply-add each.
"""

from typing import NamedTuple

import torch
import triton
from umer1_kernels.infonce_block import Block, pieces
from umer1_kernels.infonce_gradients import add_labels, slopes_launch
from umer1_kernels.infonce_sweep import sweep_launch

CHUNK_BYTES = 64 << 20  # of dS: 2,048 rows of 16,384 bf16 columns, an eighth of the whole
CHUNK_ROWS = 128  # and multiples of it: whole tiles
GRADIENT_COLUMNS = 16384  # per launch: keeps the rows of a chunk many enough for the matrix products
SWEEP_ROWS, SWEEP_COLUMNS = 16384, 65536  # per launch: bounds the partial sums to 250 MiB whatever the batch
FP16_RANGE = 2.0**-6  # of dS / t in fp16: at t = 0.02 up to 65,000 rows may share a label


class Partials(NamedTuple):
    """What a sweep leaves of a block [B, C], in fp32; umer1.ops.infonce_torch.Partials says what each field is."""

    row_max: torch.Tensor
    row_sum: torch.Tensor
    column_max: torch.Tensor | None
    column_sum: torch.Tensor | None
    positive: torch.Tensor
    row_best_other: torch.Tensor
    negative_sum: torch.Tensor | None
    negative_count: torch.Tensor | None


def sweep(entries, *, symmetric: bool, statistics: bool = False, kept=None) -> Partials:
    """umer1.ops.infonce_torch.sweep.  `kept` is left as it is."""
    query, columns, *_ = entries
    num_rows, num_columns = len(query), len(columns)
    numbers = torch.empty if num_rows and num_columns else torch.zeros
    by_row = numbers(5 if statistics else 3, num_rows, dtype=torch.float32, device=query.device)
    by_column = numbers(2, num_columns, dtype=torch.float32, device=query.device) if symmetric else None
    positive = torch.zeros(num_rows, dtype=torch.float32, device=query.device)
    if num_rows and num_columns:
        block = Block(*entries)
        with torch.cuda.device_of(query):
            for rows in pieces(num_rows, SWEEP_ROWS):
                for part in pieces(num_columns, SWEEP_COLUMNS):
                    sweep_launch(block, rows, part, by_row, by_column, positive)
    else:
        by_row[0] = by_row[2] = -torch.inf
        if symmetric:
            by_column[0] = -torch.inf
    sums = (by_row[3], by_row[4]) if statistics else (None, None)
    both = (by_column[0], by_column[1]) if symmetric else (None, None)
    return Partials(by_row[0], by_row[1], *both, positive, by_row[2], *sums)


def gradients(
    entries,
    *,
    row_lse: torch.Tensor,
    column_lse: torch.Tensor | None,
    positive_gradient: torch.Tensor | None,
    weight: float,
    grad_query: torch.Tensor,
    grad_columns: torch.Tensor,
    kept=None,
) -> None:
    """umer1.ops.infonce_torch.gradients.  `kept` is not used."""
    query, columns, labels, *_ = entries
    num_rows, num_columns, itemsize = len(query), len(columns), query.element_size()
    if not (num_rows and num_columns):
        return
    block = Block(*entries)
    factor = FP16_RANGE if query.dtype == torch.float16 else 1.0
    padded = triton.cdiv(min(num_columns, GRADIENT_COLUMNS), 8) * 8  # rows of dS begin at multiples of 16 bytes
    chunk = max(1, CHUNK_BYTES // (padded * itemsize * CHUNK_ROWS)) * CHUNK_ROWS
    slopes = query.new_empty(min(num_rows, chunk), padded)
    with torch.cuda.device_of(query):
        for part in pieces(num_columns, GRADIENT_COLUMNS):
            by_column = None if column_lse is None else column_lse[part]
            for rows in pieces(num_rows, chunk):
                slope = slopes[: rows.stop - rows.start, : part.stop - part.start]
                slopes_launch(block, rows, part, row_lse[rows], by_column, slope, factor)
                _add_product(grad_query[rows], slope, block.columns[part], weight / factor)
                _add_product(grad_columns[part], slope.T, block.query[rows], weight / factor)
        if labels is not None:
            add_labels(block, positive_gradient, weight, grad_query, grad_columns)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, weight: float) -> None:
    """total += weight * left @ right, accumulated in fp32 whatever the operands' dtype."""
    if left.dtype == torch.float32:
        torch.addmm(total, left, right, alpha=weight, out=total)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, alpha=weight, out=total)
    else:  # the interpreter's tensors
        torch.addmm(total, left.float(), right.float(), alpha=weight, out=total)
