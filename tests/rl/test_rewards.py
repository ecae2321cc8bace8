"""Rewards against plain Python written from docs/method.md, 5, ties included, and hand-computed literals."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from umer1.ops.rank_margin_reward import rank_margin_reward
from umer1.rl.rewards import REWARDS, RewardInputs, format_reward, threshold_share

CASES = 1000


def reward_by_hand(query, target, size, query_valid=None, target_valid=None, ids=None):
    """One rollout at a time, ranks by sorting a list: [(reward, ranking, margin)]."""
    count = len(query)
    everyone = [True] * count
    query_valid = everyone if query_valid is None else query_valid
    target_valid = everyone if target_valid is None else target_valid
    ids = list(range(count // size)) if ids is None else ids
    results = []
    for row in range(count):
        pair = row // size
        similarity = [sum(a * b for a, b in zip(query[row], target[column], strict=True)) for column in range(count)]
        columns = [column for column in range(count) if target_valid[column]]
        own = [column for column in columns if column // size == pair]
        other = [column for column in columns if ids[column // size] != ids[pair]]
        if not query_valid[row] or not own:
            results.append((0.0, 0.0, 0.0))
            continue
        ordered = sorted(own + other, key=lambda column: (-similarity[column], column))
        ranking = len(set(ordered[: len(own)]) & set(own)) / len(own)
        margin = sum(similarity[column] for column in own) / len(own)
        if other:
            margin -= sum(similarity[column] for column in other) / len(other)
        results.append((ranking * margin, ranking, margin))
    return np.array(results).T


def embeddings(rng: np.random.Generator, rows: int, kind: str) -> np.ndarray:
    dimension = int(rng.integers(1, 9))
    if kind == "integers":  # similarities are small whole numbers: ties everywhere, within and between groups
        return rng.integers(-1, 2, (2, rows, dimension)).astype(float)
    values = rng.standard_normal((2, rows, dimension))
    if kind == "copies":  # a few vectors again and again, as equal responses have equal embeddings
        values = values[:, rng.integers(0, max(1, rows // 3), rows)]
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


@pytest.mark.parametrize("kind", ["random", "integers", "copies"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_definition(kind, masked):
    rng = np.random.default_rng(21 + masked)
    for number in range(CASES // 4):
        pairs, size = int(rng.integers(1, 6)), int(rng.integers(1, 6))
        query, target = embeddings(rng, pairs * size, kind)
        query_valid = target_valid = ids = None
        if masked:
            query_valid, target_valid = rng.random((2, pairs * size)) < rng.choice([0.3, 0.8, 1.0])
            ids = rng.integers(0, pairs, pairs) if rng.random() < 0.5 else None
        got = rank_margin_reward(
            torch.from_numpy(query),
            torch.from_numpy(target),
            size,
            query_valid=None if query_valid is None else torch.from_numpy(query_valid),
            target_valid=None if target_valid is None else torch.from_numpy(target_valid),
            target_ids=None if ids is None else torch.from_numpy(ids),
        )
        want = reward_by_hand(query, target, size, query_valid, target_valid, ids)
        for name, values, expected in zip(("reward", "ranking", "margin"), got, want, strict=True):
            assert values.dtype == torch.float64
            np.testing.assert_allclose(values.numpy(), expected, rtol=1e-12, atol=1e-14, err_msg=f"{number} {name}")


def test_hand_computed_two_pairs():
    """Pair 0's targets e1 and e2, pair 1's targets e1 and e3; the first query is e1, the others e2, e3, e3."""
    e1, e2, e3 = torch.eye(3, dtype=torch.float64)
    query, target = torch.stack([e1, e2, e3, e3]), torch.stack([e1, e2, e1, e3])
    reward, ranking, margin = rank_margin_reward(query, target, 2)
    # Row 0: similarities 1 0 | 1 0: the two ones are rows 0 and 2, half of the top are its own; margin 1/2 - 1/2.
    # Row 1: 0 1 | 0 0: row 1, then of the zeros the first, row 0: all its own.  Row 3: 0 0 | 0 1: row 3, then row 0.
    assert ranking.tolist() == [0.5, 1.0, 0.5, 0.5]
    assert margin.tolist() == [0.0, 0.5, 0.5, 0.5]
    assert reward.tolist() == [0.0, 0.5, 0.25, 0.25]


def test_all_equal_similarities_rank_by_index():
    """The first pair's targets come first in any tie, so it alone has the top to itself."""
    ones = torch.ones(6, 4)
    reward, ranking, margin = rank_margin_reward(ones, ones, 2)
    assert ranking.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert margin.tolist() == [0.0] * 6 and reward.tolist() == [0.0] * 6 and reward.dtype == torch.float32


def test_fp32_ranks_as_fp64_does():
    """Similarities that only fp64 tells apart: products of fp32 numbers are exact there."""
    query = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    target = torch.tensor([[1.0, 1e-5, 1e-5], [1.0, 1e-5, 1.1e-5]])
    _, ranking, _ = rank_margin_reward(query, target, 1)
    assert ranking.tolist() == [0.0, 1.0]
    tiny = torch.tensor([[1.0, 1e-9, 0.0], [1.0, 2e-9, 0.0]])
    _, ranking, _ = rank_margin_reward(query, tiny, 1)
    assert ranking.tolist() == [0.0, 1.0] and ranking.dtype == torch.float32


def test_the_reward_carries_no_gradient():
    query = torch.randn(4, 3, requires_grad=True)
    assert not any(part.requires_grad for part in rank_margin_reward(query, query, 2))


def test_what_is_not_valid_may_hold_anything():
    rng = np.random.default_rng(5)
    query, target = (torch.from_numpy(part) for part in embeddings(rng, 12, "random"))
    valid = torch.tensor([True, False, True] * 4)
    clean = rank_margin_reward(query, target, 3, query_valid=valid, target_valid=valid)
    query[~valid], target[~valid] = math.nan, math.inf
    dirty = rank_margin_reward(query, target, 3, query_valid=valid, target_valid=valid)
    assert all(torch.equal(got, want) for got, want in zip(dirty, clean, strict=True))


@pytest.mark.parametrize("query,target,size", [((4, 3), (6, 3), 2), ((5, 3), (5, 3), 2), ((4,), (4,), 2)])
def test_wrong_shapes_are_refused(query, target, size):
    with pytest.raises(ValueError):
        rank_margin_reward(torch.zeros(query), torch.zeros(target), size)


@pytest.mark.parametrize(
    "response,reward",
    [
        ("<think>a</think><answer>b<gen_emb>", 1.0),
        ("<think>a\nb</think>\n\n<answer>\nc\n<gen_emb> and more", 1.0),
        ("so: <think>a</think><answer>b<gen_emb>", 0.0),
        ("<think></think><answer><gen_emb>", 1.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think>a<answer>b<gen_emb>", 0.0),
        ("a</think><answer>b<gen_emb>", 0.0),
        ("<think>a</think>b<gen_emb>", 0.0),
        ("<answer>b<gen_emb><think>a</think>", 0.0),
        ("<gen_emb>", 0.0),
        ("", 0.0),
    ],
)
def test_format(response, reward):
    got = format_reward([response, "<think>1</think><answer>2<gen_emb>"])
    assert got.tolist() == [reward, 1.0] and got.dtype == torch.float32


def test_format_of_nothing():
    assert format_reward([]).shape == (0,)


def test_threshold_of_literals():
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    target = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    everyone = torch.ones(4, dtype=torch.bool)
    got = threshold_share(query, target, 2, 0.7, query_valid=everyone, target_valid=everyone)
    assert got.tolist() == [0.5, 0.5, 0.5, 0.5]
    got = threshold_share(query, target, 2, 0.0, query_valid=everyone, target_valid=everyone)
    assert got.tolist() == [1.0] * 4  # "at least"
    some = torch.tensor([True, False, False, False])
    got = threshold_share(query, target, 2, 0.7, query_valid=~some, target_valid=some)
    assert got.tolist() == [0.0, 0.0, 0.0, 0.0]
    got = threshold_share(query, target, 2, 0.7, query_valid=everyone, target_valid=some)
    assert got.tolist() == [1.0, 0.0, 0.0, 0.0]


def make_inputs(**changed) -> RewardInputs:
    rng = np.random.default_rng(8)
    query, target = (torch.from_numpy(part).float() for part in embeddings(rng, 6, "random"))
    values = dict(
        side=0,
        num_generations=2,
        responses=["<think>a</think><answer>b<gen_emb>"] * 6,
        lengths=torch.tensor([0, 1, 2, 5, 10, 10]),
        max_completion_length=10,
        embeddings=query,
        other_embeddings=target,
        valid=torch.tensor([True] * 5 + [False]),
        other_valid=torch.ones(6, dtype=torch.bool),
    )
    values |= changed
    sides = values["embeddings"], values["other_embeddings"]
    valid = dict(query_valid=values["valid"], target_valid=values["other_valid"])
    return RewardInputs(embedding_scores=rank_margin_reward(*sides, values["num_generations"], **valid), **values)


def test_every_term_is_its_definition():
    inputs = make_inputs()
    valid, everyone = inputs.valid, inputs.other_valid
    reward, ranking, margin = rank_margin_reward(
        inputs.embeddings, inputs.other_embeddings, 2, query_valid=valid, target_valid=everyone
    )
    share = threshold_share(
        inputs.embeddings, inputs.other_embeddings, 2, 0.5, query_valid=valid, target_valid=everyone
    )
    want = {
        "format": torch.tensor([1.0] * 5 + [0.0]),  # spelt by other tokens in the last: no <gen_emb>, no reward
        "embedding": reward,
        "ranking": ranking,
        "margin": margin,
        "threshold": share,
        "length": torch.tensor([0.0, -0.1, -0.2, -0.5, -1.0, -1.0]),
    }
    assert want.keys() == REWARDS.keys()
    for name, expected in want.items():
        got = REWARDS[name](inputs)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, msg=name)


def test_inputs_are_frozen():
    inputs = make_inputs()
    with pytest.raises(dataclasses.FrozenInstanceError):
        inputs.side = 1
