"""Scores of a model out of results.json files of `umer1 eval`, as a model card and the hub's metadata show them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umer1.errors import UserError

# What mini-MMEB measures to tell what thoughts are worth, and no way to use a model.
_PROBES = ("empty_thoughts", "shuffled_thoughts")


@dataclass(frozen=True, slots=True)
class Score:
    """One number."""

    task: str
    metric: str  # "hit@1", ...; "mean" of a column over tasks
    way: str  # how it was scored: "disc", "gen", "gen-disc" (query mode, target mode), "oracle", "adaptive", ...
    value: float  # per cent
    queries: int | None  # None where it is a mean over tasks


@dataclass(frozen=True, slots=True)
class Results:
    """One results.json."""

    benchmark: str
    scores: list[Score]
    notes: list[str] = field(default_factory=list)  # what a reader has to know beside the numbers
    sha256: str | None = None  # of the weights that were scored, where the file says so


def read_results(path: str | Path) -> Results:
    """Every task's scores and the means.  UserError when the file is no result of `umer1 eval`."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        scores = [score for name, entry in found["tasks"].items() for score in _task(name, entry, found)]
        return Results(found["benchmark"], scores + _means(found), found.get("notes", []), found.get("model_sha256"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--results {path}: not a results.json of umer1 eval ({error!r})") from None


def _task(name: str, entry: dict[str, Any], results: dict[str, Any]) -> list[Score]:
    metric, score = entry["metric"], entry["score"]
    if not isinstance(score, dict):  # MMEB-V2: one way of scoring in a file
        return [Score(name, metric, results["scoring"], 100 * score, entry["num_queries"])]
    return [
        Score(name, metric, way, 100 * estimate["value"], estimate["n"])
        for way, estimate in score.items()
        if way not in _PROBES
    ]


def _means(results: dict[str, Any]) -> list[Score]:
    if "columns" in results:
        means = {name: {results["scoring"]: entry["score"]} for name, entry in results["columns"].items()}
    else:
        means = {"mean": {way: estimate["value"] for way, estimate in results["mean"]["score"].items()}}
    return [
        Score(column, "mean", way, 100 * value, None)
        for column, ways in means.items()
        for way, value in ways.items()
        if value is not None and way not in _PROBES
    ]
