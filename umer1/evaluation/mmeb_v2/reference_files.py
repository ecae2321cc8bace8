"""The files of the reference evaluation, written and read: data set D, query mode q, target mode t.

D_q_qry             pickled float32 [N, dim]
D_t_tgt             pickled dictionary: candidate name -> float32 [dim]
D_q_t_info.jsonl    a line a query: cand_names, label_name, rel_scores where relevance is graded
D_q_t_pred.jsonl    a line a query: prediction (names, best first), label, rel_scores
D_q_t_score.json    metric -> mean, then num_pred and num_data

Files without modes in their names (D_qry, D_tgt, D_info.jsonl, ...), as models with one mode leave them, are read, too.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.safe_arrays import load_array, load_named_arrays
from umer1.evaluation.mmeb_v2.score import TaskScore, score_predictions, score_task
from umer1.evaluation.mmeb_v2.types import Candidate, Item, Query, TaskData, TaskSpec
from umer1.evaluation.retrieval import UNIT_IN_BF16
from umer1.files import atomic_path, write_text

_MODES = ("disc", "gen")


@dataclass(frozen=True, slots=True)
class ReferenceNames:
    """The files of one task in one pair of modes; modes None where the names have none."""

    folder: Path
    task: str
    query_mode: str | None
    target_mode: str | None

    def queries(self) -> Path:
        return self._path(self.query_mode, "qry")

    def targets(self) -> Path:
        return self._path(self.target_mode, "tgt")

    def info(self) -> Path:
        return self._path(self.query_mode, self.target_mode, "info.jsonl")

    def predictions(self) -> Path:
        return self._path(self.query_mode, self.target_mode, "pred.jsonl")

    def scores(self) -> Path:
        return self._path(self.query_mode, self.target_mode, "score.json")

    def _path(self, *words: str | None) -> Path:
        return self.folder / "_".join([self.task, *(word for word in words if word is not None)])


def write_reference_files(
    names: ReferenceNames,
    task: TaskData,
    score: TaskScore,
    *,
    vectors: tuple[np.ndarray, list[str], np.ndarray] | None,
) -> None:
    """All files of one task; `vectors` (queries [Q, D], candidate names, targets [C, D]) None leaves the pickles out.

    The score file comes last: where it is, the others are.
    """
    if vectors is not None:
        queries, candidates, targets = vectors
        _dump(names.queries(), np.ascontiguousarray(queries, dtype=np.float32))
        rows = np.ascontiguousarray(targets, dtype=np.float32)
        _dump(names.targets(), {name: rows[place] for place, name in enumerate(candidates)})
    _write_lines(names.info(), [_info(query) for query in task.queries])
    predictions = [
        {
            "prediction": prediction,
            "label": list(query.label_names),
            "rel_scores": None if query.rel_scores is None else list(query.rel_scores),
        }
        for prediction, query in zip(score.predictions, task.queries, strict=True)
    ]
    _write_lines(names.predictions(), predictions)
    counts = {"num_pred": len(predictions), "num_data": len(task.queries)}
    write_text(names.scores(), json.dumps({**score.summary, **counts}, indent=4))


def find_reference(folder: str | Path, tasks: list[str]) -> list[ReferenceNames]:
    """Which of `tasks` have predictions or infos in `folder`, in the order of `tasks`; UserError where none has."""
    folder = Path(folder)
    pairs = [(query, target) for query in _MODES for target in _MODES] + [(None, None)]
    candidates = [ReferenceNames(folder, task, *pair) for task in tasks for pair in pairs]
    found = [names for names in candidates if names.predictions().is_file() or names.info().is_file()]
    if not found:
        raise UserError(f"{folder}: no file of the reference evaluation (TASK_disc_disc_pred.jsonl, ...) is there")
    return found


def score_reference(names: ReferenceNames, spec: TaskSpec, *, unpickle: bool = False) -> TaskScore:
    """Score what the reference evaluation left: its rankings, or with `unpickle` its vectors, ranked anew.

    UserError naming a file that is missing, damaged or does not fit.
    """
    if not unpickle:
        lines = _read_lines(names.predictions(), ("prediction", "label"))
        queries = [_query(names.predictions(), line, "prediction", "label") for line in lines]
        rankings = [list(query.cand_names) for query in queries]
        return _scored(names.predictions(), lambda: score_predictions(rankings, queries))
    lines = _read_lines(names.info(), ("cand_names", "label_name"))
    queries = [_query(names.info(), line, "cand_names", "label_name") for line in lines]
    vectors, named = load_array(names.queries()), load_named_arrays(names.targets())
    task = TaskData(spec, queries, [Candidate(name, Item("")) for name in named], fingerprint="")

    def score() -> TaskScore:
        # as they stand, like the reference evaluation: models that normalise in bf16 leave lengths of 0.998 to 1.002
        return score_task(task, vectors, list(named), np.stack(list(named.values())), within=UNIT_IN_BF16)

    return _scored(names.queries(), score)


def _scored(path: Path, score: Callable[[], TaskScore]) -> TaskScore:
    try:
        return score()
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be scored ({error})") from None


def _info(query: Query) -> dict[str, Any]:
    label = list(query.label_names) if query.label_is_list or len(query.label_names) != 1 else query.label_names[0]
    found = {"cand_names": list(query.cand_names), "label_name": label}
    return found if query.rel_scores is None else {**found, "rel_scores": list(query.rel_scores)}


def _query(path: Path, line: dict[str, Any], names: str, label: str) -> Query:
    labels = line[label] if isinstance(line[label], list) else [line[label]]
    scores = line.get("rel_scores")
    if not isinstance(line[names], list) or not (scores is None or _are_numbers(scores, len(labels))):
        raise UserError(f"{path}: {names} must be a list, and rel_scores one number for each label")
    return Query(
        Item(""),
        cand_names=tuple(map(str, line[names])),
        label_names=tuple(map(str, labels)),
        label_is_list=isinstance(line[label], list),
        rel_scores=None if scores is None else tuple(map(float, scores)),
    )


def _are_numbers(values: Any, count: int) -> bool:
    numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    return numbers and len(values) == count and all(abs(value) < 1e300 for value in values)


def _read_lines(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    bad = [number for number, line in enumerate(lines, 1) if not isinstance(line, dict) or not set(keys) <= set(line)]
    if bad or not lines:
        raise UserError(f"{path}: lines {bad[:5]} of {len(lines)} have no {' or '.join(keys)}")
    return lines


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _dump(path: Path, value: Any) -> None:
    with atomic_path(path) as aside, open(aside, "wb") as file:
        pickle.dump(value, file, protocol=4)  # what Python 3.8 to 3.13 write
