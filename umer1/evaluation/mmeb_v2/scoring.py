"""From an evaluation's folder to results: one pair of modes as a run ends its tasks, all pairs from stored vectors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from umer1 import __version__
from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.adaptive_results import adaptive_section
from umer1.evaluation.mmeb_v2.config import MMEBCommand, MMEBConfig
from umer1.evaluation.mmeb_v2.coverage import MISSING_MEDIA, Kept, leave_out
from umer1.evaluation.mmeb_v2.encode import side_name
from umer1.evaluation.mmeb_v2.memory import Memory
from umer1.evaluation.mmeb_v2.modes import MODES, score_modes
from umer1.evaluation.mmeb_v2.readers import read_task
from umer1.evaluation.mmeb_v2.reference_files import (
    ReferenceNames,
    find_reference,
    score_reference,
    write_reference_files,
)
from umer1.evaluation.mmeb_v2.registry import TASKS
from umer1.evaluation.mmeb_v2.results import make_results, results_text, task_entry, write_results
from umer1.evaluation.mmeb_v2.score import score_task
from umer1.evaluation.mmeb_v2.settings import FILE
from umer1.evaluation.mmeb_v2.store import Store, Stored
from umer1.evaluation.mmeb_v2.types import TaskData, TaskSpec


class Scorer:
    """Scores each task of a run and writes its files.  Rank 0 only.

    results_QUERY-TARGET.json holds every task that was scored in the folder by this pair of modes and this model, by
    this run and earlier ones; results.json is the same for the pair that was scored last.
    """

    def __init__(self, command: MMEBCommand, device: torch.device):
        self.command, self.device = command, device
        self.scoring = f"{command.eval.query_mode}-{command.eval.target_mode}"
        self.entries: dict[str, dict[str, Any]] = {}

    def start(self, specs: list[TaskSpec], store: Store, memory: Memory, settings: list[str]) -> set[str]:
        """Take over what the folder's results have; the tasks that need no more work, since all their files are there
        and are of what the disk holds now."""
        self.entries = earlier_entries(self.command.eval.output, f"results_{self.scoring}", store.model_sha256)
        done = {spec.name for spec in specs if self._has_files(spec.name, store)}
        return {name for name in done & self.entries.keys() if memory.is_scored(name, self.scoring, settings)}

    def _has_files(self, name: str, store: Store) -> bool:
        sides = [side_name(name, side, mode) for side, mode in self._modes().items()]
        files = self._files(name)
        wanted = [files.info(), files.predictions(), files.scores(), *map(store.vectors_path, sides)]
        wanted += [files.queries(), files.targets()] if self.command.eval.reference_vectors else []
        return all(map(store.is_there, sides)) and all(path.is_file() for path in wanted)

    def _modes(self) -> dict[str, str]:
        return {"qry": self.command.eval.query_mode, "tgt": self.command.eval.target_mode}

    def _files(self, name: str) -> ReferenceNames:
        return ReferenceNames(Path(self.command.eval.output), name, *self._modes().values())

    def task_done(self, task: TaskData, store: Store) -> None:
        """Score a task whose two sides are in `store`."""
        config, name = self.command.eval, task.spec.name
        modes = self._modes()
        sides = {side: store.read(side_name(name, side, mode), task.fingerprint, mode) for side, mode in modes.items()}
        kept = left(task, [sides["qry"]], [sides["tgt"]], config.max_queries)
        names = [candidate.name for candidate in kept.task.candidates]
        queries, targets = rows(sides["qry"], kept.numbers), rows(sides["tgt"], names)
        score = score_task(kept.task, queries, names, targets, device=self.device)
        vectors = (queries, names, targets) if config.reference_vectors else None
        write_reference_files(self._files(name), kept.task, score, vectors=vectors)
        self.entries[name] = task_entry(
            task.spec,
            score,
            fingerprint=task.fingerprint,
            coverage=coverage_of(task, kept),
            seconds=sum(side.seconds for side in sides.values()),
        )
        self._write(store.model_sha256)

    def _write(self, model_sha256: str) -> None:
        found = self._results(model_sha256)
        for stem in (f"results_{self.scoring}", "results"):
            write_results(found, self.command.eval.output, stem)

    def _results(self, model_sha256: str) -> dict[str, Any]:
        config = self.command.eval
        about = {
            "umer1": __version__,
            "model": self.command.engine.model,
            "model_sha256": model_sha256,
            "notes": _notes(config.max_queries, self.entries),
        }
        return make_results(self.entries, scoring=self.scoring, about=about)

    def report(self, model_sha256: str) -> str:
        """What people read when the run has ended; the files say it, too, where no task was left to be scored."""
        self._write(model_sha256)
        return results_text(self._results(model_sha256))


def earlier_entries(folder: str | Path, stem: str, model_sha256: str) -> dict[str, dict[str, Any]]:
    """The tasks in `stem`.json, in the paper's order; none where it is not there or of other weights."""
    path = Path(folder) / f"{stem}.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same, tasks = found["model_sha256"] == model_sha256, found["tasks"]
        return {name: dict(entry) for name, entry in tasks.items() if name in TASKS} if same else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the results of an evaluation ({error!r}); remove it") from None


def left(task: TaskData, queries: list[Stored], targets: list[Stored], max_queries: int | None) -> Kept:
    """The task less what some of the stored sides lost, and what the disk does not have and they neither."""
    numbers, names = ({*sides[0].keys}.intersection(*(side.keys for side in sides)) for sides in (queries, targets))
    absent = [number for number, query in enumerate(task.queries) if query.item.missing and number not in numbers]
    lost_queries = dict.fromkeys(absent, MISSING_MEDIA)
    absent = [found.name for found in task.candidates if found.item.missing and found.name not in names]
    lost_candidates = dict.fromkeys(absent, MISSING_MEDIA)
    for side in queries:
        lost_queries |= side.lost
    for side in targets:
        lost_candidates |= side.lost
    kept = leave_out(task, lost_queries, lost_candidates, max_queries)
    if not kept.task.queries:
        raise UserError(
            f"{task.spec.name}: nothing is left to be scored, no query could be embedded with its candidate"
        )
    return kept


def rows(side: Stored, keys: list) -> np.ndarray:
    """Embeddings float32 [len(keys), H] of `keys`."""
    places = {key: place for place, key in enumerate(side.keys)}
    absent = [key for key in keys if key not in places]
    if absent:
        raise UserError(
            f"vectors are missing for {len(absent)} inputs, e.g. {absent[:3]}: their media were not there when the "
            "others were made; run the model with another --output"
        )
    return side.embeddings[[places[key] for key in keys]]


def coverage_of(task: TaskData, kept: Kept) -> dict[str, Any]:
    """JSON: how much of the data the score is of."""
    return {
        "queries": len(task.queries),
        "candidates": len(task.candidates),
        "scored_queries": len(kept.task.queries),
        "scored_candidates": len(kept.task.candidates),
        "left_out_queries": kept.left_out_queries,
        "left_out_candidates": kept.left_out_candidates,
    }


def score_stored(config: MMEBConfig, specs: list[TaskSpec], say: Callable[[str], None]) -> None:
    """Every pair of modes, the oracle and adaptive mode of the selected tasks that `config.stored` has vectors of."""
    folder = Path(config.stored)
    try:
        settings = json.loads((folder / FILE).read_text(encoding="utf-8"))
        shared, model = settings["all"], settings["model"]
        store = Store(folder, shared["model_sha256"])
        max_queries, num_frames = shared["max_queries"], shared["image.num_frames"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"stored={config.stored!r} is no output of an MMEB-V2 evaluation ({error!r})") from None
    entries: dict[str, dict[str, Any]] = {}
    for spec in specs:
        there = {side: [m for m in MODES if store.is_there(side_name(spec.name, side, m))] for side in ("qry", "tgt")}
        if not all(there.values()):
            continue
        task = read_task(spec, config.data_root, num_frames=num_frames)
        sides = {
            side: {mode: store.read(side_name(spec.name, side, mode), task.fingerprint, mode) for mode in modes}
            for side, modes in there.items()
        }
        kept = left(task, list(sides["qry"].values()), list(sides["tgt"].values()), max_queries)
        names = [candidate.name for candidate in kept.task.candidates]
        queries = {mode: rows(side, kept.numbers) for mode, side in sides["qry"].items()}
        targets = {mode: rows(side, names) for mode, side in sides["tgt"].items()}
        found = score_modes(kept.task, names, queries, targets, config.rule())
        coverage = coverage_of(task, kept)
        for scoring, score in found.scores.items():
            entry = task_entry(spec, score, fingerprint=task.fingerprint, coverage=coverage)
            entries.setdefault(scoring, {})[spec.name] = entry
        if found.adaptive is not None:
            seconds = {mode: side.seconds / max(len(side.keys), 1) for mode, side in sides["qry"].items()}
            entries["adaptive"][spec.name]["adaptive"] = adaptive_section(
                found.scores, found.adaptive, found.curve, seconds, spec.metric, config.rule()
            )
    if not entries:
        raise UserError(f"{folder} has both sides of none of the selected tasks")
    about = {"umer1": __version__, "model": model, "model_sha256": store.model_sha256}
    _write_all(entries, about, max_queries, config.output, say)


def score_references(config: MMEBConfig, specs: list[TaskSpec], say: Callable[[str], None]) -> None:
    """The selected tasks that have files of the reference evaluation in `config.from_reference`, by pair of modes."""
    by_name = {spec.name: spec for spec in specs}
    entries: dict[str, dict[str, Any]] = {}
    for names in find_reference(config.from_reference, list(by_name)):
        score = score_reference(names, by_name[names.task], unpickle=config.unpickle)
        scoring = "-".join(mode for mode in (names.query_mode, names.target_mode) if mode) or "reference"
        entry = task_entry(by_name[names.task], score, fingerprint="")
        entries.setdefault(scoring, {})[names.task] = entry
    _write_all(entries, {"umer1": __version__, "files": str(config.from_reference)}, None, config.output, say)


def _write_all(
    entries: dict[str, dict[str, Any]],
    about: dict[str, Any],
    max_queries: int | None,
    output: str,
    say: Callable[[str], None],
) -> None:
    """results_SCORING.json and .txt of every way of scoring."""
    for scoring, tasks in entries.items():
        results = make_results(tasks, scoring=scoring, about={**about, "notes": _notes(max_queries, tasks)})
        write_results(results, output, f"results_{scoring}")
        say(results_text(results) + "\n")


def _notes(max_queries: int | None, entries: dict[str, dict[str, Any]]) -> list[str]:
    notes = []
    if max_queries is not None:
        notes.append(f"a smoke test: the first {max_queries} queries of each task alone")
    partial = [
        name
        for name, entry in entries.items()
        if entry["coverage"] and (entry["coverage"]["left_out_queries"] or entry["coverage"]["left_out_candidates"])
    ]
    if partial:
        notes.append(f"queries or candidates are left out of {', '.join(partial)}: their scores are not comparable")
    known = ((name, TASKS[name].options.get("note")) for name in entries)
    return notes + [f"{name}: {note}" for name, note in known if note]
