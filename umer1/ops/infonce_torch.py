"""InfoNCE on one block of rows against one block of columns, in plain torch: logits exist one tile at a time.

`sweep` and `gradients` are the block interface: every implementation offers both with these signatures, and what
stands above them (one process, gathered columns, a ring) combines blocks without knowing which one ran.

With logits s_ij = q_i . c_j / t, entry (i, j) takes part unless both sides have ids, the ids are equal and j is not
row i's label.  Row log-sum-exps r_i run over all columns of all blocks; column log-sum-exps x_j over the rows of all
ranks, for columns of symmetric blocks.  With w_j the number of rows whose label is column j, both directions' losses

    sum_i (r_i - s_i,label(i)) + sum_j w_j x_j - sum_i s_i,label(i)

have d / d s_ij = exp(s_ij - r_i) + w_j exp(s_ij - x_j) - 2 [j = label(i)], so that one sweep over s gives every sum and
a second one every gradient: 4 matrix products for both directions, 3 for tiles that are kept in between.
"""

from typing import NamedTuple

import torch

CPU_TILE = 1024  # rows and columns of a tile: 4 MiB of fp32 logits stay in a core's share of the caches
CUDA_TILE = 8192  # 256 MiB of fp32 logits: enough work for each launch


class Partials(NamedTuple):
    """What a sweep leaves of a block [B, C]; fp32 (fp64 for fp64 inputs), natural logarithms and exponentials.

    An empty set of entries has maximum -inf and sum 0.  NaN in a row or column makes its sum NaN, +inf likewise.
    """

    row_max: torch.Tensor  # [B] largest logit that takes part, the positive's included
    row_sum: torch.Tensor  # [B] sum of exp(logit - row_max)
    column_max: torch.Tensor | None  # [C] largest logit that takes part; None for a block that is not symmetric
    column_sum: torch.Tensor | None  # [C] sum of exp(logit - column_max)
    positive: torch.Tensor  # [B] logit at the row's label; 0 where the label is in another block
    row_best_other: torch.Tensor  # [B] largest logit that takes part and is not the positive
    negative_sum: torch.Tensor | None  # [B] sum of the logits that row_best_other is the largest of; None unless asked
    negative_count: torch.Tensor | None  # [B] their number


class Kept:
    """Tiles of logits that `sweep` leaves for `gradients`, as long as bytes are left; an implementation may ignore it."""

    def __init__(self, budget: int):
        self.budget = budget
        self.tiles: dict[tuple[int, int], torch.Tensor] = {}

    def reserve(self, count: int, like: torch.Tensor) -> bool:
        """Whether `count` more elements may be kept; they are then counted."""
        size = count * like.element_size()
        if size > self.budget:
            return False
        self.budget -= size
        return True


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of logits, sums and gradients' accumulators."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(max_a, sum_a, max_b, sum_b) -> tuple[torch.Tensor, torch.Tensor]:
    """(maximum, sum of exp(logit - maximum)) of two sets of entries together, either of which may be empty."""
    largest = torch.maximum(max_a, max_b)
    shift = _finite_shift(largest)
    return largest, sum_a * torch.exp(max_a - shift) + sum_b * torch.exp(max_b - shift)


def _finite_shift(maximum: torch.Tensor) -> torch.Tensor:
    """The maximum to subtract: an empty set's -inf would make exp(-inf - -inf) NaN, where 0 is meant."""
    return maximum.clamp_min(torch.finfo(maximum.dtype).min)


def sweep(
    query: torch.Tensor,
    columns: torch.Tensor,
    labels: torch.Tensor | None,
    temperature: float | torch.Tensor,
    row_ids: torch.Tensor | None,
    column_ids: torch.Tensor | None,
    *,
    symmetric: bool,
    statistics: bool = False,
    kept: Kept | None = None,
) -> Partials:
    """Maxima, sums of exponentials and positives of the block's logits.

    query: [B, D], columns: [C, D], both fp16, bf16, fp32 or fp64 (one dtype); B and C may be 0; rows of any stride.
    labels: int64 [B], column of each row's positive; any value outside of [0, C) says that it is in another block.
        None: no row's positive is in this block.
    temperature: above 0, or a 0-dim fp32 (fp64) tensor on the same device (never read on the host for CUDA).
    row_ids, column_ids: int64 [B] and [C], or None both: entries of equal ids take no part unless they are positives.
    symmetric: the columns' direction is wanted (keys; not so for hard negatives).
    statistics: negative_sum and negative_count are wanted.
    kept: filled with what `gradients` may take over.
    """
    raise NotImplementedError


def gradients(
    query: torch.Tensor,
    columns: torch.Tensor,
    labels: torch.Tensor | None,
    temperature: float | torch.Tensor,
    row_ids: torch.Tensor | None,
    column_ids: torch.Tensor | None,
    *,
    row_lse: torch.Tensor,
    column_lse: torch.Tensor | None,
    positive_gradient: torch.Tensor | None,
    weight: float,
    grad_query: torch.Tensor,
    grad_columns: torch.Tensor,
    kept: Kept | None = None,
) -> None:
    """Add this block's part of d (weight * sum of losses) / d query and / d columns to the accumulators.

    The first six arguments and `kept` are those of `sweep`.
    row_lse: [B], r_i over all blocks, fp32 (fp64).
    column_lse: [C], x_j - log(w_j) over the rows of all ranks, +inf where w_j = 0, so that exp(s_ij - column_lse_j) is
        the whole second term; None for a block that is not symmetric.
    positive_gradient: [B], what stands at the label in place of the formula, `exp(..) + exp(..) - 2`: there the 1s
        cancel, and the caller has them accurately (expm1 of the maximum and the sum's logarithm apart).  It is used
        where the label is in this block; None with labels None.
    weight: multiplies every gradient, positive_gradient's too; 1 / (2 G) for the mean over G pairs and both directions.
    grad_query [B, D], grad_columns [C, D]: contiguous fp32 (fp64), added to; weight / t is included.

    d loss / d log(1/t) is no output: it equals sum_i <q_i, d loss / d q_i> over all columns, since q enters as q/t.
    """
    raise NotImplementedError
