"""Retrieval metrics against definitions written out by hand or by brute force."""

from itertools import combinations
from math import log2

import numpy as np
import pytest

from umer1.evaluation.retrieval import (
    estimate,
    hit_at_k,
    label_ranks,
    mean_of_estimates,
    ndcg_at_k,
    pass_at_k,
    ranking,
    similarity,
)


def test_ties_keep_candidate_order():
    scores = np.array([[0.5, 0.9, 0.9, 0.5, 0.9]], dtype=np.float32)
    assert ranking(scores).tolist() == [[1, 2, 4, 0, 3]]
    for label, rank in [(1, 0), (2, 1), (4, 2), (0, 3), (3, 4)]:
        assert label_ranks(scores, np.array([label])).tolist() == [rank]


def test_label_ranks_agree_with_ranking():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, size=(40, 12)).astype(np.float32)  # many ties
    labels = rng.integers(0, 12, size=40)
    want = [row.tolist().index(label) for row, label in zip(ranking(scores), labels, strict=True)]
    assert label_ranks(scores, labels).tolist() == want
    assert hit_at_k(label_ranks(scores, labels), 3).tolist() == [float(rank < 3) for rank in want]


def test_ndcg_by_hand():
    scores = np.array([[0.1, 0.4, 0.3, 0.2]])
    relevance = np.array([[3.0, 0.0, 1.0, 0.0]])  # order by score: 1, 2, 3, 0
    ideal = 3.0 / log2(2) + 1.0 / log2(3)
    assert ndcg_at_k(scores, relevance, 3)[0] == pytest.approx((1.0 / log2(3)) / ideal)
    assert ndcg_at_k(scores, relevance, 5)[0] == pytest.approx((1.0 / log2(3) + 3.0 / log2(5)) / ideal)
    assert ndcg_at_k(scores, relevance, 1)[0] == 0.0
    with pytest.raises(ValueError, match="positive relevance"):
        ndcg_at_k(scores, np.zeros((1, 4)), 3)


def test_pass_at_k_is_the_mean_over_all_subsets():
    n = 6
    for correct in range(n + 1):
        outcomes = [1] * correct + [0] * (n - correct)
        for k in range(1, n + 1):
            want = np.mean([max(subset) for subset in combinations(outcomes, k)])
            assert pass_at_k(n, np.array([correct]), k)[0] == pytest.approx(want)
    with pytest.raises(ValueError, match="pass@7"):
        pass_at_k(n, np.array([1]), 7)


def test_similarity_refuses_rows_that_would_rank_by_accident():
    good = np.eye(3, dtype=np.float32)
    assert similarity(good, good).tolist() == np.eye(3).tolist()
    for bad in (np.zeros((1, 3)), np.full((1, 3), np.nan), np.full((1, 3), 1.0)):
        with pytest.raises(ValueError, match="queries: rows"):
            similarity(bad.astype(np.float32), good)


def test_estimates():
    assert estimate(np.array([0.0, 1.0, 1.0, 1.0])) == {"value": 0.75, "stderr": pytest.approx(0.25), "n": 4}
    assert estimate(np.array([0.3]))["stderr"] == 0.0
    both = mean_of_estimates([{"value": 1.0, "stderr": 0.3, "n": 5}, {"value": 0.0, "stderr": 0.4, "n": 7}])
    assert both == {"value": 0.5, "stderr": pytest.approx(0.25), "n": 12}
