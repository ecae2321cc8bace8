"""Next-token cross-entropy on supervised rows, vocab-parallel, with one explicit denominator for each side."""

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def cross_entropy_sums(logits: torch.Tensor, labels: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
    """Sums of next-token cross-entropy by side; nothing is divided here.

    logits: [R, V / tp] vocab-parallel, the supervised rows alone; labels: int64 [R] in the whole vocabulary;
    sides: int64 [R], 0 for the query's rows and 1 for the positive's.  Returns fp32 [2].  The caller divides by the
    number of supervised tokens of that side in the global batch (METHOD: L_ce), a count it must reduce on its own:
    InfoNCE divides by pairs.
    """
    sums = logits.new_zeros(2, dtype=torch.float32)
    if labels.numel() == 0:
        return sums + logits.float().sum() * 0.0  # keeps the graph: a micro-batch without supervised rows has grad 0
    losses = vocab_parallel_cross_entropy(logits.float().unsqueeze(1), labels.unsqueeze(1)).squeeze(1)
    return sums.index_add(0, sides, losses.float())
