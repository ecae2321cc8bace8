"""Advantages, loss and logged sums against numpy in fp64, written from docs/method.md, 5 one response at a time."""

import math

import numpy as np
import pytest
import torch

from umer1.losses.grpo import (
    MISMATCH_SUMS,
    TOKEN_STATISTICS,
    group_advantages,
    groups_with_spread,
    grpo_loss,
    k3,
    mismatch_summary,
    mismatch_sums,
    token_losses,
    token_statistics,
    token_weights,
)
from umer1.testing import assert_close

CASES = 1000


def advantages_by_hand(rewards: np.ndarray, size: int, valid: np.ndarray) -> np.ndarray:
    result = np.zeros(len(rewards))
    for start in range(0, len(rewards), size):
        members = [row for row in range(start, start + size) if valid[row]]
        if len(members) < 2:
            continue
        mean = sum(rewards[row] for row in members) / len(members)
        std = math.sqrt(sum((rewards[row] - mean) ** 2 for row in members) / (len(members) - 1))
        for row in members:
            result[row] = (rewards[row] - mean) / (std + 1e-4)
    return result


def loss_by_hand(case: dict) -> float:
    """The formula, token by token."""
    low, high = 1 - case["epsilon"], 1 + (case["epsilon_high"] or case["epsilon"])
    sums = []
    for row, mask in enumerate(case["mask"]):
        tokens = np.flatnonzero(mask)
        total = 0.0
        for t in tokens:
            ratio = math.exp(case["new"][row, t] - case["old"][row, t])
            advantage = case["advantages"][row]
            policy = min(ratio * advantage, min(max(ratio, low), high) * advantage)
            if case["cap"] is not None:
                policy *= min(math.exp(case["old"][row, t] - case["engine"][row, t]), case["cap"])
            difference = case["ref"][row, t] - case["new"][row, t]
            total += -policy + case["beta"] * (math.exp(difference) - difference - 1)
        if len(tokens):
            sums.append(total / (len(tokens) if case["normalisation"] == "response" else case["longest"]))
    return sum(sums) / len(sums) if sums else 0.0


def make_case(rng: np.random.Generator) -> dict:
    rows, length = int(rng.integers(1, 7)), int(rng.integers(1, 9))
    new = -rng.exponential(2.0, (rows, length))
    case = {name: new + 0.5 * rng.standard_normal((rows, length)) for name in ("old", "ref", "engine")}
    same = rng.random((rows, length)) < 0.2
    case["old"][same] = new[same]  # ratio of exactly 1, as in the first inner step
    lengths = rng.integers(0, length + 1, rows)
    longest = None if rng.random() < 0.5 else int(rng.integers(length, 20))
    return case | {
        "new": new,
        "mask": np.arange(length) < lengths[:, None],
        "advantages": rng.standard_normal(rows) * (rng.random(rows) < 0.8),
        "epsilon": rng.choice([0.1, 0.2]),
        "epsilon_high": rng.choice([None, 0.28]),
        "beta": rng.choice([0.0, 0.04, 1.0]),
        "normalisation": str(rng.choice(["response", "constant"])),
        "cap": rng.choice([None, 1.0, 2.0]),
        "given_longest": longest,
        "longest": longest or length,
    }


def run_case(case: dict, logprobs: torch.Tensor, **changed) -> torch.Tensor:
    tensors = {name: torch.from_numpy(case[name]) for name in ("old", "ref", "engine", "advantages", "mask")} | changed
    return grpo_loss(
        logprobs,
        tensors["old"],
        tensors["ref"] if case["beta"] else None,
        tensors["advantages"],
        tensors["mask"],
        epsilon=case["epsilon"],
        epsilon_high=case["epsilon_high"],
        beta=case["beta"],
        loss_normalisation=case["normalisation"],
        max_completion_length=case["given_longest"],
        engine_logprobs=tensors["engine"],
        importance_cap=case["cap"],
    )


def test_loss_equals_the_formula():
    rng = np.random.default_rng(11)
    for number in range(CASES):
        case = make_case(rng)
        got = run_case(case, torch.from_numpy(case["new"]))
        assert got.dtype == torch.float64 and got.shape == ()
        assert got.item() == pytest.approx(loss_by_hand(case), rel=1e-12, abs=1e-13), number


def test_gradient_equals_finite_differences():
    """Away from the kinks of the clip, where a difference over them would mean nothing."""
    rng = np.random.default_rng(12)
    checked = 0
    for _ in range(40):
        case = make_case(rng)
        ratio = np.exp(case["new"] - case["old"])
        high = 1 + (case["epsilon_high"] or case["epsilon"])
        if min(abs(ratio - 1 + case["epsilon"]).min(), abs(ratio - high).min()) < 1e-4:
            continue
        leaf = torch.from_numpy(case["new"]).requires_grad_()
        run_case(case, leaf).backward()
        want = np.zeros_like(case["new"])
        for place in np.ndindex(*want.shape):
            sides = []
            for step in (1e-6, -1e-6):
                moved = case["new"].copy()
                moved[place] += step
                sides.append(loss_by_hand(case | {"new": moved}))
            want[place] = (sides[0] - sides[1]) / 2e-6
        assert_close("gradient", leaf.grad, torch.from_numpy(want), rtol=1e-6, atol=1e-8)
        checked += 1
    assert checked > 20


def test_advantages_equal_the_formula():
    rng = np.random.default_rng(13)
    for number in range(CASES):
        size, groups = int(rng.integers(2, 9)), int(rng.integers(1, 5))
        rewards = rng.choice([0.0, 0.25, 1.0, 1.3], size * groups)  # ties, groups without spread
        if number % 2:
            rewards = rng.standard_normal(size * groups)
        valid = rng.random(size * groups) < rng.choice([0.2, 0.7, 1.0])
        got = group_advantages(torch.from_numpy(rewards), size, valid=torch.from_numpy(valid))
        want = advantages_by_hand(rewards, size, valid)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-10, atol=1e-11)
        everyone = group_advantages(torch.from_numpy(rewards), size)
        np.testing.assert_allclose(everyone.numpy(), advantages_by_hand(rewards, size, np.ones_like(valid)), atol=1e-10)


def test_advantages_of_literals():
    got = group_advantages(torch.tensor([1.0, 3.0, 0.1, 0.1], dtype=torch.float64), 2)
    half = 1 / (math.sqrt(2) + 1e-4)  # unbiased std of 1 and 3
    assert got.tolist() == pytest.approx([-half, half, 0.0, 0.0])
    both = group_advantages(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), 2)
    assert both.shape == (2, 2) and both.dtype == torch.float32 and both[1].tolist() == [0.0, 0.0]
    # Eight times 0.1 in fp32 has a mean that is not 0.1: round-off over 1e-4 is no advantage.
    assert group_advantages(torch.full((8,), 0.1), 8).tolist() == [0.0] * 8
    with pytest.raises(ValueError, match="groups of 3"):
        group_advantages(torch.zeros(8), 3)


def test_what_is_not_valid_is_ignored_whatever_it_holds():
    rewards = torch.tensor([1.0, 3.0, math.nan, 7.0, math.inf, 2.0])
    valid = torch.tensor([True, True, False, True, False, False])
    got = group_advantages(rewards, 3, valid=valid)
    assert got[:2].tolist() == group_advantages(rewards[:2], 2).tolist() and got[2:].tolist() == [0.0] * 4
    assert groups_with_spread(rewards, 3, valid=valid).tolist() == [True, False]


def test_groups_without_spread():
    rewards = torch.tensor([1.0, 1.0, 0.5, 0.5 + 1e-7, 0.0, 1.0, 0.0, 1.0])
    assert groups_with_spread(rewards, 2).tolist() == [False, False, True, True]
    valid = torch.tensor([True] * 7 + [False])
    assert groups_with_spread(rewards, 2, valid=valid).tolist() == [False, False, True, False]


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_may_hold_anything(junk):
    rng = np.random.default_rng(14)
    case = make_case(rng) | {"cap": 2.0, "beta": 0.04}
    padding = torch.from_numpy(~case["mask"])
    assert padding.any() and not padding.all()
    dirty = {name: torch.from_numpy(case[name]).masked_fill(padding, junk) for name in ("old", "ref", "engine")}
    leaf = torch.from_numpy(case["new"]).masked_fill(padding, junk).requires_grad_()
    loss = run_case(case, leaf, **dirty)
    loss.backward()
    assert loss.item() == pytest.approx(loss_by_hand(case), rel=1e-12)
    assert torch.isfinite(leaf.grad).all() and (leaf.grad[padding] == 0).all()


@pytest.mark.parametrize("difference", [200.0, -200.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_a_ratio_beyond_fp32_gives_numbers(difference, advantage):
    leaf = torch.tensor([[-1.0]], requires_grad=True)
    old = leaf.detach() - difference
    settings = dict(epsilon=0.2, epsilon_high=None, beta=0.04, loss_normalisation="response")
    loss = grpo_loss(leaf, old, old, torch.tensor([advantage]), torch.ones(1, 1), **settings)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(leaf.grad).all()


def test_no_tokens_at_all():
    leaf = torch.zeros(3, 4, requires_grad=True)
    settings = dict(epsilon=0.2, epsilon_high=0.28, beta=0.0, loss_normalisation="constant")
    loss = grpo_loss(leaf, leaf.detach(), None, torch.ones(3), torch.zeros(3, 4), **settings)
    loss.backward()
    assert loss.item() == 0.0 and leaf.grad.abs().sum() == 0.0


def test_wrong_settings_are_said():
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="response or constant"):
        grpo_loss(zeros, zeros, None, zeros[0, :1], zeros == 0, epsilon=0.2, beta=0.0, loss_normalisation="mean")
    with pytest.raises(ValueError, match="ref_logprobs"):
        grpo_loss(zeros, zeros, None, zeros[0, :1], zeros == 0, epsilon=0.2, beta=0.1, loss_normalisation="response")


@pytest.mark.parametrize("normalisation", ["response", "constant"])
def test_packed_tokens_over_micro_batches_equal_the_padded_loss(normalisation):
    """As the trainer does it: tokens of ragged responses in a row, two micro-batches, one global count."""
    rng = np.random.default_rng(15)
    case = make_case(rng) | {"beta": 0.04, "cap": 1.5, "normalisation": normalisation, "given_longest": 20}
    want = run_case(case, torch.from_numpy(case["new"]))
    rows = {name: torch.from_numpy(case[name]) for name in ("new", "old", "ref", "engine", "mask", "advantages")}
    lengths = rows["mask"].sum(1)
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 2), slice(2, None)):
        mask = rows["mask"][part]
        new, old, ref, engine = (rows[name][part][mask] for name in ("new", "old", "ref", "engine"))
        weights = token_weights(
            lengths[part],
            loss_normalisation=normalisation,
            max_completion_length=20,
            num_responses=int((lengths > 0).sum()),
        )
        losses = token_losses(
            new,
            old,
            ref,
            rows["advantages"][part].repeat_interleave(lengths[part]),
            epsilon=case["epsilon"],
            epsilon_high=case["epsilon_high"],
            beta=0.04,
            importance=torch.exp(old - engine).clamp(max=1.5),
        )
        total += (losses * weights.repeat_interleave(lengths[part])).sum()
    assert_close("loss", total, want, rtol=1e-12)


def test_statistics_of_literals():
    ratios = torch.tensor([0.5, 0.5, 1.0, 1.25, 1.5, 1.5], dtype=torch.float64)
    advantages = torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    zeros = torch.zeros(6, dtype=torch.float64)
    sums = token_statistics(ratios.log(), zeros, ratios.log() + math.log(2), advantages, epsilon=0.2, epsilon_high=0.3)
    got = dict(zip(TOKEN_STATISTICS, sums.tolist(), strict=True))
    assert got["tokens"] == 6 and got["ratio"] == pytest.approx(6.25)
    assert got["clipped_low"] == 1 and got["clipped_high"] == 1
    assert got["kl"] == pytest.approx(6 * (2 - math.log(2) - 1))
    assert token_statistics(zeros, zeros, None, advantages, epsilon=0.2)[1] == 0.0
    assert token_statistics(zeros[:0], zeros[:0], None, advantages[:0], epsilon=0.2).tolist() == [0.0] * 5


def test_mismatch_of_literals():
    ratios = torch.tensor([1.0] * 97 + [4.0, 8.0, 0.5])
    sums, found = mismatch_sums(ratios.log(), torch.zeros(100), 2.0)
    assert_close("ratios", found, ratios)
    named = dict(zip(MISMATCH_SUMS, sums.tolist(), strict=True))
    assert named["tokens"] == 100 and named["truncated"] == 2
    assert named["absolute"] == pytest.approx(math.log(4) + math.log(8) + math.log(2), rel=1e-5)
    assert named["k3"] == pytest.approx(sum(r - math.log(r) - 1 for r in (4.0, 8.0, 0.5)), rel=1e-5)
    summary = mismatch_summary(sums, found, 2.0)
    assert summary["ratio_p99"] == pytest.approx(4.0) and summary["ratio_p99_truncated"] == 2.0
    assert summary["truncated_share"] == pytest.approx(0.02)
    assert summary["mean_abs"] == pytest.approx(named["absolute"] / 100)
    assert mismatch_sums(ratios.log(), torch.zeros(100))[0][3] == 0
    empty = mismatch_summary(*mismatch_sums(torch.zeros(0), torch.zeros(0), 2.0), 2.0)
    assert empty == {"mean_abs": 0.0, "k3": 0.0, "ratio_p99": 1.0, "ratio_p99_truncated": 1.0, "truncated_share": 0.0}


def test_k3_keeps_its_digits_where_the_models_are_close():
    difference = torch.tensor([1e-3, -1e-4, 3e-5, 0.0])
    want = torch.expm1(difference.double()) - difference.double()
    torch.testing.assert_close(k3(difference).double(), want, rtol=1e-2, atol=0)
