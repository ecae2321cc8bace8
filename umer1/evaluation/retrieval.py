"""Retrieval metrics on embeddings and on counts; pure numpy, nothing here knows a model.

One order everywhere: similarities descending, equal ones in candidate order (a stable sort), as the reference
evaluation of MMEB-V2 has it.  Every metric is returned per query, so that means, standard errors, the oracle and any
split come from the same numbers.
"""

from math import comb

import numpy as np

from umer1.evaluation.ranking_metrics import ndcg

# How far from 1 the length of a vector may be: made in fp32, and made in bf16, where normalising itself errs by 0.25%.
UNIT, UNIT_IN_BF16 = 1e-3, 1e-2


def check_unit_rows(name: str, rows: np.ndarray, within: float = UNIT) -> None:
    """ValueError where a row of [N, D] is not finite or not of unit length: it would rank by accident."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=-1)
    bad = np.flatnonzero(~(np.abs(norms - 1.0) < within))
    if bad.size:
        raise ValueError(f"{name}: rows {bad[:8].tolist()} have norms {norms[bad[:8]].tolist()}, not 1")


def similarity(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Dot products [Q, C] in float32 of L2-normalised `queries` [Q, D] and `candidates` [C, D].

    ValueError where a row is not finite or not of unit length.
    """
    check_unit_rows("queries", queries)
    check_unit_rows("candidates", candidates)
    return queries.astype(np.float32) @ candidates.astype(np.float32).T


def ranking(scores: np.ndarray) -> np.ndarray:
    """Candidate indices [Q, C], best first, for `scores` [Q, C]."""
    return np.argsort(-scores, axis=-1, kind="stable")


def label_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """0-based rank [Q] of each query's one right candidate `labels` [Q] in `scores` [Q, C]."""
    own = np.take_along_axis(scores, labels[:, None], axis=-1)
    earlier = np.arange(scores.shape[-1])[None, :] < labels[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(axis=-1)


def hit_at_k(ranks: np.ndarray, k: int) -> np.ndarray:
    """1.0 where the right candidate is among the first k; `ranks` are 0-based."""
    return (ranks < k).astype(np.float64)


def ndcg_at_k(scores: np.ndarray, relevance: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k with linear gain [Q]: sum of rel / log2(rank + 1) over the first k ranks (1-based), over its ideal.

    `scores` and `relevance` are [Q, C]; the ideal order sorts each query's own relevances.  A query without a
    relevant candidate has no NDCG: ValueError.
    """
    if not (relevance.max(axis=-1) > 0).all():
        raise ValueError("every query needs a candidate of positive relevance")
    top = min(k, scores.shape[-1])
    gains = np.take_along_axis(relevance, ranking(scores)[:, :top], axis=-1)
    ideal = -np.sort(-relevance, axis=-1)[:, :top]
    return ndcg(gains, ideal, k)


def pass_at_k(num_samples: int, num_correct: np.ndarray, k: int) -> np.ndarray:
    """Chance [Q] that k of `num_samples` samples, drawn without replacement, hold a right one of `num_correct` [Q].

    The unbiased estimator 1 - C(n - c, k) / C(n, k); exact integers until the one division.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= {num_samples} samples")
    return np.array([1.0 - comb(num_samples - int(c), k) / comb(num_samples, k) for c in num_correct])


def estimate(values: np.ndarray) -> dict[str, float | int]:
    """{"value": mean, "stderr": standard error of the mean (0 for one value), "n"}; empty input is a ValueError."""
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no values to average")
    stderr = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else 0.0
    return {"value": float(values.mean()), "stderr": float(stderr), "n": int(values.size)}


def mean_of_estimates(estimates: list[dict]) -> dict[str, float | int]:
    """The plain mean over tasks, its standard error from independent errors, and the total count."""
    stderr = np.sqrt(sum(e["stderr"] ** 2 for e in estimates)) / len(estimates)
    value = sum(e["value"] for e in estimates) / len(estimates)
    return {"value": float(value), "stderr": float(stderr), "n": sum(e["n"] for e in estimates)}
