"""results.json and results.txt of an MMEB-V2 evaluation: tasks, the paper's columns, and the published rows beside.

A column is the plain mean over its tasks and has a number only where all of them were scored; else it says how many.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umer1.evaluation.mmeb_v2.adaptive_results import adaptive_text
from umer1.evaluation.mmeb_v2.published import COLUMNS, PER_TASK, PUBLISHED
from umer1.evaluation.mmeb_v2.registry import GROUPS, TASKS
from umer1.evaluation.mmeb_v2.score import TaskScore
from umer1.evaluation.mmeb_v2.types import TaskSpec
from umer1.evaluation.report import table
from umer1.evaluation.retrieval import estimate
from umer1.files import write_json, write_text

# Rows that a way of scoring is to be compared with.
_ORACLES = tuple(name for name in PUBLISHED if name.startswith("Oracle"))
_MODELS = tuple(name for name in PUBLISHED if name not in _ORACLES)


def task_entry(
    spec: TaskSpec, score: TaskScore, *, fingerprint: str, coverage: Any = None, seconds: float | None = None
) -> dict[str, Any]:
    """One task's section: its metric and score, every other metric, what was left out, seconds, the data's version."""
    values = estimate(score.per_query[spec.metric])
    return {
        "group": spec.group,
        "modality": spec.modality,
        "metric": spec.metric,
        "score": values["value"],
        "stderr": values["stderr"],
        "num_queries": values["n"],
        "metrics": dict(score.summary),
        "coverage": coverage,
        "seconds": seconds,
        "data_fingerprint": fingerprint,
    }


def column_means(scores: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Column -> {"score": plain mean over its tasks, None unless all are in `scores`; "tasks": how many are; "of"}."""
    found = {}
    for column, groups in COLUMNS.items():
        names = [name for group in groups for name in GROUPS[group]]
        done = [scores[name] for name in names if name in scores]
        mean = sum(done) / len(done) if len(done) == len(names) else None
        found[column] = {"score": mean, "tasks": len(done), "of": len(names)}
    return found


def make_results(entries: Mapping[str, Mapping[str, Any]], *, scoring: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of results.json.

    entries: task -> `task_entry`.  scoring: "gen-disc" (query mode, target mode), "oracle" or "adaptive".  about: what
    holds for all tasks, such as the model, its hash and notes on the data; kept as it stands.
    """
    entries = {name: entries[name] for name in TASKS if name in entries}
    scores = {name: entry["score"] for name, entry in entries.items()}
    columns = column_means(scores)
    rows = _ORACLES if scoring == "oracle" else _MODELS
    return {
        "benchmark": "mmeb-v2",
        "scoring": scoring,
        **about,
        "columns": columns,
        "published": {name: PUBLISHED[name] for name in rows},
        "difference": {
            name: {
                column: 100 * columns[column]["score"] - value
                for column, value in PUBLISHED[name].items()
                if columns[column]["score"] is not None
            }
            for name in rows
        },
        "tasks": {name: dict(entry) for name, entry in entries.items()},
    }


def results_text(results: Mapping[str, Any]) -> str:
    """The tables people read, in per cent."""
    blocks = [_about_text(results), _column_table(results), _task_table(results)]
    adaptive = {name: entry["adaptive"] for name, entry in results["tasks"].items() if "adaptive" in entry}
    return "\n\n".join([*blocks, adaptive_text(adaptive)] if adaptive else blocks)


def write_results(results: Mapping[str, Any], folder: str | Path, stem: str = "results") -> None:
    """`stem`.json and `stem`.txt in `folder`."""
    write_json(Path(folder) / f"{stem}.json", results)
    write_text(Path(folder) / f"{stem}.txt", results_text(results) + "\n")


def _about_text(results: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in results.items() if isinstance(value, (str, int, float))}
    notes = results.get("notes", [])
    return "\n".join([*(f"{name}: {value}" for name, value in shown.items()), *(f"note: {note}" for note in notes)])


def _column_table(results: Mapping[str, Any]) -> str:
    columns = results["columns"]
    own = [
        f"{entry['tasks']} of {entry['of']}" if entry["score"] is None else f"{100 * entry['score']:.1f}"
        for entry in columns.values()
    ]
    rows = [["this run", *own]]
    for name, published in results["published"].items():
        rows.append([name, *(f"{published[column]:.1f}" if column in published else "-" for column in columns)])
        gap = results["difference"][name]
        if gap:
            rows.append(["  difference", *(f"{gap[column]:+.1f}" if column in gap else "-" for column in columns)])
    return table(["model", *columns], rows)


def _task_table(results: Mapping[str, Any]) -> str:
    """Each task beside UME-R1-2B in gen mode, the one model that the paper reports by task."""
    rows = []
    for name, entry in results["tasks"].items():
        score, published = 100 * entry["score"], PER_TASK[name]
        rows.append(
            [name, entry["group"], entry["metric"], f"{entry['num_queries']:,}", f"{score:.1f}"]
            + [f"{100 * entry['stderr']:.1f}", f"{published:.1f}", f"{score - published:+.1f}"]
            + [entry["data_fingerprint"][:12]]
        )
    headers = ["task", "group", "metric", "queries", "score", "±", "UME-R1-2B gen", "difference", "data version"]
    return table(headers, rows)
