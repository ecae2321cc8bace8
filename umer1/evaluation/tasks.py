"""A retrieval benchmark on disk: meta.json, and per task its queries and its pool of candidates.

meta.json                 {"benchmark", "digest", "data_root": where media paths start, "tasks": {name: task}}
task                      {"metric", "queries": path, "candidates": path}; paths relative to meta.json
queries, candidates       lines as `umer1 encode` reads them; a query also has "label" (a candidate's id) and may
                          have "groups": {split: group}
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from umer1.errors import UserError
from umer1.evaluation.modes import METRICS
from umer1.inference.inputs import Input, bad_inputs_message, read_inputs


@dataclass(frozen=True, slots=True)
class Task:
    """Q queries, each with one right candidate of C."""

    name: str
    metric: str
    queries: list[Input]
    candidates: list[Input]
    labels: list[int]  # index of each query's right candidate
    groups: dict[str, list[str]]  # split -> each query's group, "" for none


_OF_A_QUERY = ("label", "solution", "groups")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """All tasks of one benchmark."""

    name: str
    fingerprint: str  # of what is asked and what can be answered, not of the training data beside it
    media_root: Path
    tasks: list[Task]


def read_benchmark(folder: str | Path) -> Benchmark:
    """Read and check `folder`; UserError naming the file where something is wrong."""
    folder = Path(folder)
    meta_path = folder / "meta.json"
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        tasks = [_read_task(folder, name, entry) for name, entry in meta["tasks"].items()]
        fingerprint = hashlib.sha256()
        for entry in meta["tasks"].values():
            for part in ("queries", "candidates"):
                fingerprint.update((folder / entry[part]).read_bytes())
        root = folder / meta["data_root"]
        return Benchmark(str(meta["benchmark"]), fingerprint.hexdigest()[:16], root, tasks)
    except OSError as error:
        raise UserError(
            f"{meta_path}: cannot be read ({error.strerror}); give the root of a generated mini-MMEB"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{meta_path}: not the description of a benchmark ({error!r})") from None


def _read_task(folder: Path, name: str, entry: dict) -> Task:
    if entry["metric"] not in METRICS:
        raise ValueError(f"metric {entry['metric']!r} of {name} is not one of {', '.join(METRICS)}")
    queries, candidates = (_inputs(folder / entry[part]) for part in ("queries", "candidates"))
    records = [json.loads(line) for line in (folder / entry["queries"]).read_bytes().splitlines() if line.strip()]
    places = {candidate.id: index for index, candidate in enumerate(candidates)}
    lost = [record["id"] for record in records if record["label"] not in places]
    if lost:
        raise ValueError(f"queries {lost[:5]} of {name} have labels that are no candidate's id")
    splits = dict.fromkeys(split for record in records for split in record.get("groups", {}))
    return Task(
        name=name,
        metric=entry["metric"],
        queries=queries,
        candidates=candidates,
        labels=[places[record["label"]] for record in records],
        groups={split: [record.get("groups", {}).get(split, "") for record in records] for split in splits},
    )


def _inputs(path: Path) -> list[Input]:
    inputs, bad = read_inputs(path, _OF_A_QUERY)
    if bad:
        raise UserError(bad_inputs_message(path, bad, len(inputs) + len(bad)))
    return inputs
