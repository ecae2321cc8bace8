"""THE read-out rule: which row is an embedding and what is done to it; all that reads embeddings calls this."""

from typing import Literal

import torch
import torch.nn.functional as F

MissingGenEmb = Literal["append", "disc", "error"]
"""What to do with a response that has no <gen_emb>: close it with one and read there, read <disc_emb>, or stop."""


def read_embedding(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Embeddings at token rows: fp32 [S, H], L2-normalised.

    `hidden` [T, H] are last-layer states after the final norm, `rows` int64 [S].  fp32: at temperature 0.02 a bf16
    cosine is off by up to 0.2 in the logits.
    """
    return F.normalize(hidden.index_select(0, rows).float(), dim=-1)


def last_index(ids: torch.Tensor, token_id: int) -> int:
    """Position of the last `token_id` in `ids` [L]; -1 when there is none."""
    found = (ids == token_id).nonzero()
    return int(found[-1]) if found.numel() else -1
