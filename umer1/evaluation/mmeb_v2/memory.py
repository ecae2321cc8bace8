"""What a run found on the disk, kept beside its vectors: one that goes on looks again only where something changed.

    OUTPUT/coverage/TASK.json              what of a task is there, and the files and folders that said so
    OUTPUT/scored/TASK_QUERY-TARGET.json   which of these states was embedded and scored, under which settings

They hold as long as every annotation file keeps size and time of change and every folder that was listed its time of
change, and are made anew otherwise: nothing depends on them but the time that a run takes.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.coverage import Coverage, cover
from umer1.evaluation.mmeb_v2.media_tree import MediaTree
from umer1.evaluation.mmeb_v2.readers import READERS
from umer1.evaluation.mmeb_v2.types import TaskData, TaskSpec
from umer1.files import write_text
from umer1.inference.replicas import on_first, share_with_all
from umer1.progress import Progress

_KNOWN = "known"
_FORMAT = 1  # of what is kept, and of what readers make of the same files


class Memory:
    """Of one data root, in `folder` (None: nothing is kept)."""

    def __init__(self, folder: str | Path | None, data_root: str | Path, num_frames: int, max_queries: int | None):
        self.folder = None if folder is None else Path(folder)
        self.data_root, self.num_frames, self.max_queries = data_root, num_frames, max_queries

    def recall(self, spec: TaskSpec) -> Coverage | None:
        """The coverage that is kept, where the disk is as it was."""
        kept = _read(self._coverage_path(spec.name)) if self.folder else None
        try:
            if kept is None or kept["of"] != self._of() or not MediaTree(self.data_root).still_so(kept["seen"]):
                return None
            return Coverage(**{**kept["coverage"], "examples": tuple(kept["coverage"]["examples"])})
        except (KeyError, TypeError, ValueError, AttributeError):
            return None  # of another version, or damaged

    def look(self, spec: TaskSpec) -> tuple[TaskData, Coverage, dict[str, Any] | None]:
        """(the task as it is on the disk, its coverage, for `keep`: what to compare later); errors of its reader."""
        tree = MediaTree(self.data_root)
        task = READERS[spec.layout](spec, tree, self.num_frames)
        return task, cover(task, self.max_queries), tree.seen()

    def keep(self, coverage: Coverage, seen: dict[str, Any] | None) -> None:
        """Remember a look; what was kept before goes, also where `seen` None says that this one is not to be kept."""
        path = self._coverage_path(coverage.task)
        if seen is None:
            path.unlink(missing_ok=True)
        else:
            _write(path, {"of": self._of(), "coverage": asdict(coverage), "seen": seen})

    def keep_scored(self, task: str, scoring: str, settings: list[str]) -> None:
        """Remember that a task was scored from the look that is kept; nothing where none is."""
        state = self._state(task)
        if state is not None:
            _write(self._scored_path(task, scoring), {"state": state, "settings": settings})

    def is_scored(self, task: str, scoring: str, settings: list[str]) -> bool:
        """Whether it was, from the look that is kept now (`recall` or `keep` of this run) and under these settings."""
        state = self._state(task)
        found = {"state": state, "settings": settings}
        return state is not None and _read(self._scored_path(task, scoring)) == found

    def _of(self) -> list[Any]:
        return [_FORMAT, str(MediaTree(self.data_root).root), self.num_frames, self.max_queries]

    def _coverage_path(self, task: str) -> Path:
        return self.folder / "coverage" / f"{task}.json"

    def _scored_path(self, task: str, scoring: str) -> Path:
        return self.folder / "scored" / f"{task}_{scoring}.json"

    def _state(self, task: str) -> str | None:
        try:
            return hashlib.sha256(self._coverage_path(task).read_bytes()).hexdigest()
        except OSError:
            return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value) + "\n")  # in ASCII: names in annotations may hold what UTF-8 has no bytes for


def survey(specs: list[TaskSpec], memory: Memory, state: ParallelState) -> list[Coverage]:
    """Coverage of every task, recalled or looked up by all ranks together; the same on each of them."""
    mine: dict[int, tuple[Coverage, Any]] = {}
    progress = Progress("umer1 eval: coverage", len(specs), unit="tasks", enabled=state.rank == 0)
    for number in range(state.rank, len(specs), state.world_size):
        spec = specs[number]
        try:
            known = memory.recall(spec)
            mine[number] = (known, _KNOWN) if known else memory.look(spec)[1:]
        except (UserError, OSError) as error:
            mine[number] = Coverage(spec.name, unreadable=str(error)), None
        progress.add(min(state.world_size, len(specs) - number))
    progress.finish()
    found = {number: entry for part in share_with_all(mine, state) for number, entry in part.items()}

    def keep() -> None:
        for coverage, seen in found.values():
            if seen != _KNOWN:
                memory.keep(coverage, seen)

    if memory.folder:
        on_first(keep, state)
    return [found[number][0] for number in range(len(specs))]
