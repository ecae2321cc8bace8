"""Adaptive mode on the tasks of MMEB-V2: who reasoned, at what cost, and the curve between disc, gen and oracle."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from umer1.evaluation.adaptive import AdaptiveRule, AdaptiveScores, choose_probes, fuse, worth_reasoning
from umer1.evaluation.mmeb_v2.score import TaskScore, rank_lists, score_predictions
from umer1.evaluation.mmeb_v2.types import TaskData
from umer1.evaluation.modes import CURVE_PRICES
from umer1.evaluation.report import table


def price_curve(
    task: TaskData,
    names: Sequence[str],
    lists: Mapping[str, np.ndarray],
    disc: TaskScore,
    chosen: AdaptiveScores,
    rule: AdaptiveRule,
) -> dict[str, dict[str, float]]:
    """Price -> {"reasoned": share of queries, "score": in the task's metric}, with the calibration of `chosen`.

    lists: score lists [Q, L] of disc and gen.  disc: the score of disc alone, which queries that do not reason have.
    """
    metric = task.spec.metric
    fused = rank_lists(task, fuse(lists["disc"], lists["gen"], chosen.calibration), names)
    without, with_reason = disc.per_query[metric], score_predictions(fused, task.queries).per_query[metric]
    probes = np.isin(np.arange(len(without)), choose_probes(len(without), rule))
    choice = (~np.isneginf(lists["disc"])).sum(axis=1) > 1  # one candidate: nothing to reason about
    points = {}
    for price in CURVE_PRICES:
        reasoned = (worth_reasoning(lists["disc"], chosen.calibration, price) | probes) & choice
        score = np.where(reasoned, with_reason, without).mean()
        points[str(price)] = {"reasoned": float(reasoned.mean()), "score": float(score)}
    return points


def adaptive_section(
    scores: Mapping[str, TaskScore],
    chosen: AdaptiveScores,
    curve: dict[str, dict[str, float]],
    seconds: Mapping[str, float],
    metric: str,
    rule: AdaptiveRule,
) -> dict[str, Any]:
    """JSON of one task.  seconds: mode -> seconds a query took when it was embedded, over all copies of the model.

    Adaptive mode's own are computed: every query in disc mode and the share that reasons in gen mode.
    """
    share = float(chosen.reasoned.mean())
    whole = {"disc": "disc-disc", "gen": "gen-gen", "oracle": "oracle", "adaptive": "adaptive"}
    return {
        "rule": asdict(rule),
        "calibration": asdict(chosen.calibration),
        "reasoned": share,
        "seconds_per_query": {**seconds, "adaptive": seconds["disc"] + share * seconds["gen"]},
        "scores": {mode: scores[scoring].summary[metric] for mode, scoring in whole.items()},
        "curve": curve,
    }


def adaptive_text(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of `adaptive_section`s by task, in per cent: each task, their plain mean, and the mean's curve."""
    rows = [_row(name, found) for name, found in tasks.items()]
    mean = _mean([{key: found[key] for key in ("reasoned", "seconds_per_query", "scores")} for found in tasks.values()])
    headers = ["adaptive", "disc", "gen", "adaptive", "oracle", "reasoned", "s/query disc", "gen", "adaptive"]
    blocks = [table(headers, [*rows, _row("mean", mean)])]
    curve = _mean([found["curve"] for found in tasks.values()])
    scores = mean["scores"]
    points = [("always disc", 0.0, scores["disc"])]
    points += [(f"price {price}", curve[price]["reasoned"], curve[price]["score"]) for price in reversed(curve)]
    points += [("always gen", 1.0, scores["gen"])]
    rows = [[name, f"{100 * share:.1f}", f"{100 * score:.2f}"] for name, share, score in points]
    rows.append(["oracle", "", f"{100 * scores['oracle']:.2f}"])
    blocks.append(table(["curve of the mean", "reasoned", "score"], rows))
    lead = scores["oracle"] - scores["gen"]
    part = f"{100 * (scores['adaptive'] - scores['gen']) / lead:.0f}%" if lead > 0 else "nothing to have"
    return "\n\n".join(blocks) + f"\nof the oracle's lead over gen: {part}"


def _row(name: str, found: Mapping[str, Any]) -> list[str]:
    scores, seconds = found["scores"], found["seconds_per_query"]
    cells = [f"{100 * scores[mode]:.1f}" for mode in ("disc", "gen", "adaptive", "oracle")]
    cells.append(f"{100 * found['reasoned']:.1f}")
    return [name, *cells, *(f"{seconds[mode]:.3g}" for mode in ("disc", "gen", "adaptive"))]


def _mean(parts: list[Any]) -> Any:
    """Of numbers, or of dictionaries that have the same keys, key by key."""
    if isinstance(parts[0], Mapping):
        return {key: _mean([part[key] for part in parts]) for key in parts[0]}
    return sum(parts) / len(parts)
