"""Rewards in plain torch against sorting in fp64: random cases, ties, what is not finite, and what is refused."""

import importlib
import logging
import math
import secrets

import numpy as np
import pytest
import torch
from rank_margin_reference import Case, by_sorting, draw_case

from umer1.errors import UserError
from umer1.ops.rank_margin_reward import RankMargin, rank_margin_reward, rank_margin_rewards

NAMES = ("reward", "ranking", "margin")
NUM_CASES, CASES_A_TEST = 500, 100


def assert_equals_sorting(case: Case, got: RankMargin, rows=None) -> None:
    exact = case.query.dtype == torch.float64
    index = slice(None) if rows is None else list(rows)
    for name, values, want in zip(NAMES, got, by_sorting(case, rows), strict=True):
        assert values.dtype == (torch.float64 if exact else torch.float32), f"{case}: {name}"
        tolerance = 1e-12 if exact else 2.0**-23  # results are rounded once
        np.testing.assert_allclose(
            values.double().numpy()[index], want, rtol=tolerance, atol=tolerance / 100, err_msg=f"{case}: {name}"
        )


@pytest.mark.parametrize("part", range(NUM_CASES // CASES_A_TEST))
def test_random_cases_equal_sorting(part):
    for _ in range(CASES_A_TEST):
        case = draw_case(secrets.randbits(32), 60, 24)
        got, other = rank_margin_rewards(case.query, case.target, case.size, "torch", **case.options)
        assert_equals_sorting(case, got)
        assert_equals_sorting(case.swapped(), other)


@pytest.mark.parametrize(
    "rows,size,dimension", [(4999, 1, 3), (5000, 8, 5), (4995, 3, 2), (2001, 2001, 2), (1, 1, 5000)]
)
def test_large_sets_equal_sorting(rows, size, dimension):
    rng = np.random.default_rng(seed := secrets.randbits(32))
    few = rng.integers(0, rows, (2, rows))  # some stand there more than once
    query, target = (torch.from_numpy(rng.standard_normal((rows, dimension))[index]) for index in few)
    case = Case(seed=seed, kind="copies", size=size, query=query, target=target, options={})
    some = np.unique(rng.integers(0, rows, 40))
    assert_equals_sorting(case, rank_margin_reward(query, target, size, "torch"), some)


def test_hand_computed_two_pairs():
    """Pair 0's targets e1 and e2, pair 1's targets e1 and e3; the first query is e1, the others e2, e3, e3."""
    e1, e2, e3 = torch.eye(3)
    query, target = torch.stack([e1, e2, e3, e3]), torch.stack([e1, e2, e1, e3])
    got = rank_margin_reward(query, target, 2)
    # Row 0: similarities 1 0 | 1 0: the two ones are rows 0 and 2, half of the top are its own; margin 1/2 - 1/2.
    # Row 1: 0 1 | 0 0: row 1, then of the zeros the first, row 0: all its own.  Rows 2, 3: 0 0 | 0 1: row 3, row 0.
    assert got.ranking.tolist() == [0.5, 1.0, 0.5, 0.5]
    assert got.margin.tolist() == [0.0, 0.5, 0.5, 0.5]
    assert got.reward.tolist() == [0.0, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dimension", [3, 17, 129, 1536])
def test_copies_tie_wherever_they_stand_and_whatever_the_chunk(dimension, dtype, monkeypatch):
    """A matrix product gives copies of one row similarities that differ in the last bit: ranking by round-off."""
    generator = torch.Generator().manual_seed(secrets.randbits(32))
    few = torch.nn.functional.normalize(torch.randn(3, dimension, generator=generator, dtype=dtype), dim=-1)
    query, target = few[torch.randint(0, 3, (2, 93), generator=generator)]
    want = by_sorting(Case(seed=0, kind="copies", size=3, query=query, target=target, options={}))
    got = rank_margin_reward(query, target, 3, "torch")
    assert got.ranking.tolist() == pytest.approx(want[1].tolist(), abs=1e-7)
    monkeypatch.setattr(importlib.import_module("umer1.ops.rank_margin_reward"), "CHUNK_ELEMENTS", 7 * len(target))
    chunked = rank_margin_reward(query, target, 3, "torch")
    assert torch.equal(chunked.ranking, got.ranking)
    torch.testing.assert_close(chunked, got, rtol=1e-6, atol=1e-7)


def test_the_sign_of_zero_breaks_no_tie():
    query = torch.tensor([[0.3, 0.1, 0.7]]).expand(4, 3)
    target = torch.tensor([[0.0, 0.3, 0.1], [-0.0, 0.3, 0.1]]).repeat(2, 1)
    assert rank_margin_reward(query, target, 2, "torch").ranking.tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_one_checksum_are_told_apart(dtype, monkeypatch):
    """With factors of 1 rows of the same elements in another order have one checksum, and are no copies for that."""
    monkeypatch.setattr(torch, "randint", lambda high, size, *, dtype, generator: torch.zeros(size, dtype=dtype))
    query = torch.eye(3)[[0, 1, 2, 0]].to(dtype)
    target = torch.eye(3)[[1, 0, 2, 0]].to(dtype)
    assert rank_margin_reward(query, target, 2, "torch").ranking.tolist() == [0.5, 1.0, 0.5, 0.5]


def test_equal_rollouts_of_a_pair_get_equal_rewards():
    """Groups without spread are counted as such: a difference in the last bit would be one."""
    generator = torch.Generator().manual_seed(secrets.randbits(32))
    query, target = torch.randn(2, 120, 257, generator=generator, dtype=torch.float64)
    query = query[torch.arange(120) // 8 * 8]
    for values in rank_margin_reward(query, target, 8, "torch"):
        assert (values.view(-1, 8) == values.view(-1, 8)[:, :1]).all()


def test_what_is_not_valid_may_hold_anything():
    query, target = torch.randn(2, 12, 6, dtype=torch.float64)
    valid = dict(query_valid=torch.tensor([True, False, True] * 4), target_valid=torch.tensor([False, True, True] * 4))
    clean = rank_margin_rewards(query, target, 3, "torch", **valid)
    query[~valid["query_valid"]], target[~valid["target_valid"]] = math.nan, math.inf
    for got, want in zip(rank_margin_rewards(query, target, 3, "torch", **valid), clean, strict=True):
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_no_reward_look_good(value):
    """A bad target spoils all that it is compared with, a bad query itself alone; nothing else changes."""
    query, target = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(secrets.randbits(32)))
    ids = torch.tensor([0, 0, 1, 2])
    clean = rank_margin_reward(query, target, 3, "torch", target_ids=ids)
    bad = target.clone()
    bad[4, 2] = value
    got = rank_margin_reward(query, bad, 3, "torch", target_ids=ids)
    spoilt = torch.arange(12) >= 3  # pair 0 has pair 1's id and is not compared with it
    assert got.reward[spoilt].isnan().all() and got.ranking[spoilt].isnan().all()
    assert not got.margin[spoilt].isfinite().any()
    for values, want in zip(got, clean, strict=True):
        assert torch.allclose(values[~spoilt], want[~spoilt], atol=1e-6)
    bad = query.clone()
    bad[4, 2] = value
    got = rank_margin_reward(bad, target, 3, "torch", target_ids=ids)
    assert got.reward.isnan().nonzero().flatten().tolist() == got.ranking.isnan().nonzero().flatten().tolist() == [4]
    assert not got.margin[4].isfinite()


def test_an_overflow_of_the_results_is_not_finite():
    huge = torch.full((4, 2), 3e38)
    got = rank_margin_reward(huge, huge * torch.tensor([1, 1, -1, -1])[:, None], 2, "torch")
    assert got.reward.isnan().all() and got.ranking.isnan().all()


def test_results_carry_no_gradient_and_inputs_stay():
    query, target = torch.randn(2, 6, 4)
    before = query.clone()
    assert not any(values.requires_grad for values in rank_margin_reward(query.requires_grad_(), target, 2))
    assert torch.equal(query.detach(), before)


def test_rows_with_strides():
    query, target = torch.randn(2, 5, 12)
    got = rank_margin_reward(query.T, target.T, 3, "torch")
    assert all(map(torch.equal, got, rank_margin_reward(query.T.contiguous(), target.T.contiguous(), 3, "torch")))


@pytest.mark.parametrize(
    "query,target,size,options,message",
    [
        (torch.zeros(4, 3), torch.zeros(6, 3), 2, {}, r"\(4, 3\) and \(6, 3\)"),
        (torch.zeros(4), torch.zeros(4), 2, {}, r"expected \[N \* G, D\]"),
        (torch.zeros(5, 3), torch.zeros(5, 3), 2, {}, "5 rollouts .* num_generations=2"),
        (torch.zeros(4, 3), torch.zeros(4, 3), 0, {}, "num_generations=0"),
        (torch.zeros(4, 3), torch.zeros(4, 3), 2.0, {}, "num_generations=2.0"),
        (torch.zeros(0, 3), torch.zeros(0, 3), 2, {}, "empty"),
        (torch.zeros(4, 0), torch.zeros(4, 0), 2, {}, "empty"),
        (torch.zeros(4, 3), torch.zeros(4, 3).double(), 2, {}, "float32 and torch.float64"),
        (torch.zeros(4, 3).long(), torch.zeros(4, 3).long(), 2, {}, "int64"),
        (torch.zeros(4, 3), torch.zeros(4, 3, device="meta"), 2, {}, "cpu and meta"),
        (torch.zeros(4, 3), torch.zeros(4, 3), 2, {"query_valid": torch.ones(2)}, "query_valid"),
        (torch.zeros(4, 3), torch.zeros(4, 3), 2, {"target_valid": torch.ones(4, 1)}, "target_valid"),
        (torch.zeros(4, 3), torch.zeros(4, 3), 2, {"target_ids": torch.arange(4)}, "each of 2 pairs"),
        (torch.zeros(4, 3), torch.zeros(4, 3), 2, {"target_ids": torch.zeros(2)}, "float32"),
    ],
)
def test_what_is_refused(query, target, size, options, message):
    for operation in (rank_margin_reward, rank_margin_rewards):
        with pytest.raises(ValueError, match=message):
            operation(query, target, size, **options)


def test_implementations_that_cannot_run_are_refused():
    query, target = torch.zeros(2, 4, 3, dtype=torch.float64)
    with pytest.raises(UserError, match="fp64"):
        rank_margin_reward(query, target, 2, "triton")
    with pytest.raises(UserError, match="no cuda implementation"):
        rank_margin_reward(query, target, 2, impl="cuda")
    with pytest.raises(UserError, match="'fast' must be one of"):
        rank_margin_reward(query, target, 2, "fast")


def test_auto_takes_torch_on_the_cpu(caplog):
    caplog.set_level(logging.INFO, "umer1.ops.dispatch")
    importlib.import_module("umer1.ops.dispatch")._tell.cache_clear()
    rank_margin_reward(torch.randn(4, 3), torch.randn(4, 3), 2)
    assert "rank_margin_reward: impl=auto runs torch" in caplog.text
