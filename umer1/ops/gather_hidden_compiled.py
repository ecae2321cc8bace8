"""Gather of hidden states by the compiled operators (csrc/gather_hidden.*): what autograd and torch.compile must know.

torch.ops.umer1.gather_rows gives the rows and, on request, the raw rows that the backward needs: N of them are kept,
not all T.  torch.ops.umer1.scatter_rows takes the gradients in the order of a stable sort of the index, adds up those
of equal indices and applies the norms' derivative once to each sum, all in a fixed order.
"""

from functools import cache

import torch

from umer1.ops.extension import load_extension
from umer1.ops.gather_hidden_torch import Gather


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gather_fake(hidden, index, norm_weight, eps, l2_normalize, keep_rows, offset, total):
    shape = (index.shape[0], hidden.shape[2])
    rows = hidden.new_empty(shape, dtype=_wide(hidden.dtype) if l2_normalize else hidden.dtype)
    return rows, hidden.new_empty(shape if keep_rows else (0, hidden.shape[2]))


def _scatter_fake(grad, rows, sorted_index, order, norm_weight, eps, l2_normalize, steps, batch, offset):
    columns = grad.shape[1]
    weight_gradient = rows.new_empty(0 if norm_weight is None else columns, dtype=_wide(rows.dtype))
    return rows.new_empty(steps, batch, columns), weight_gradient


def _setup_context(ctx, inputs, output):
    hidden, index, norm_weight, ctx.eps, ctx.l2_normalize, _, ctx.offset, _ = inputs
    rows = output[1]
    ctx.mark_non_differentiable(rows)
    ctx.set_materialize_grads(False)
    ctx.steps, ctx.batch = hidden.shape[:2]
    ctx.save_for_backward(index, norm_weight, rows)


def _backward(ctx, gradient, _rows_gradient):
    index, norm_weight, rows = ctx.saved_tensors
    if gradient is None:
        return (None,) * 8
    sorted_index, order = torch.sort(index, stable=True)
    hidden_gradient, weight_gradient = torch.ops.umer1.scatter_rows(
        gradient.contiguous(),
        rows,
        sorted_index,
        order,
        norm_weight,
        ctx.eps,
        ctx.l2_normalize,
        ctx.steps,
        ctx.batch,
        ctx.offset,
    )
    weight_gradient = None if norm_weight is None else weight_gradient.to(norm_weight.dtype)
    return hidden_gradient, None, weight_gradient, None, None, None, None, None


@cache
def register() -> None:
    """Load the extension and tell torch its operators' shapes and derivative."""
    missing = load_extension()
    if missing:
        raise RuntimeError(missing)
    torch.library.register_fake("umer1::gather_rows", _gather_fake)
    torch.library.register_fake("umer1::scatter_rows", _scatter_fake)
    torch.library.register_autograd("umer1::gather_rows", _backward, setup_context=_setup_context)


def gather_rows(gather: Gather) -> torch.Tensor:
    """Rows [N, H], see umer1.ops.gather_hidden.  `register()` has been called."""
    hidden, norm_weight = gather.hidden, gather.norm_weight
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    if norm_weight is not None:
        norm_weight = norm_weight.contiguous()
    inputs = [hidden] if norm_weight is None else [hidden, norm_weight]
    normalized = norm_weight is not None or gather.l2_normalize
    keep_rows = normalized and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return torch.ops.umer1.gather_rows(
        hidden,
        gather.index.contiguous(),
        norm_weight,
        gather.eps,
        gather.l2_normalize,
        keep_rows,
        gather.offset,
        gather.total,
    )[0]
