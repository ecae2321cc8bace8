"""Metrics of ranked lists with several, graded right answers, per query and all queries at once; pure numpy.

The definitions of the reference evaluation of MMEB-V2, at ranks 1, 5 and 10.  What is particular about them:
precision@k divides by k even where fewer candidates are ranked; recall is 1 and all else 0 where a query has no label;
average precision divides by min(labels, k); a candidate that is listed twice counts once in hit, precision, recall and
f1 and every time in average precision and NDCG; hit and its like count a label whatever its relevance.

One thing differs on purpose: a label keeps its grade.  The reference puts labels through a set before it pairs them
with their relevances, so that with several grades in a query its NDCG depends on how names hash in that run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

KS = (1, 5, 10)
DEPTH = max(KS)  # ranks that matter


@dataclass(frozen=True, slots=True)
class RankedRelevance:
    """The first DEPTH ranks of Q queries; places behind the end of a shorter list are like wrong candidates."""

    right: np.ndarray  # bool [Q, DEPTH]: a label stands here
    first: np.ndarray  # bool [Q, DEPTH]: and has not stood before
    gains: np.ndarray  # float64 [Q, DEPTH]: its relevance, 0 where none stands
    ideal: np.ndarray  # float64 [Q, DEPTH]: the query's relevances, highest first, then 0
    num_labels: np.ndarray  # int64 [Q], distinct ones


def ranked_relevance(rankings: Sequence[Sequence[str]], relevances: Sequence[Mapping[str, float]]) -> RankedRelevance:
    """From names in rank order, and per query the relevance of each of its labels."""
    shape = (len(rankings), DEPTH)
    right, first = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    gains, ideal = np.zeros(shape), np.zeros(shape)
    for row, (names, relevance) in enumerate(zip(rankings, relevances, strict=True)):
        seen = set()
        for rank, name in enumerate(names[:DEPTH]):
            if name in relevance:
                right[row, rank], first[row, rank], gains[row, rank] = True, name not in seen, relevance[name]
                seen.add(name)
        best = sorted(relevance.values(), reverse=True)[:DEPTH]
        ideal[row, : len(best)] = best
    return RankedRelevance(right, first, gains, ideal, np.array([len(labels) for labels in relevances], dtype=np.int64))


def ranking_metrics(ranked: RankedRelevance) -> dict[str, np.ndarray]:
    """ "hit@1", "ndcg_linear@5", ... -> float64 [Q], in the order of the reference's score file."""
    num_labels = ranked.num_labels
    ranks = np.arange(1, DEPTH + 1)
    found = ranked.first.cumsum(axis=1)
    precision_here = ranked.right.cumsum(axis=1) / ranks
    by_name: dict[str, dict[int, np.ndarray]] = {}

    def enter(name: str, k: int, values: np.ndarray) -> None:
        by_name.setdefault(name, {})[k] = values.astype(np.float64)

    for k in KS:
        hits = found[:, k - 1]
        precision = hits / k
        recall = np.where(num_labels > 0, hits / np.maximum(num_labels, 1), 1.0)
        both = precision + recall
        enter("hit", k, hits > 0)
        enter("ndcg_linear", k, ndcg(ranked.gains, ranked.ideal, k))
        enter("ndcg_exponential", k, ndcg(np.exp2(ranked.gains) - 1, np.exp2(ranked.ideal) - 1, k))
        enter("precision", k, precision)
        enter("recall", k, recall)
        enter("f1", k, 2 * precision * recall / np.where(both > 0, both, 1.0))
        summed = np.where(ranked.right, precision_here, 0.0)[:, :k].sum(axis=1)
        enter("map", k, summed / np.maximum(np.minimum(num_labels, k), 1))
        enter("mrr", k, np.where(ranked.right, 1.0 / ranks, 0.0)[:, :k].max(axis=1))
    return {f"{name}@{k}": values for name, at in by_name.items() for k, values in at.items()}


def ndcg(gains: np.ndarray, ideal: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k [Q] of gains in rank order and of those of the ideal order, both [Q, R]; 0 where the ideal is 0."""
    top = min(k, gains.shape[1])
    discount = 1.0 / np.log2(np.arange(top) + 2.0)
    best = (ideal[:, :top] * discount).sum(axis=1)
    return (gains[:, :top] * discount).sum(axis=1) / np.where(best > 0, best, 1.0) * (best > 0)
