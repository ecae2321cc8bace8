"""THE read-out rule: which row is an embedding and what is done to it; all that reads embeddings calls this."""

import torch

from umer1.ops.gather_hidden import gather_hidden


def read_embedding(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Embeddings at token rows: fp32 [S, H], L2-normalised.

    `hidden` [T, H] are last-layer states after the final norm, `rows` int64 [S], of which there may be none.  fp32: at
    temperature 0.02 a bf16 cosine is off by up to 0.2 in the logits.
    """
    if rows.numel() == 0:
        return hidden[:0].float()
    return gather_hidden(hidden, rows, l2_normalize=True).float()


def last_index(ids: torch.Tensor, token_id: int) -> int:
    """Position of the last `token_id` in `ids` [L]; -1 when there is none."""
    found = (ids == token_id).nonzero()
    return int(found[-1]) if found.numel() else -1
