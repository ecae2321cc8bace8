"""From the vectors of one task to its scores: rankings of names, and the reference's metrics of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from umer1.evaluation.mmeb_v2.types import Query, TaskData
from umer1.evaluation.ranking_metrics import ranked_relevance, ranking_metrics
from umer1.evaluation.retrieval import UNIT, check_unit_rows, ranking
from umer1.evaluation.topk import top_k
from umer1.progress import Progress

# Where a query ranks more candidates than this, only the first _DEPTH are kept: lists of names of a million would not
# fit, and no metric looks further than rank 10.
_FULL = 100_000
_DEPTH = 1_000


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Scores of one task's Q queries."""

    per_query: dict[str, np.ndarray]  # metric -> float64 [Q], in the order of the reference's score file
    summary: dict[str, float]  # metric -> mean over the queries
    predictions: list[list[str]]  # names of each query's candidates, best first


def score_task(
    task: TaskData,
    queries: np.ndarray,
    names: Sequence[str],
    targets: np.ndarray,
    *,
    device: torch.device | str | None = None,
    within: float = UNIT,
) -> TaskScore:
    """Scores of `queries` float32 [Q, D] against `targets` float32 [C, D], which are the candidates `names` in order.

    Similarity: dot products summed in float64 and rounded to float32, so that it depends neither on the device nor on
    what stands beside a vector; equal ones in candidate order.  A ranking that takes long says how far it is.
    ValueError where vectors do not fit the task, are not finite or not of unit length (to `within`).
    """
    _check(task, queries, names, targets, within)
    if task.spec.candidates == "global":
        k = len(names) if len(names) <= _FULL else _DEPTH
        progress = Progress(f"ranking {task.spec.name}", len(names), unit="candidates")
        order = top_k(queries, targets, k, device=device, sum_in=torch.float64, progress=progress.add)[1]
        predictions = [[names[place] for place in row] for row in order.tolist()]
    else:
        lists = score_lists(task, queries, names, targets, within)
        predictions = rank_lists(task, lists, names)
    return score_predictions(predictions, task.queries)


def score_lists(
    task: TaskData, queries: np.ndarray, names: Sequence[str], targets: np.ndarray, within: float = UNIT
) -> np.ndarray:
    """Similarities float32 [Q, L] of each query to its pool in the pool's order, -inf behind the end of shorter pools.

    The pool is `Query.cand_names` where candidates are local, else all `names`.
    """
    _check(task, queries, names, targets, within)
    if task.spec.candidates == "global":
        return _products(queries, targets)
    places = {name: place for place, name in enumerate(names)}
    lists = np.full((len(queries), max((len(q.cand_names) for q in task.queries), default=0)), -np.inf, np.float32)
    members: dict[tuple[str, ...], list[int]] = {}  # classification: all queries have one pool
    for row, query in enumerate(task.queries):
        members.setdefault(query.cand_names, []).append(row)
    for pool, rows in members.items():
        lists[rows, : len(pool)] = _products(queries[rows], targets[[places[name] for name in pool]])
    return lists


def rank_lists(task: TaskData, lists: np.ndarray, names: Sequence[str]) -> list[list[str]]:
    """Names in the order of falling scores of `score_lists`' [Q, L], equal ones in the pool's order."""
    predictions = []
    for query, order in zip(task.queries, ranking(lists), strict=True):
        pool = names if task.spec.candidates == "global" else query.cand_names
        # what pads the list is -inf: it stands last
        predictions.append([pool[place] for place in order[: len(pool)].tolist()])
    return predictions


def score_predictions(predictions: list[list[str]], queries: Sequence[Query]) -> TaskScore:
    """The metrics of rankings of names, whoever made them; ValueError where there is no query."""
    if not queries:
        raise ValueError("no query to score")
    per_query = ranking_metrics(ranked_relevance(predictions, [relevance(query) for query in queries]))
    return TaskScore(per_query, {name: float(values.mean()) for name, values in per_query.items()}, predictions)


def relevance(query: Query) -> dict[str, float]:
    """Label -> relevance; the highest of a label that is named twice."""
    found: dict[str, float] = {}
    scores = (1.0,) * len(query.label_names) if query.rel_scores is None else query.rel_scores
    for name, value in zip(query.label_names, scores, strict=True):
        found[name] = max(value, found.get(name, value))
    return found


def _products(queries: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return (queries.astype(np.float64) @ targets.astype(np.float64).T).astype(np.float32)


def _check(task: TaskData, queries: np.ndarray, names: Sequence[str], targets: np.ndarray, within: float) -> None:
    if len(queries) != len(task.queries) or len(targets) != len(names) or len(set(names)) != len(names):
        raise ValueError(
            f"{task.spec.name}: {len(queries)} vectors for {len(task.queries)} queries, {len(targets)} vectors for "
            f"{len(names)} candidates of {len(set(names))} names; there must be one for each"
        )
    if task.spec.candidates == "local":
        lacking = {name for query in task.queries for name in query.cand_names}.difference(names)
        if lacking:
            raise ValueError(f"{task.spec.name}: candidates without a vector: {sorted(lacking)[:5]}")
        if not all(query.cand_names for query in task.queries):
            raise ValueError(f"{task.spec.name}: a query without candidates cannot be ranked")
    check_unit_rows(f"{task.spec.name}, queries", queries, within)
    check_unit_rows(f"{task.spec.name}, candidates", targets, within)
