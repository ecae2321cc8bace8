"""What people and scripts ask about a save directory: what is there, is it whole, what may go.

No torch in here, no process group; reads every byte when asked to verify.
"""

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umer1.checkpoints import layout
from umer1.checkpoints.safe_pickle import check_pickles


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint, by its manifest and the sizes of its files; contents unread."""

    path: Path
    bytes: int  # on disk, hidden files included
    manifest: dict[str, Any] | None  # None when damaged
    problem: str | None  # None when every file is there with its size

    def summary(self) -> dict[str, Any]:
        """For people and JSON."""
        found = {"checkpoint": str(self.path), "bytes": self.bytes, "problem": self.problem}
        if self.manifest is not None:
            held = ("iteration", "optimizer", "dtype", "layout")
            found |= {name: self.manifest[name] for name in held if name in self.manifest}
        return found


def entry(path: Path) -> Entry:
    """`path` need not be whole."""
    size = _bytes_below(path)
    try:
        return Entry(path, size, layout.read_manifest(path), None)
    except ValueError as error:
        return Entry(path, size, None, str(error))


def _bytes_below(path: Path) -> int:
    """Of regular files; what a run that goes on removes meanwhile is left out."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                status = os.lstat(os.path.join(folder, name))
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def verify(path: Path, progress: Callable[[int], None] = lambda size: None) -> str | None:
    """Read every byte of a checkpoint: what is wrong with it, or None.

    progress: called with the bytes of each file that has been read.
    """
    found = entry(path)
    if found.problem:
        return found.problem
    names = sorted(found.manifest["files"])
    for index, name in enumerate(names):
        try:
            damaged = layout.corrupt_files(path, found.manifest, index, len(names))
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if damaged:
            return f"the content of {name} is not what was written (CRC-32)"
        progress(found.manifest["files"][name]["size"])
    try:
        check_pickles(path, set(names))
    except ValueError as error:
        return str(error)
    return None
