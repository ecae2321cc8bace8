"""Adaptive mode against loops written out by hand, and what it may not depend on."""

import math
import os
from dataclasses import replace

import numpy as np
import pytest
from adaptive_reference import adaptive_reference, softmax

from umer1.evaluation.adaptive import (
    AdaptiveRule,
    Calibration,
    adaptive_scores,
    agreement,
    beliefs,
    calibrate,
    choose_probes,
    confidence,
    fuse,
    mean_of_samples,
    worth_reasoning,
)
from umer1.evaluation.modes import gap_recovered

FRESH = int.from_bytes(os.urandom(4), "little")
RULE = AdaptiveRule(num_probes=4)


def lists(rng, queries, candidates):
    """Two noisy views of one hidden candidate a query, each of a strength of its own; cosines in float32."""
    hidden = rng.integers(candidates, size=queries)
    strengths = rng.uniform(0.0, 0.6, size=2)
    views = [rng.normal(scale=0.1, size=(queries, candidates)) for _ in range(2)]
    for view, strength in zip(views, strengths, strict=True):
        view[np.arange(queries), hidden] += strength
    return [np.clip(view, -1, 1).astype(np.float32) for view in views]


@pytest.mark.parametrize("case", range(12))
def test_rule_equals_its_definition(case):
    rng = np.random.default_rng([FRESH, case])
    queries, candidates = int(rng.integers(1, 30)), int(rng.integers(2, 20))
    disc, gen = lists(rng, queries, candidates)
    rule = AdaptiveRule(
        price=float(rng.uniform(-0.2, 0.5)),
        num_probes=int(rng.integers(1, 8)),
        temperature=float(rng.uniform(0.02, 0.1)),
        seed=int(rng.integers(100)),
    )
    found = adaptive_scores(disc, gen, rule)
    scores, reasoned, temperatures, expected = adaptive_reference(disc.tolist(), gen.tolist(), rule)
    message = f"seed {FRESH}, case {case}"
    calibration = found.calibration
    assert (calibration.disc_temperature, calibration.gen_temperature) == pytest.approx(temperatures), message
    assert calibration.gen_confidence == pytest.approx(expected, abs=1e-12), message
    assert found.reasoned.tolist() == reasoned, message
    np.testing.assert_allclose(found.scores, scores, rtol=1e-12, atol=1e-12, err_msg=message)


def test_temperatures_are_found_without_labels():
    """Lists drawn from known temperatures: 400 probes lead from a start 3 times off to within a factor of 1.5."""
    rng = np.random.default_rng(FRESH)
    hidden, true = rng.integers(32, size=400), (0.05, 0.08)
    views = []
    for temperature in true:
        # Gaussian noise of variance v and a shift s of the right one: log odds are score * s / v, so t = v / s.
        shift = 0.25
        view = rng.normal(scale=math.sqrt(temperature * shift), size=(400, 32))
        view[np.arange(400), hidden] += shift
        views.append(view)
    found = calibrate(*views, temperature=0.15)
    for got, want in zip((found.disc_temperature, found.gen_temperature), true, strict=True):
        assert want / 1.5 < got < want * 1.5, f"seed {FRESH}: {found}"
    right = np.mean(views[1].argmax(axis=1) == hidden)
    assert found.gen_confidence == pytest.approx(right, abs=0.15), f"seed {FRESH}"


def test_a_list_that_says_nothing_leaves_the_order_to_the_other():
    rng = np.random.default_rng(FRESH)
    gen = rng.normal(scale=0.3, size=(9, 7))
    flat = np.full((9, 7), 0.25)
    assert agreement(beliefs(flat, 0.05), beliefs(gen, 0.05)) == pytest.approx(0.0, abs=1e-9)
    calibration = calibrate(flat, gen, 0.05)
    assert (calibration.disc_temperature, calibration.gen_temperature) == pytest.approx((0.05, 0.05))
    assert (fuse(flat, gen, calibration).argsort(axis=1) == gen.argsort(axis=1)).all()
    assert worth_reasoning(flat, calibration, 0.1).all()


def test_decisions_see_the_own_disc_list_and_the_probes_alone():
    rng = np.random.default_rng(FRESH)
    disc, gen = lists(rng, 40, 12)
    first = adaptive_scores(disc, gen, RULE)
    probes = choose_probes(40, RULE)
    assert first.reasoned[probes].all() and len(probes) == 4
    others = np.setdiff1d(np.arange(40), probes)
    changed = gen.copy()
    changed[others] = rng.normal(size=(len(others), 12))  # gen lists of those who are not asked yet
    assert (adaptive_scores(disc, changed, RULE).reasoned == first.reasoned).all()
    unread = gen.copy()
    unread[~first.reasoned] = np.nan  # what was never computed
    np.testing.assert_array_equal(adaptive_scores(disc, unread, RULE).scores, first.scores)
    alone = worth_reasoning(disc[others[:1]], first.calibration, RULE.price)
    assert alone[0] == first.reasoned[others[0]]


def test_candidates_have_no_order():
    """Where the right candidate stands changes nothing."""
    rng = np.random.default_rng(FRESH)
    disc, gen = lists(rng, 25, 10)
    order = rng.permutation(10)
    one, two = adaptive_scores(disc, gen, RULE), adaptive_scores(disc[:, order], gen[:, order], RULE)
    assert (one.reasoned == two.reasoned).all()
    np.testing.assert_allclose(one.scores[:, order], two.scores)


def test_price_moves_from_everybody_to_the_probes():
    disc, gen = lists(np.random.default_rng(FRESH), 40, 12)
    counts = [adaptive_scores(disc, gen, replace(RULE, price=p)).reasoned.sum() for p in (-1.0, 0.0, 0.2, 0.5, 1.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 40 and counts[-1] == 4


def test_pools_of_their_own_are_padded():
    """Lists cut to each query's own candidates: as if every query were a task with the calibration of all."""
    rng = np.random.default_rng(FRESH)
    disc, gen = lists(rng, 40, 12)
    sizes = rng.integers(1, 13, size=40)
    padding = np.arange(12) >= sizes[:, None]
    disc[padding] = gen[padding] = -np.inf
    found = adaptive_scores(disc, gen, RULE)
    probes = choose_probes(40, RULE)
    assert found.reasoned[probes].tolist() == (sizes[probes] > 1).tolist(), f"seed {FRESH}"
    evidence = sum(
        math.log(size * sum(a * b for a, b in zip(softmax(d[:size], 0.05), softmax(g[:size], 0.05), strict=True)))
        for d, g, size in zip(disc.tolist(), gen.tolist(), sizes, strict=True)
    )
    assert agreement(beliefs(disc, 0.05), beliefs(gen, 0.05)) == pytest.approx(evidence), f"seed {FRESH}"
    for q, size in enumerate(sizes):
        own = adaptive_scores(disc[q : q + 1, :size], gen[q : q + 1, :size], RULE, found.calibration)
        if q not in probes:
            assert own.reasoned[0] == found.reasoned[q], f"seed {FRESH}, query {q}"
            np.testing.assert_allclose(found.scores[q, :size], own.scores[0])
        assert np.isneginf(found.scores[q, size:]).all()
    gen[probes[0], 0] = -np.inf
    with pytest.raises(ValueError, match="not finite at the same candidates"):
        adaptive_scores(disc, gen, RULE)


def test_one_candidate_needs_no_reasoning():
    found = adaptive_scores(np.ones((3, 1)), np.ones((3, 1)), RULE)
    assert not found.reasoned.any() and confidence(np.zeros((3, 1)), 0.05).tolist() == [1.0] * 3


def test_ties_share_the_confidence_and_stay_ties():
    tied = np.tile([0.5, 0.5, -1.0], (6, 1))
    assert confidence(tied, 0.05) == pytest.approx(np.full(6, 0.5))
    scores = adaptive_scores(tied, tied, RULE).scores
    assert (scores[:, 0] == scores[:, 1]).all() and (scores[:, 0] > scores[:, 2]).all()


def test_extreme_scores_do_not_overflow():
    disc, gen = np.array([[1.0, -1.0]]), np.array([[-1.0, 1.0]])
    found = calibrate(disc, gen, 1e-4)
    assert np.isfinite([found.disc_temperature, found.gen_temperature, found.gen_confidence]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    disc, gen = lists(np.random.default_rng(0), 8, 5)
    for damaged in (disc, gen):
        kept, damaged[:, 2] = damaged[:, 2].copy(), bad
        with pytest.raises(ValueError, match="not finite"):
            adaptive_scores(disc, gen, RULE)
        damaged[:, 2] = kept
    known = Calibration(0.05, 0.05, 0.99)
    gen[0] = bad  # found by fusing, where a calibration from elsewhere left nothing to probe
    with pytest.raises(ValueError, match="not finite"):
        adaptive_scores(disc, gen, replace(RULE, price=-2.0), known)


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="same queries"):
        adaptive_scores(np.zeros((3, 2)), np.zeros((3, 4)), RULE)
    with pytest.raises(ValueError, match="one or more"):
        calibrate(np.zeros((0, 2)), np.zeros((0, 2)), 0.05)
    with pytest.raises(ValueError, match="a candidate at least"):
        beliefs(np.zeros((3, 0)), 0.05)
    assert AdaptiveRule().violations() == []
    assert len(AdaptiveRule(price=math.nan, num_probes=0, temperature=0.0).violations()) == 3


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_mean_of_samples(k):
    rng = np.random.default_rng([FRESH, k])
    samples = rng.normal(size=(4, 5, 6))
    samples /= np.linalg.norm(samples, axis=-1, keepdims=True)
    means = mean_of_samples(samples.astype(np.float32), k)
    assert means.shape == (4, 5 // k, 6)
    for q in range(4):
        for run in range(5 // k):
            total = sum(samples[q, run * k + i] for i in range(k))
            np.testing.assert_allclose(means[q, run], total / math.sqrt(total @ total), atol=1e-6)


def test_means_without_a_direction_are_refused():
    opposite = np.array([[[1.0, 0.0], [-1.0, 0.0]]], dtype=np.float32)
    for samples in (opposite, np.full((1, 2, 2), np.nan, dtype=np.float32)):
        with pytest.raises(ValueError, match="no direction"):
            mean_of_samples(samples, 2)
    for k in (0, 3):
        with pytest.raises(ValueError, match="1 <= k <= 2"):
            mean_of_samples(opposite, k)


def test_gap_recovered():
    scores = {name: {"value": value} for name, value in (("gen", 0.5), ("oracle", 0.75), ("adaptive", 0.625))}
    assert gap_recovered(scores) == 0.5
    assert gap_recovered({**scores, "oracle": {"value": 0.5}}) is None
