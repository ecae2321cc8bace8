"""Next-token cross-entropy on supervised rows, vocab-parallel, with one explicit denominator for each side."""

import torch
import torch.distributed as dist

from umer1.ops.linear_cross_entropy import linear_cross_entropy


def cross_entropy_sums(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    sides: torch.Tensor,
    side_weights: torch.Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over the sides of weight * sum of cross-entropy, to run backward from; fp32 [2] sums by side, detached).

    hidden: [R, H], the supervised rows alone, R may be 0; weight: [V_local, H] of the head; labels: int64 [R] in the
    whole vocabulary; sides: int64 [R], 0 for the query's rows and 1 for the positive's.  vocab_size, group: see
    linear_cross_entropy.
    side_weights: [2]; the loss's weight over the number of supervised tokens of that side in the global batch
    (docs/method.md, 4), a count that the caller must reduce on its own: InfoNCE divides by pairs.
    """
    total, losses = linear_cross_entropy(
        hidden, weight, labels, row_weights=side_weights[sides], vocab_size=vocab_size, group=group
    )
    return total, losses.new_zeros(2).index_add(0, sides, losses).float()
