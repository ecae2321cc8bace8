"""Which candidates become whose negatives: positive-aware mining, as NV-Retriever (arXiv 2407.15831) has it.

A candidate near a query is a hard negative, or an answer that nobody marked as one.  What scores nearly as high as the
positive is taken for the latter: with s the score of the pair's positive, a negative has at most

    s - relative_margin * |s|        (TopK-PercPos; 0.05 leaves negatives below 95% of the positive's score)
    s - absolute_margin              (TopK-MarginPos)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from umer1.evaluation.topk import top_k
from umer1.mining.config import MineConfig
from umer1.mining.corpus import Corpus

_LISTS_BYTES = 1 << 30  # of scores and places that are found before negatives are taken from them
_BYTES_PER_CANDIDATE = 12  # float32 and int64


@dataclass(slots=True)
class Mined:
    """Of M pairs."""

    negatives: np.ndarray  # int64 [M, num_negatives]: places of candidates, hardest first; -1 where there is no more
    scores: np.ndarray  # float32 [M, num_negatives]; nan where there is none
    positive_scores: np.ndarray  # float32 [M]; nan where a side has no embedding
    right: np.ndarray  # int64 [M]: candidates passed over as a positive of this query, in this pair or another
    near: np.ndarray  # int64 [M]: those over the margin


def select(
    corpus: Corpus,
    queries: np.ndarray,
    candidates: np.ndarray,
    config: MineConfig,
    *,
    device: torch.device | None = None,
    progress: Callable[[int], None] | None = None,
) -> Mined:
    """Negatives of every pair.

    queries float32 [Q, D], candidates float32 [C, D]: unit vectors of the corpus' sides; rows of nan have none.
    Scores are products of float32 vectors, summed in float64 and rounded, so that equal vectors tie; ties are resolved
    by place.
    """
    count = len(corpus.pairs)
    mined = Mined(
        np.full((count, config.num_negatives), -1, dtype=np.int64),
        np.full((count, config.num_negatives), np.nan, dtype=np.float32),
        _products(queries, candidates, corpus),
        np.zeros(count, dtype=np.int64),
        np.zeros(count, dtype=np.int64),
    )
    right = _right(corpus)
    groups = np.array(corpus.candidates.groups, dtype=np.int64)
    good = np.isfinite(candidates).all(1)
    usable = np.isfinite(mined.positive_scores)
    for group in np.unique(groups):
        pool = np.flatnonzero((groups == group) & good)
        rows = np.flatnonzero((groups[corpus.positive_of] == group) & usable)
        wanted, place_of = np.unique(corpus.query_of[rows], return_inverse=True)
        if not len(wanted):
            continue
        # right answers are passed over: as many candidates more
        depths = config.top_k + np.array([len(right[query]) for query in wanted.tolist()])
        rows_of = np.split(rows[np.argsort(place_of, kind="stable")], np.cumsum(np.bincount(place_of))[:-1])
        for part in _parts(depths, len(pool)):
            depth = int(depths[part].max())
            scores, found = top_k(queries[wanted[part]], candidates[pool], depth, device=device, sum_in=torch.float64)
            for place, query in enumerate(part.tolist()):
                for row in rows_of[query].tolist():
                    _take(mined, row, scores[place], pool[found[place]], right[int(wanted[query])], config)
                if progress is not None:
                    progress(len(rows_of[query]))
    return mined


def _parts(depths: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Queries whose lists, of `depths` [Q] and at most `most` candidates, are held at once; like depths together, so
    that one query of ten thousand right answers does not make a million lists as long as its own."""
    order = np.argsort(depths, kind="stable")
    while len(order):
        held = np.minimum(depths[order], most) * np.arange(1, len(order) + 1) * _BYTES_PER_CANDIDATE
        count = max(1, int(np.searchsorted(held, _LISTS_BYTES, side="right")))
        yield order[:count]
        order = order[count:]


def _products(queries: np.ndarray, candidates: np.ndarray, corpus: Corpus, block: int = 4096) -> np.ndarray:
    """float32 [M]: each pair's own score."""
    found = np.empty(len(corpus.pairs), dtype=np.float32)
    for start in range(0, len(found), block):
        part = slice(start, start + block)
        left = queries[corpus.query_of[part]].astype(np.float64)
        found[part] = (left * candidates[corpus.positive_of[part]]).sum(1)
    return found


def _right(corpus: Corpus) -> dict[int, set[int]]:
    """Place of a query -> places of the positives of all pairs that ask it."""
    right: dict[int, set[int]] = {}
    for query, positive in zip(corpus.query_of.tolist(), corpus.positive_of.tolist(), strict=True):
        right.setdefault(query, set()).add(positive)
    return right


def _take(mined: Mined, row: int, scores: np.ndarray, places: np.ndarray, right: set[int], config: MineConfig) -> None:
    """The first of a query's candidates, best first, that are allowed."""
    bound = highest_score(float(mined.positive_scores[row]), config)
    taken = looked_at = passed = 0
    for score, place in zip(scores.tolist(), places.tolist(), strict=True):
        if looked_at == config.top_k or taken == config.num_negatives:
            break
        if place in right:
            mined.right[row] += 1
            continue
        looked_at += 1
        if score > bound:
            mined.near[row] += 1
        elif passed < config.skip_top:
            passed += 1
        else:
            mined.negatives[row, taken], mined.scores[row, taken] = place, score
            taken += 1


def highest_score(positive: float, config: MineConfig) -> float:
    """The score that a negative may have at most."""
    bounds = [float("inf")]
    if config.relative_margin is not None:
        bounds.append(positive - config.relative_margin * abs(positive))
    if config.absolute_margin is not None:
        bounds.append(positive - config.absolute_margin)
    return min(bounds)
