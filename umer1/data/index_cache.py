"""Indexes of large data files, made once and kept beside them: `.NAME.index.npz`, plain arrays.

An index holds as long as the file keeps its size, its time of change and both of its ends; any other is made anew.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from umer1.data.arrays import read_arrays
from umer1.data.indexing import FileIndex, index_file
from umer1.files import atomic_path
from umer1.progress import Progress

KEPT_BYTES = 64 * 2**20  # smaller files are indexed anew each time: a second or less
_FORMAT = 1
_EDGE = 2**20  # bytes at each end that are compared
_SAMPLES, _SAMPLE = 64, 4096  # places of a file that a digest looks at, and bytes of each
_MIB = 2**20


def open_index(path: Path, name_keys: tuple[str, ...]) -> FileIndex:
    """The index of a data file, from beside it or made now; UserError where it is no data file.

    Of several processes one makes it and the others wait.  A folder that cannot be written to costs time alone.
    """
    if not path.is_file() or path.stat().st_size < KEPT_BYTES:
        return index_file(path, name_keys)
    if (found := _load(path, name_keys)) is not None:
        return found
    with _alone(path):
        if (found := _load(path, name_keys)) is not None:
            return found
        identity = _identity(path, name_keys)
        progress = Progress(f"indexing {path}", path.stat().st_size // _MIB, unit="MiB")
        found = index_file(path, name_keys, _in_mib(progress))
        progress.finish()
        try:
            _save(path, found, identity)
        except OSError as error:
            print(f"the index of {path} cannot be kept beside it: {error.strerror}", file=sys.stderr, flush=True)
    return found


def index_path(path: Path) -> Path:
    """Where a file's index is kept."""
    return path.with_name(f".{path.name}.index.npz")


def content_digest(path: Path, index: FileIndex) -> str:
    """Hex digest of a data file's size, its records' places and data sets, and 64 evenly spaced pieces of 4 KiB.

    A change elsewhere that keeps the length of every record is not seen.
    """
    digest = hashlib.blake2b(digest_size=16)
    for array in (index.starts, index.lengths, index.name_ids):
        digest.update(np.ascontiguousarray(array).astype("<i8").tobytes())
    digest.update(json.dumps(index.names).encode())
    size = path.stat().st_size
    with open(path, "rb") as file:
        for start in np.linspace(0, max(0, size - _SAMPLE), _SAMPLES, dtype=np.int64).tolist():
            digest.update(os.pread(file.fileno(), _SAMPLE, start))
    return digest.hexdigest()


def _identity(path: Path, name_keys: tuple[str, ...]) -> dict:
    status = path.stat()
    with open(path, "rb") as file:
        ends = os.pread(file.fileno(), _EDGE, 0) + os.pread(file.fileno(), _EDGE, max(0, status.st_size - _EDGE))
    return {
        "format": _FORMAT,
        "size": status.st_size,
        "changed": status.st_mtime_ns,
        "ends": hashlib.blake2b(ends, digest_size=16).hexdigest(),
        "name_keys": list(name_keys),
    }


def _load(path: Path, name_keys: tuple[str, ...]) -> FileIndex | None:
    """The kept index; None where there is none, or it is damaged or of something else."""
    try:
        arrays = read_arrays(index_path(path))
        about = json.loads(arrays["about"].tobytes())
        names = tuple(about.pop("names"))
        if about != _identity(path, name_keys):
            return None
        found = FileIndex(arrays["starts"], arrays["lengths"], arrays["name_ids"], names)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = len(found.starts) == len(found.lengths) == len(found.name_ids) > 0
    return found if whole and found.name_ids.max() < len(names) else None


def _save(path: Path, index: FileIndex, identity: dict) -> None:
    about = np.frombuffer(json.dumps({**identity, "names": index.names}).encode(), dtype=np.uint8)
    arrays = {"starts": index.starts, "lengths": index.lengths, "name_ids": index.name_ids, "about": about}
    with atomic_path(index_path(path)) as aside, open(aside, "wb") as file:
        np.savez(file, **arrays)


def _in_mib(progress: Progress):
    left = 0

    def add(count: int) -> None:
        nonlocal left
        whole, left = divmod(left + count, _MIB)
        if whole:
            progress.add(whole)

    return add


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the data file's lock, where its file system has locks; without one several processes do the same work."""
    with open(path, "rb") as file:
        said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    print(f"waiting for the index of {path}, which another process makes", file=sys.stderr, flush=True)
                said = True
                time.sleep(0.2)
            except OSError:
                break
        yield
