"""Rows of hidden states at given positions, normalised on the way if asked: only the rows that are read are normed."""

import torch

from umer1.device import has_cuda, synchronize
from umer1.ops import gather_hidden_compiled, gather_hidden_torch
from umer1.ops.dispatch import Impl, choose
from umer1.ops.extension import extension_obstacle, take_bad_index
from umer1.ops.gather_hidden_torch import Gather

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gather_hidden(
    hidden: torch.Tensor,
    index: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    l2_normalize: bool = False,
    offset: int = 0,
    total: int | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Rows [N, H] of `hidden` at `index`, differentiable once in `hidden` and `norm_weight`.

    hidden: [T, H] or [S, B, H], any strides (fp16, bf16, fp32, fp64).  index: int64 [N] on the same device; row s, b of
    [S, B, H] is s * B + b.  Rows may be asked for in any order and any number of times.
    norm_weight: [H] of hidden's dtype or None.  With it, rows pass through RMSNorm as transformers has it for Qwen2:
    x * rsqrt(mean(x^2) + eps) in fp32, rounded to hidden's dtype, times norm_weight, rounded again.
    l2_normalize: rows / max(||row||_2, 1e-12), in fp32 and returned so: torch.nn.functional.normalize(rows.float()).
    For fp64 all of it is fp64.  The result has hidden's dtype, or with l2_normalize fp32 (fp64 for fp64).
    offset, total: for sequence parallelism, where this rank holds rows [offset, offset + T) of `total`, and T may be 0.
    index then counts over all ranks' rows; those held elsewhere come out as zeros, to be SUMMED over the group by the
    caller, and bring no gradient here.  Without them all legal rows are here.

    impl: "cuda" (csrc; CUDA tensors), "torch", or "auto", which on CPU tensors takes the compiled C++ form where it has
    been built.  The compiled backward has no atomics: equal indices are added in a fixed order, in fp32.

    Errors: ValueError for shapes, dtypes and devices that do not fit and for an empty `hidden` or `index`; UserError
    for an `impl` that cannot run.  An index outside [0, total) (negative ones too) is an IndexError: on the CPU at once
    (a RuntimeError from within torch.compile; impl "torch" there: a row of NaN); on CUDA, where looking would make the
    host wait, the row comes out as NaN, the context lives on, and the next gather_hidden that finds it done, or
    `check_gathers()`, raises (impl "torch" on CUDA: NaN alone).
    """
    _check(hidden, index, norm_weight, eps, offset, total)
    chosen = _implementation(hidden.device, impl)
    rows = hidden.shape[:-1].numel()
    total = rows if total is None else total
    looked_at = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at:
        _check_values(index, total)
    gather = Gather(
        hidden=hidden if hidden.dim() == 3 else hidden[:, None],
        index=index,
        norm_weight=norm_weight,
        eps=eps,
        l2_normalize=l2_normalize,
        offset=offset,
        total=total,
        all_here=looked_at and total == rows,
    )
    if chosen == "torch":
        return gather_hidden_torch.gather_rows(gather)
    if chosen == "cuda":
        _raise_bad_index()
    return gather_hidden_compiled.gather_rows(gather)


def gather_hidden_at(
    hidden: torch.Tensor,
    token_ids: torch.Tensor,
    token_id: int,
    *,
    max_rows: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    l2_normalize: bool = False,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of `hidden` [T, H] or [S, B, H] where `token_ids` (int64 [T] or [S, B]) is `token_id`, in rising order.

    Positions are found on the device and the host never waits, so the number of rows is fixed: (rows [max_rows, H],
    positions int64 [max_rows], count int64 []).  count is how many there are; where it is below max_rows, the rows left
    over are zeros at position -1, and where it is above, those after the first max_rows are not in the result, which
    the caller may check when it next waits for the device.  The rest is as in gather_hidden.
    """
    if token_ids.shape != hidden.shape[:-1] or token_ids.dtype != torch.int64:
        raise ValueError(
            f"token_ids is {token_ids.dtype} {tuple(token_ids.shape)}; expected int64 {tuple(hidden.shape[:-1])}, "
            "one id for each row of hidden"
        )
    if max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be 1 or above")
    positions, count = find_rows(token_ids, token_id, max_rows)
    # One index past the last row is legal and held by nobody: a row of zeros.
    num_rows = token_ids.numel()
    index = torch.where(positions < 0, num_rows, positions)
    rows = gather_hidden(
        hidden,
        index,
        norm_weight=norm_weight,
        eps=eps,
        l2_normalize=l2_normalize,
        total=num_rows + 1,
        impl=impl,
    )
    return rows, positions, count


def find_rows(token_ids: torch.Tensor, token_id: int, max_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions int64 [max_rows] of `token_id` in the flattened ids, -1 after the last; count int64 [])."""
    found = token_ids.flatten() == token_id
    number = found.cumsum(0)
    slots = torch.where(found & (number <= max_rows), number - 1, max_rows)
    positions = token_ids.new_full((max_rows + 1,), -1)
    # What is not found, or has no room, goes to the last slot, which is cut off.
    positions.scatter_(0, slots, torch.arange(len(found), device=token_ids.device))
    return positions[:max_rows], found.sum()


def check_gathers() -> None:
    """Wait for the device and raise IndexError if a gather on CUDA met an index out of range since the last check."""
    if has_cuda():
        synchronize()
        _raise_bad_index()


@torch.compiler.assume_constant_result
def _implementation(device: torch.device, impl: str) -> str:
    """ "torch", "cuda" or "cpp"; torch.compile takes the answer as a constant."""
    compiled = extension_obstacle(device)
    obstacles = {"cuda": compiled if device.type == "cuda" else f"the tensors are on {device.type}"}
    if impl == "auto" and device.type == "cpu":
        obstacles["cpp"] = compiled
    chosen = choose("gather_hidden", impl, {**obstacles, "torch": None})
    if chosen != "torch":
        gather_hidden_compiled.register()
    return chosen


def _raise_bad_index() -> None:
    bad = None if torch.compiler.is_compiling() else take_bad_index()
    if bad is not None:
        raise IndexError(
            f"an earlier gather_hidden on CUDA was given index {bad[0]}, out of range [0, {bad[1]}); "
            "its row came out as NaN"
        )


def _check(hidden, index, norm_weight, eps, offset, total) -> None:
    if hidden.dim() not in (2, 3) or hidden.numel() == 0 and (total is None or hidden.shape[-1] == 0):
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}; expected [T, H] or [S, B, H], none of them 0")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden is {hidden.dtype}; use one of {', '.join(map(str, DTYPES))}")
    if index.dim() != 1 or index.dtype != torch.int64 or index.numel() == 0:
        raise ValueError(f"index is {index.dtype} {tuple(index.shape)}; expected int64 [N] with N of 1 or above")
    if index.device != hidden.device:
        raise ValueError(f"index is on {index.device}, hidden on {hidden.device}; they must be on the same device")
    if norm_weight is not None:
        expected = (hidden.shape[-1],), hidden.dtype, hidden.device
        if (tuple(norm_weight.shape), norm_weight.dtype, norm_weight.device) != expected:
            raise ValueError(
                f"norm_weight is {norm_weight.dtype} {tuple(norm_weight.shape)} on {norm_weight.device}; expected "
                f"{hidden.dtype} {expected[0]} on {hidden.device}, as hidden"
            )
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps={eps} must be 0 or above and finite, e.g. 1e-6")
    rows = hidden.shape[:-1].numel()
    if offset < 0 or (total is None and offset) or (total is not None and total < offset + rows):
        raise ValueError(
            f"offset={offset} and total={total} do not hold the {rows} rows of hidden; give both, with "
            "0 <= offset and offset + rows <= total"
        )


def _check_values(index: torch.Tensor, total: int) -> None:
    low, high = (int(value) for value in index.aminmax())
    if low < 0 or high >= total:
        bad = low if low < 0 else high
        raise IndexError(f"index {bad} is out of range: gather_hidden has rows 0 to {total - 1}")
