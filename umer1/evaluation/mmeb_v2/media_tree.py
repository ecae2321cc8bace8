"""The media and tables below a data root: what exists, by one scan a folder, and which frames of a video are shown.

A path that an annotation names is not trusted: one that is absolute, climbs out, or leads out of the root through a
link counts as missing, as opening it would fail (data/media.py).
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from umer1.data.bad_samples import BadSample
from umer1.data.media import MediaRoot, natural_order
from umer1.data.video_files import frame_places
from umer1.errors import UserError
from umer1.evaluation.mmeb_v2.tables import Annotation, find_annotation
from umer1.evaluation.mmeb_v2.types import Item
from umer1.files import atomic_path, remove_leftovers

FRAME_NAMES = (".jpg", ".jpeg", ".png")  # what the reference evaluation takes for a frame


class MediaTree:
    """Folders below `root`, each listed once and remembered as long as the tree lives: one tree a task."""

    def __init__(self, root: str | Path):
        self.media = MediaRoot(root)
        self.root = self.media.root
        self._folders: dict[str, tuple[set[str], set[str]]] = {}
        self._changed: dict[str, int | None] = {}  # folder -> its time of change before it was listed
        self._asked: list[list[Any]] = []
        self._wrote_into: set[str] = set()  # folders

    def annotation(self, places: Sequence[str], *, subset: str | None = None, split: str = "test") -> Annotation:
        """`tables.find_annotation` below the root."""
        found = find_annotation(self.root, places, subset=subset, split=split)
        self._asked.append([list(places), subset, split, self._states(found)])
        return found

    def seen(self) -> dict[str, Any] | None:
        """All that a reader was told, for `still_so`: annotation files with size and time of change, and the folders
        that were listed with theirs.  JSON; None where files were written meanwhile."""
        return None if self._wrote_into else {"annotation": self._asked, "folders": self._changed}

    def still_so(self, seen: dict[str, Any]) -> bool:
        """Whether a reader would be told the same again, at the price of a stat a folder and file."""
        for places, subset, split, states in seen["annotation"]:
            try:
                found = find_annotation(self.root, places, subset=subset, split=split)
            except UserError:
                return False
            if self._states(found) != states:
                return False
        return all(self._time(folder) == changed for folder, changed in seen["folders"].items())

    def _states(self, annotation: Annotation) -> list[list[Any]]:
        statuses = [(file, file.stat()) for file in annotation.files]
        return [[str(file.relative_to(self.root)), s.st_size, s.st_mtime_ns] for file, s in statuses]

    def _time(self, folder: str) -> int | None:
        """When a folder's list of names changed last; None where there is no such folder."""
        try:
            return os.stat(self.media.resolve(folder) if folder else self.root).st_mtime_ns
        except (BadSample, OSError, ValueError):  # ValueError: a name that no file system has
            return None

    def has_file(self, path: str) -> bool:
        path = clean(path)
        folder, _, name = path.rpartition("/")
        return name in self._scan(folder)[0]

    def has_folder(self, path: str) -> bool:
        path = clean(path)
        folder, _, name = path.rpartition("/")
        return name in self._scan(folder)[1]

    def files(self, folder: str) -> list[str]:
        """Names of a folder's files in natural order; none where there is no such folder."""
        return sorted(self._scan(clean(folder))[0], key=natural_order)

    def folders(self, folder: str) -> list[str]:
        """Names of a folder's folders in natural order; none where there is no such folder."""
        return sorted(self._scan(clean(folder))[1], key=natural_order)

    def frames(self, folder: str, num_frames: int | None) -> tuple[str, ...]:
        """Paths of a saved video's frames: `num_frames` evenly spaced ones, all where there are fewer or None is given.

        The places are numpy's linspace from the first to the last frame, cut to integers, as the reference has them.
        """
        folder = clean(folder)
        names = [name for name in self.files(folder) if _is_frame(name)] if folder else []
        places = range(len(names)) if num_frames is None else frame_places(len(names), num_frames)
        return tuple(f"{folder}/{names[place]}" for place in places)

    def image_item(self, text: str, paths: Iterable[str]) -> Item:
        """An item with pictures, each path relative to the root."""
        paths = [clean(path) or path for path in paths]
        missing = tuple(path for path in paths if not self.has_file(path))
        return Item(text.strip(), images=tuple(path for path in paths if path not in missing), missing=missing)

    def video_item(self, text: str, folder: str, num_frames: int | None, video: str | None = None) -> Item:
        """An item with a video's frames out of `folder`; `video` is the file that is named where there are none."""
        frames = self.frames(folder, num_frames)
        return Item(text.strip(), video=frames, missing=() if frames else (video or clean(folder) or folder,))

    def write(self, path: str, content: bytes) -> None:
        """Put a file in its place, whole or not at all.  UserError where that leads out of the root or cannot be."""
        path = clean(path)
        folder, _, name = path.rpartition("/")
        try:
            place = Path(self.media.resolve(path))
            if folder not in self._wrote_into and place.parent.is_dir():
                remove_leftovers(place.parent)
            with atomic_path(place, sweep=False) as aside:
                aside.write_bytes(content)
        except (BadSample, OSError) as error:
            raise UserError(f"{self.root}/{path} cannot be written: {error}") from None
        self._wrote_into.add(folder)
        self._scan(folder)[0].add(name)

    def _scan(self, folder: str) -> tuple[set[str], set[str]]:
        """(files, folders) of a folder: names; both empty where it cannot be read."""
        found = self._folders.get(folder)
        if found is None:
            self._changed[folder] = self._time(folder)
            found = self._folders[folder] = self._read(folder)
        return found

    def _read(self, folder: str) -> tuple[set[str], set[str]]:
        files, folders = set(), set()
        try:
            with os.scandir(self.media.resolve(folder) if folder else self.root) as entries:
                for entry in entries:
                    if entry.is_symlink() and not self._inside(f"{folder}/{entry.name}" if folder else entry.name):
                        continue
                    (folders if entry.is_dir() else files).add(entry.name)
        except (BadSample, OSError, ValueError):
            pass  # no such folder, or none that may be read: it holds nothing, and its files are reported as missing
        return files, folders

    def _inside(self, path: str) -> bool:
        try:
            return os.path.exists(self.media.resolve(path))
        except BadSample:
            return False


def _is_frame(name: str) -> bool:
    """By its name; hidden files are none, such as a ._0001.jpg that macOS puts beside a picture."""
    return name.lower().endswith(FRAME_NAMES) and not name.startswith(".")


def clean(path: str) -> str:
    """A relative path with single slashes and no dots; "" for one that is absolute or climbs."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return "" if path.startswith("/") or ".." in parts or "\0" in path else "/".join(parts)
