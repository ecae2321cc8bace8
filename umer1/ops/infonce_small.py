"""Symmetric InfoNCE of few pairs without options, where the number of calls and not the arithmetic is the time.

The formula of infonce_torch.py on all logits at once, as plain torch would have them, but with the products in fp32 and
the gradient made in the forward: on a GPU 23 launches for 16-bit embeddings, where plain torch takes 24.
"""

import torch

from umer1.ops import infonce_torch
from umer1.ops.infonce_share import Problem, Share, log_scale_gradient
from umer1.ops.infonce_torch import logits_of, operand, scale_of

CUDA_PAIRS = 2048  # 16 MiB of fp32 logits, read from the L2; on a CPU one tile of the general form


def is_small(query: torch.Tensor, key: torch.Tensor, *, plain: bool) -> bool:
    """plain: every row's label is its own number, with neither negatives, ids, statistics nor other ranks."""
    limit = infonce_torch.CPU_TILE if query.device.type == "cpu" else CUDA_PAIRS
    return plain and len(query) == len(key) and 0 < len(query) <= limit


def small_share(problem: Problem) -> Share:
    """What infonce_share.local_share gives, of a small problem."""
    query, key = operand(problem.query), operand(problem.key)
    scale = scale_of(problem.temperature)
    logits = logits_of(query, key, scale, query.new_empty(len(query), len(key), dtype=problem.dtype))
    by_row, by_column = torch.log_softmax(logits, 1), torch.log_softmax(logits, 0)
    positive = torch.stack([by_row.diagonal(), by_column.diagonal()])
    share = Share(-positive.sum(), None)
    if problem.with_gradients:
        at_positive = torch.expm1(positive).sum(0)
        gradient = by_row.exp_().add_(by_column.exp_())
        factor = scale * problem.weight
        if isinstance(factor, torch.Tensor):
            gradient, at_positive, factor = gradient.mul_(factor), at_positive.mul_(factor), 1.0
        share.query, share.key = _products(gradient, at_positive, query, key, factor)
        share.negatives = problem.negatives.new_zeros(problem.negatives.shape, dtype=problem.dtype)
        share.log_scale = log_scale_gradient(problem, share.query)
    return share


def _products(gradient, at_positive, query, key, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """factor * (gradient @ key, gradient^T @ query) with `at_positive` [B] on the diagonal; `gradient` is overwritten.

    In 16-bit products the diagonal stays fp32: it weighs most, and rounded it would be most of the error.
    """
    if gradient.dtype == query.dtype:
        gradient.diagonal().copy_(at_positive)
        empty = query.new_empty(())
        products = ((gradient, key), (gradient.T, query))
        return tuple(torch.addmm(empty, left, right, beta=0, alpha=factor) for left, right in products)
    slopes = gradient.fill_diagonal_(0.0).to(query.dtype)
    at_positive = (at_positive * factor)[:, None]
    products = ((at_positive * key, slopes, key), (at_positive * query, slopes.T, query))
    return tuple(
        torch.addmm(here, left, right, out_dtype=here.dtype, alpha=factor, out=here) for here, left, right in products
    )
