"""Files appear complete or not at all: write aside, fsync, rename."""

import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from umer1.errors import UserError


@contextmanager
def atomic_path(path: str | Path, *, sweep: bool = True):
    """Yield a temporary path beside `path`; on success it is fsynced and renamed over `path`, else removed.

    sweep: what a killed process of this machine left of an earlier try goes away too, at the price of listing the
    folder; who writes thousands of files into one calls `remove_leftovers` once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if sweep:
        remove_leftovers(path.parent, path.name)
    aside = path.with_name(f".{path.name}{_aside_mark()}{os.getpid()}")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        fsync_directory(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # that a disk is full is said without a name
        raise
    finally:
        aside.unlink(missing_ok=True)


def _aside_mark() -> str:
    """Between a file's name and the writing process's number in the name of a temporary file."""
    return f".tmp-{socket.gethostname()}-"


def remove_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Remove what killed processes of this machine left of `name`, or of all files in an existing folder."""
    between = _aside_mark()
    with os.scandir(folder) as entries:
        for entry in entries:
            written, mark, pid = entry.name.rpartition(between)
            if mark and written == f".{name or written[1:]}" and not _is_alive(pid):
                Path(entry.path).unlink(missing_ok=True)


def _is_alive(pid: str) -> bool:
    """Whether a process has this number; True for what is none."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, PermissionError):
        return True
    return True


def fsync_directory(path: str | Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: str | Path) -> None:
    """Make sure that a folder for results exists before the work for them starts; UserError when it cannot."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made a directory: {error.strerror}; choose another place") from None


def lock_for_run(fd: int, path: str | Path) -> None:
    """Take the lock of the open file or folder `path` until `fd` is closed; UserError where another run has it.

    Where the file system has no locks, nothing is taken.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path} is in use by another run; wait for it, or choose another --output") from None
    except OSError:
        pass


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """A block in which no other run writes into a folder; UserError where one does."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        lock_for_run(fd, folder)
        yield
    finally:
        os.close(fd)


@contextmanager
def writing_to(output: str | Path) -> Iterator[None]:
    """A block that writes into `output`: a disk that refuses is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error}") from None


def not_written(what: str, folder: str | Path, cause: object) -> str:
    """What the user is told when `what` could not be written into `folder`."""
    try:
        free = f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free"
    except OSError:
        free = "which is out of reach"
    return f"{what} could not be written under {folder} ({free}): {cause}"


@contextmanager
def dispensable(what: str) -> Iterator[None]:
    """A block that writes what training can do without: a disk that refuses is said, and training goes on."""
    try:
        yield
    except OSError as error:
        print(f"{what} cannot be written: {error}; training goes on", file=sys.stderr, flush=True)


def write_text(path: str | Path, text: str) -> None:
    """As UTF-8.  Half a surrogate pair, which names out of data files may hold, becomes the escape that it was."""
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Readable JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: str | Path, values: Iterable[Any]) -> None:
    """The same, a line each."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
