"""Which checkpoint to load: rank 0 looks for the newest one that is whole, all ranks help to check it and agree."""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from umer1.checkpoints import layout
from umer1.checkpoints.safe_pickle import check_pickles
from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError


def find_checkpoint(place: Path, state: ParallelState, iteration: int | None = None) -> Path | None:
    """The newest valid checkpoint of a save directory, or `place` itself when it is one; collective.

    None: `place` has no checkpoint.  Damaged ones are passed over with a message on standard error; when nothing but
    damaged ones is there, UserError.  `iteration` asks for that one and accepts no other.
    """
    candidates = _broadcast(_candidates(place, iteration) if state.rank == 0 else None)
    damaged = []
    for path in map(Path, candidates):
        problem = _problem(path, state)
        if problem is None:
            _note_tracker(place, path, state)
            return path
        damaged.append(f"{path}: {problem}")
        if state.rank == 0:
            print(f"checkpoint: DAMAGED, passed over: {damaged[-1]}", file=sys.stderr, flush=True)
    if damaged:
        raise UserError(
            f"{place} holds {len(damaged)} checkpoint(s) and none is whole; move them away to start anew:\n"
            + "\n".join(f"  - {line}" for line in damaged)
        )
    return None


def is_checkpoint_place(path: Path) -> bool:
    """Whether `path` is a checkpoint or a save directory with one (valid or not)."""
    return (path / layout.MANIFEST).is_file() or bool(layout.list_iterations(path))


def read_json(path: Path) -> Any:
    """A JSON file of a checkpoint that has passed the checks."""
    return json.loads(path.read_text(encoding="utf-8"))


def _candidates(place: Path, iteration: int | None) -> list[str]:
    paths = layout.newest_first(place)
    return [str(path) for path in paths if iteration is None or path.name == layout.iteration_path("", iteration).name]


def _problem(path: Path, state: ParallelState) -> str | None:
    """What is wrong with a checkpoint, None if nothing; form and pickles by rank 0, contents by all ranks together."""
    verdict: list[Any] = [None, None]
    if state.rank == 0:
        try:
            verdict[0] = layout.read_manifest(path)
        except ValueError as error:
            verdict[1] = str(error)
    manifest, problem = _broadcast(verdict)
    if problem:
        return problem
    gathered: list[Any] = [None] * state.world_size
    dist.all_gather_object(gathered, _corrupt(path, manifest, state))
    corrupt = sorted(name for names in gathered for name in names)
    if corrupt:
        return f"the contents of {', '.join(corrupt[:4])} are not what was written (CRC-32)"
    problem = None
    if state.rank == 0:
        try:
            check_pickles(path, set(manifest["files"]))
        except ValueError as error:
            problem = str(error)
    return _broadcast(problem)


def _corrupt(path: Path, manifest: dict[str, Any], state: ParallelState) -> list[str]:
    try:
        return layout.corrupt_files(path, manifest, state.rank, state.world_size)
    except OSError as error:
        return [str(error)]


def _note_tracker(place: Path, chosen: Path, state: ParallelState) -> None:
    """Say when the tracker names another iteration: a run died between rename and tracker, or files were moved."""
    if state.rank == 0 and chosen.parent == place:
        named = layout.read_tracker(place)
        if named != int(chosen.name.removeprefix("iter_")):
            what = "is missing or unreadable" if named is None else f"names iteration {named}"
            print(f"checkpoint: {layout.TRACKER} {what}; the newest valid one is {chosen.name}", file=sys.stderr)


def _broadcast(value: Any) -> Any:
    message = [value]
    dist.broadcast_object_list(message, src=0)
    return message[0]
