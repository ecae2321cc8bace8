"""Rewards in which a random model's responses differ."""

import torch


def letters(inputs) -> torch.Tensor:
    """The share of small letters."""
    return torch.tensor([sum(c.islower() for c in text) / (1 + len(text)) for text in inputs.responses])


def an_e(inputs) -> torch.Tensor:
    """Whether there is an e: often the same for a whole group."""
    return torch.tensor([float("e" in text) for text in inputs.responses])
