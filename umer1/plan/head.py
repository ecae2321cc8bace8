"""The vocabulary's head in bytes: cross-entropy from hidden rows, one block of logits at a time.

The arithmetic of umer1.ops.linear_softmax: logits in fp32 by blocks of columns; where all of them are one block the
gradients are made in the forward and kept, else they are made in the backward.
"""

from dataclasses import dataclass

import torch

from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.ops.linear_softmax import LEAST_COLUMNS, default_block_bytes


@dataclass(frozen=True, slots=True)
class HeadBytes:
    """Of one micro-batch with R rows on one rank of the last stage."""

    rows: int
    """The chosen rows, kept for the backward."""
    forward: int
    """Most that the forward takes, what it keeps included."""
    kept: int
    """Gradients that the forward leaves behind."""
    backward: int
    """Most that the backward takes beside `kept`, its results included."""
    weight_gradient: int
    """The gradient of the head's weight, which stays until the weight's other use (tied embeddings) has its own."""


def head_bytes(
    config: Qwen2VLConfig, rows: int, *, tp: int, itemsize: int, device: str, logprobs: bool = False
) -> HeadBytes:
    """device: "cuda" or "cpu"; on CPU bf16 operands are turned into fp32 copies.

    logprobs: linear_logprobs, which always makes its gradients in the backward; linear_cross_entropy else.
    """
    h, columns = config.hidden_size, config.padded_vocab_size(tp) // tp
    a, limit = itemsize, default_block_bytes(torch.device(device))

    def width(bytes_of_column: int) -> int:
        return min(columns, max(limit // max(bytes_of_column, 1), LEAST_COLUMNS))

    upcast = 4 if device == "cpu" and a < 4 else 0
    weight, row_bytes = columns * h * a, rows * h * a
    forward_width, block = width(4 * rows), width(4 * max(rows, h))
    forward = 4 * rows * forward_width + upcast * (rows + forward_width) * h
    # Both gradients, the rows times their factors, and the two products one after the other.
    products = max(upcast * block * h + 4 * rows * h, 4 * block * h)
    rounded = rows * block * a if a < 4 and device == "cuda" else 0
    making = 4 * rows * h + rows * h * (a if device == "cuda" else 4) + weight + rounded
    if rows * columns * 4 <= limit and not logprobs:
        kept = weight + row_bytes
        return HeadBytes(row_bytes, max(forward, 4 * rows * columns + making + products), kept, kept, weight)
    return HeadBytes(
        row_bytes, forward, 0, making + 4 * rows * block + max(products, upcast * (rows + block) * h), weight
    )
