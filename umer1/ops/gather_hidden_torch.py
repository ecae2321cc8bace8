"""Gather of hidden states in plain torch: the reference of the compiled form and what runs where that cannot."""

import torch
import torch.nn.functional as F


def gather_rows(
    hidden: torch.Tensor,
    index: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    l2_normalize: bool,
    offset: int,
    total: int,
) -> torch.Tensor:
    """hidden [S, B, H], index int64 [N]: rows [N, H], see umer1.ops.gather_hidden.

    An index out of range gives a row of NaN.  torch's own indexing would end the CUDA context there.
    """
    hidden = hidden.flatten(0, 1)
    local = index - offset
    here = (local >= 0) & (local < len(hidden))
    if len(hidden) == 0:
        rows = hidden.new_zeros(len(index), hidden.shape[1]) + hidden.sum()
    else:
        rows = hidden.index_select(0, torch.where(here, local, 0))
    # Twice: what a row that is not here would be must reach neither the result nor, times 0, the gradient.
    rows = torch.where(here[:, None], rows, 0)
    rows = normalize_rows(rows, norm_weight, eps, l2_normalize)
    legal = (index >= 0) & (index < total)
    return torch.where(here[:, None], rows, torch.where(legal, 0.0, torch.nan).to(rows.dtype)[:, None])


def normalize_rows(
    rows: torch.Tensor, norm_weight: torch.Tensor | None, eps: float, l2_normalize: bool
) -> torch.Tensor:
    """RMSNorm as transformers computes it for Qwen2, then L2 normalisation in fp32 (fp64 for fp64); rows [N, H]."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if norm_weight is not None:
        values = rows.to(wide)
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
        rows = norm_weight * values.to(rows.dtype)
    return F.normalize(rows.to(wide), dim=-1) if l2_normalize else rows
