"""The vocabulary's projection, by logits or by an operation that makes its own from the weight."""

from collections.abc import Callable

import umer1.megatron_import  # noqa: F401

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear


class VocabularyHead(ColumnParallelLinear):
    """megatron's layer, [R, H] -> ([R, V_padded / tp], bias)."""

    def forward(self, rows: torch.Tensor, weight: torch.Tensor | None = None, *, operation: Callable | None = None):
        """operation: called as operation(rows, weight [V_padded / tp, H]) in place of the product; its result.

        The weight is read in here and not by the caller, for megatron's overlapped gather of updated weights waits for
        them in a hook of this module's forward.
        """
        if operation is None:
            return super().forward(rows, weight=weight)
        return operation(rows, self.weight if weight is None else weight)
