"""Shares of a step: every pair once, equally many a rank, and never a heavier load than before."""

import numpy as np
import pytest

from umer1.data.balancing import TOLERANCE, assign, imbalance, rank_loads, spread
from umer1.data.packing import plan_micro_batches


def draw(rng, ranks: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Costs of many kinds (equal, zero, heavy-tailed) and who has read what."""
    kinds = [rng.lognormal(0, 1.5, ranks * pairs), rng.integers(0, 3, ranks * pairs).astype(float)]
    kinds += [np.ones(ranks * pairs), np.zeros(ranks * pairs), 1e15 * rng.random(ranks * pairs)]
    return kinds[int(rng.integers(len(kinds)))], rng.permutation(np.repeat(np.arange(ranks), pairs))


def test_shares_are_equal_in_number_and_never_worse():
    rng = np.random.default_rng(0)
    for _ in range(300):
        ranks, pairs = int(rng.integers(1, 9)), int(rng.integers(1, 9))
        costs, owners = draw(rng, ranks, pairs)
        given = owners.copy()
        found = assign(costs, owners, ranks)
        np.testing.assert_array_equal(owners, given)
        assert len(found) == len(owners) and (np.bincount(found, minlength=ranks) == pairs).all()
        before, after = rank_loads(costs, owners, ranks), rank_loads(costs, found, ranks)
        assert after.max() <= before.max() * (1 + 1e-12) and after.sum() == pytest.approx(costs.sum())
        np.testing.assert_array_equal(assign(costs.copy(), owners, ranks), found)
        # what is left of it cannot be made better by any exchange with the heaviest rank
        heavy = int(after.argmax())
        if after[heavy] > (1 + TOLERANCE) * after.mean():
            for other in set(range(ranks)) - {heavy}:
                moved = costs[found == heavy][:, None] - costs[found == other][None]
                most = np.maximum(after[heavy] - moved, after[other] + moved)
                assert most.min() > after[heavy] * (1 - 1e-6)


def test_few_pairs_move_and_none_where_nothing_is_gained():
    costs = np.array([9.0, 1, 1, 1, 5, 5, 1, 1])
    found = assign(costs, np.repeat([0, 1], 4), 2)
    assert (found == np.repeat([0, 1], 4)).all(), "12 and 12 are balanced already"
    found = assign(np.array([9.0, 5, 1, 1, 1, 1, 1, 1]), np.repeat([0, 1], 4), 2)
    assert rank_loads(np.array([9.0, 5, 1, 1, 1, 1, 1, 1]), found, 2).max() == 12
    assert (found != np.repeat([0, 1], 4)).sum() == 2


def test_large_steps_come_close_to_the_mean():
    """64 ranks with 16 pairs each of blocks of 64 that cost about the same."""
    rng = np.random.default_rng(1)
    costs = np.concatenate([scale * rng.lognormal(0, 0.3, 64) for scale in rng.lognormal(0, 0.6, 16)])
    in_order, in_turn = np.repeat(np.arange(64), 16), np.tile(np.arange(64), 16)
    assert imbalance(rank_loads(costs, in_order, 64)) > 1.5
    for owners in (in_order, in_turn):
        assert imbalance(rank_loads(costs, assign(costs, owners, 64), 64)) < 1.02


def test_imbalance_is_the_largest_by_the_mean():
    assert imbalance(np.array([3.0, 1, 2])) == 1.5 and imbalance(np.zeros(4)) == 1.0


def test_spreading_over_bins():
    # the costliest first would give 5 + 3 and 4 + 3 + 3; an exchange evens it out
    assert spread([5.0, 4, 3, 3, 3], 2, lambda places: True) == [[0, 1], [2, 3, 4]]
    # an exchange that a bin cannot take is none
    assert spread([5.0, 4, 3, 3, 3], 2, lambda places: not {0, 1} <= set(places)) == [[0, 3], [1, 2, 4]]
    assert spread([1.0, 1, 1], 2, lambda places: len(places) == 1) is None
    assert spread([0.0, 0, 0, 0], 2, lambda places: len(places) <= 2) == [[0, 2], [1, 3]]


def test_micro_batches_keep_their_limits_and_are_never_worse():
    rng = np.random.default_rng(2)
    better = 0
    for _ in range(300):
        count = int(rng.integers(1, 30))
        lengths, patches = rng.integers(1, 40, count).tolist(), rng.integers(0, 40, count).tolist()
        costs = [float(length**2 + 5 * patch) for length, patch in zip(lengths, patches, strict=True)]
        size, tokens, vision, multiple = (int(rng.integers(1, high)) for high in (9, 100, 100, 5))
        budgets = (tokens, vision) if rng.random() < 0.5 else (None, None)
        limits = lengths, patches, size, *budgets
        plain = plan_micro_batches(*limits, multiple_of=multiple)
        plan = plan_micro_batches(*limits, multiple_of=multiple, costs=costs)
        assert sorted(place for places in plan for place in places) == list(range(count)) and all(plan)
        assert len(plan) <= len(plain) and (len(plan) % multiple == 0 or len(plan) == count)
        for places in plan:
            assert len(places) <= size and places == sorted(places)
            if len(places) > 1 and budgets[0]:
                assert sum(lengths[i] for i in places) <= tokens and sum(patches[i] for i in places) <= vision
        if len(plan) == len(plain):
            most = [max(sum(costs[i] for i in places) for places in each) for each in (plan, plain)]
            assert most[0] <= most[1]
            better += most[0] < most[1]
    assert better > 50
