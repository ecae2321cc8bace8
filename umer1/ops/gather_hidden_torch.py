"""Gather of hidden states in plain torch: the reference of the compiled form and what runs where that cannot."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Gather(NamedTuple):
    """What either form is asked for; umer1.ops.gather_hidden says what it means, and has checked it."""

    hidden: torch.Tensor  # [S, B, H]
    index: torch.Tensor  # int64 [N]
    norm_weight: torch.Tensor | None  # [H]
    eps: float
    l2_normalize: bool
    offset: int
    total: int
    all_here: bool  # every index is known to be one of hidden's rows


def gather_rows(gather: Gather) -> torch.Tensor:
    """Rows [N, H], see umer1.ops.gather_hidden.

    An index out of range gives a row of NaN.  torch's own indexing would end the CUDA context there.
    """
    hidden, index = gather.hidden.flatten(0, 1), gather.index
    if gather.all_here:
        return normalize_rows(hidden.index_select(0, index), gather)
    local = index - gather.offset
    here = (local >= 0) & (local < len(hidden))
    if len(hidden) == 0:
        rows = hidden.new_zeros(len(index), hidden.shape[1]) + hidden.sum()
    else:
        rows = hidden.index_select(0, torch.where(here, local, 0))
    # Twice: what a row that is not here would be must reach neither the result nor, times 0, the gradient.
    rows = normalize_rows(torch.where(here[:, None], rows, 0), gather)
    legal = (index >= 0) & (index < gather.total)
    return torch.where(here[:, None], rows, torch.where(legal, 0.0, torch.nan).to(rows.dtype)[:, None])


def normalize_rows(rows: torch.Tensor, gather: Gather) -> torch.Tensor:
    """RMSNorm as transformers computes it for Qwen2, then L2 normalisation in fp32 (fp64 for fp64); rows [N, H]."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if gather.norm_weight is not None:
        values = rows.to(wide)
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + gather.eps)
        rows = gather.norm_weight * values.to(rows.dtype)
    return F.normalize(rows.to(wide), dim=-1) if gather.l2_normalize else rows
