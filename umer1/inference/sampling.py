"""From logits to the next token, so that a sample depends on its seed, its input and its number alone.

The random number of a step is a hash of (seed, input id, sample number, step), not the state of a generator: which
other sequences share the batch, how many ranks run, and when a sequence is dropped change nothing.
"""

import hashlib

import numpy as np
import torch


def sample_key(seed: int, input_id: str, sample: int) -> int:
    """64-bit key of one sampled response."""
    text = f"{seed}\0{input_id}\0{sample}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniform(keys: np.ndarray, step: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [N], of `keys` uint64 [N] at a step (splitmix64's output function)."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what is meant
        x = keys + np.uint64(step + 1) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choose(logits: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor, top_p: float) -> torch.Tensor:
    """Next tokens int64 [N].

    `logits` float32 [N, V]; `temperatures` float32 [N], where 0 takes the likeliest token (the first one of equals);
    `uniforms` float64 [N] in [0, 1) picks by the inverse of the cumulative distribution.  `top_p` < 1 keeps the
    likeliest tokens whose mass reaches it.
    """
    greedy = logits.argmax(dim=-1)
    sampled = temperatures > 0
    if not sampled.any():
        return greedy
    rows = logits[sampled] / temperatures[sampled, None]
    # fp64: over a large vocabulary an fp32 running sum loses the tail.
    mass = torch.softmax(rows.double(), dim=-1)
    if top_p < 1.0:
        ordered, order = mass.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p
        mass = mass.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    cumulative = mass.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Below the total, so that the first entry beyond the target always is a token of positive mass.
    target = torch.minimum(uniforms[sampled, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    result = greedy.clone()
    result[sampled] = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return result
