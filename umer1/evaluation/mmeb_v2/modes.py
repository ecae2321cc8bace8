"""Every way to combine the modes of one task, from its vectors alone: mixed modes, the oracle, adaptive mode."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from umer1.evaluation.adaptive import AdaptiveRule, AdaptiveScores, adaptive_scores
from umer1.evaluation.mmeb_v2.adaptive_results import price_curve
from umer1.evaluation.mmeb_v2.score import TaskScore, rank_lists, score_lists, score_predictions, score_task
from umer1.evaluation.mmeb_v2.types import TaskData

MODES = ("disc", "gen")


@dataclass(frozen=True, slots=True)
class ModeScores:
    """Scores of one task by way of scoring, over the same queries and candidates in all of them."""

    scores: dict[str, TaskScore]  # "disc-gen" (query mode, target mode), ..., and "oracle", "adaptive" where they exist
    adaptive: AdaptiveScores | None  # who reasoned, and the calibration; None where a mode is missing
    curve: dict[str, dict[str, float]] = field(default_factory=dict)  # adaptive mode by its price


def score_modes(
    task: TaskData,
    names: Sequence[str],
    queries: Mapping[str, np.ndarray],
    targets: Mapping[str, np.ndarray],
    rule: AdaptiveRule,
) -> ModeScores:
    """Score every pair of modes that `queries` (mode -> float32 [Q, D]) and `targets` (mode -> [C, D]) allow.

    Rows are in the order of the task's queries and of `names` in every mode.  The oracle and adaptive mode compare
    disc-disc with gen-gen, and exist where both do.
    """
    scores = {
        f"{query}-{target}": score_task(task, queries[query], names, targets[target])
        for query in MODES
        for target in MODES
        if query in queries and target in targets
    }
    chosen, curve = None, {}
    if "disc-disc" in scores and "gen-gen" in scores:
        scores["oracle"] = oracle(task, scores["disc-disc"], scores["gen-gen"])
        lists = {mode: score_lists(task, queries[mode], names, targets[mode]) for mode in MODES}
        chosen = adaptive_scores(lists["disc"], lists["gen"], rule)
        scores["adaptive"] = score_predictions(rank_lists(task, chosen.scores, names), task.queries)
        curve = price_curve(task, names, lists, scores["disc-disc"], chosen, rule)
    return ModeScores(scores, chosen, curve)


def oracle(task: TaskData, disc: TaskScore, gen: TaskScore) -> TaskScore:
    """Per query the list that is better in the task's metric, gen's where both are as good; all metrics are of it."""
    metric = task.spec.metric
    use_disc = disc.per_query[metric] > gen.per_query[metric]
    per_query = {name: np.where(use_disc, disc.per_query[name], values) for name, values in gen.per_query.items()}
    predictions = [
        first if better else second
        for better, first, second in zip(use_disc.tolist(), disc.predictions, gen.predictions, strict=True)
    ]
    return TaskScore(per_query, {name: float(values.mean()) for name, values in per_query.items()}, predictions)
