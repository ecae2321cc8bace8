"""The two passes over a block of logits of linear_cross_entropy: one read for the statistics, one for the gradient.

umer1.ops.linear_softmax_torch is the interface and the reference.  Matrix products stay cuBLAS's: what bounds these
passes is memory, 4 bytes a logit for the statistics and 4 and the 2 of a 16-bit slope for the gradient, where plain
torch reads and writes the block thirteen times.  Logits stay as they are: none of `absorb`'s exponentials are kept.
"""

import torch
import triton
import triton.language as tl
from umer1_kernels.variants import Variant

COLUMNS = 4096  # of a row at a time: 16 values a thread
OPTIONS = {"num_warps": 8}


@triton.jit(do_not_specialize=("start",))
def absorb_row(
    logits,
    place,
    largest,
    total,
    chosen,
    moment,
    start,
    columns,
    stride,
    scale,
    COLUMNS: tl.constexpr,
):
    """One row's statistics, maximum and sums carried from part to part; `moment` may be None."""
    row = tl.program_id(0)
    own = logits + row.to(tl.int64) * stride
    top = tl.load(largest + row)
    whole = tl.load(total + row)
    if moment is not None:
        weighted = tl.load(moment + row)
    for first in tl.range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < columns
        value = tl.load(own + column, mask=inside, other=-float("inf")) * scale
        higher = tl.maximum(top, tl.max(value, 0))
        fade = tl.exp(top - higher)
        part = tl.exp(value - higher)
        if moment is not None:
            weighted = fade * (weighted + whole * (top - higher))
            weighted += tl.sum(tl.where(inside, part * (value - higher), 0.0), 0)
        whole = fade * whole + tl.sum(part, 0)
        top = higher
    label = tl.load(place + row) - start
    if (label >= 0) & (label < columns):
        tl.store(chosen + row, tl.load(own + label) * scale)
    tl.store(largest + row, top)
    tl.store(total + row, whole)
    if moment is not None:
        tl.store(moment + row, weighted)


@triton.jit(do_not_specialize=("start",))
def slopes_part(
    logits,
    slopes,
    place,
    largest,
    total,
    start,
    columns,
    stride,
    scale,
    COLUMNS: tl.constexpr,
):
    """softmax - onehot of a part of a row; slopes: [R, c], contiguous, may be the logits."""
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    value = tl.load(logits + row.to(tl.int64) * stride + column, mask=inside, other=0.0) * scale
    value = tl.exp(value - tl.load(largest + row)) / tl.load(total + row)
    value = tl.where(column == tl.load(place + row) - start, value - 1.0, value)
    tl.store(slopes + row.to(tl.int64) * columns + column, value.to(slopes.dtype.element_ty), mask=inside)


def absorb(values: torch.Tensor, place: torch.Tensor, start: int, temperature: float, found) -> None:
    """umer1.ops.linear_softmax_torch.absorb; leaves the values as they are."""
    rows, columns = values.shape
    if rows:
        with torch.cuda.device_of(values):  # Triton launches on the current device
            absorb_row[(rows,)](
                values,
                place,
                found.largest,
                found.total,
                found.chosen,
                found.moment,
                start,
                columns,
                values.stride(0),
                1.0 / temperature,
                COLUMNS=COLUMNS,
                **OPTIONS,
            )


def slopes(
    values: torch.Tensor,
    place: torch.Tensor,
    start: int,
    temperature: float,
    found,
    dtype: torch.dtype,
    relative_to: torch.Tensor | None,
) -> torch.Tensor:
    """umer1.ops.linear_softmax_torch.slopes; `relative_to` is not used, for `absorb` leaves logits."""
    rows, columns = values.shape
    made = torch.empty(rows, columns, dtype=dtype, device=values.device)
    if rows:
        with torch.cuda.device_of(values):
            slopes_part[(rows, triton.cdiv(columns, COLUMNS))](
                values,
                made,
                place,
                found.largest,
                found.total,
                start,
                columns,
                values.stride(0),
                1.0 / temperature,
                COLUMNS=COLUMNS,
                **OPTIONS,
            )
    return made


def variants(arch: int) -> list[Variant]:
    """With entropy, and slopes of bf16, whatever the GPU."""
    floats = dict.fromkeys(("logits", "largest", "total", "chosen", "moment"), "*fp32")
    types = floats | dict.fromkeys(("start", "columns", "stride"), "i32")
    types |= {"place": "*i64", "slopes": "*bf16", "scale": "fp32"}

    def variant(kernel) -> Variant:
        arguments = [name for name in kernel.arg_names if name != "COLUMNS"]
        return Variant(
            name=f"linear_softmax {kernel.__name__}",
            kernel=kernel,
            types={name: types[name] for name in arguments},
            constexprs={"COLUMNS": COLUMNS},
            divisible_by_16=tuple(name for name in arguments if name not in ("start", "scale")),
            options=OPTIONS,
        )

    return [variant(absorb_row), variant(slopes_part)]
