"""Sampling against the distribution it claims to draw from."""

import numpy as np
import torch

from umer1.inference.sampling import choose, sample_key, uniform


def test_uniform_numbers_are_uniform_and_belong_to_the_key():
    keys = np.array([sample_key(1, f"input {i}", 0) for i in range(4000)], dtype=np.uint64)
    first, second = uniform(keys, 0), uniform(keys, 1)
    assert ((first >= 0) & (first < 1)).all()
    assert np.abs(np.histogram(first, bins=10)[0] - 400).max() < 100
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert (uniform(keys[[7, 3]], 5) == uniform(keys, 5)[[7, 3]]).all()
    distinct = {sample_key(seed, name, sample) for seed in (0, 1) for name in ("a", "b") for sample in (0, 1)}
    assert len(distinct) == 8


def draw(logits: torch.Tensor, temperature: float, top_p: float = 1.0, count: int = 20000) -> np.ndarray:
    """Frequencies over an evenly spread set of uniform numbers."""
    rows = logits.expand(count, -1)
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = choose(rows, torch.full((count,), temperature), grid, top_p)
    return np.bincount(tokens.numpy(), minlength=logits.numel()) / count


def test_choose_draws_from_the_softmax():
    logits = torch.tensor([0.3, -1.0, 2.0, torch.finfo(torch.float32).min, 0.0])
    for temperature in (0.5, 1.0, 2.0):
        want = torch.softmax(logits.double() / temperature, dim=-1).numpy()
        assert np.abs(draw(logits, temperature) - want).max() < 1e-4
        assert draw(logits, temperature)[3] == 0.0


def test_top_p_keeps_the_head_and_renormalises():
    logits = torch.log(torch.tensor([0.1, 0.5, 0.25, 0.15]))
    assert np.abs(draw(logits, 1.0, top_p=0.7) - np.array([0, 2 / 3, 1 / 3, 0])).max() < 1e-4
    assert draw(logits, 1.0, top_p=0.01)[1] == 1.0


def test_greedy_rows_take_the_first_maximum_beside_sampled_ones():
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    for number, token in ((0.0, 0), (0.5, 1), (1.0 - 2**-53, 2)):
        chosen = choose(logits, torch.tensor([0.0, 1.0]), torch.tensor([0.9, number], dtype=torch.float64), 1.0)
        assert chosen.tolist() == [1, token]
