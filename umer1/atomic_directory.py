"""Directories appear complete or not at all: filled aside, made durable, then given their name in one step."""

import ctypes
import os
import shutil
import uuid
from pathlib import Path

from umer1.files import fsync_directory

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h


def aside_path(destination: Path, purpose: str = "tmp") -> Path:
    """A fresh hidden name beside `destination` (same file system, so that a rename is atomic)."""
    return destination.with_name(f".{purpose}-{destination.name}-{uuid.uuid4().hex[:12]}")


def fsync_tree(path: Path) -> None:
    """Make every file and every name below `path` durable."""
    for folder, _, files in os.walk(path):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_directory(folder)


def publish(aside: Path, destination: Path) -> None:
    """Give the finished directory `aside` the name `destination`, replacing what had it; durable on return.

    A reader sees the old directory or the new one.  Where the file system cannot exchange two names in one step,
    there is a moment between two renames in which `destination` does not exist.
    """
    fsync_tree(aside)
    if not destination.exists():
        os.rename(aside, destination)
    elif destination.is_dir() and not any(destination.iterdir()):
        os.rename(aside, destination)  # POSIX: over an empty directory
    elif _exchange(aside, destination):
        fsync_directory(destination.parent)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        old = aside_path(destination, "old")
        os.rename(destination, old)
        os.rename(aside, destination)
        fsync_directory(destination.parent)
        shutil.rmtree(old, ignore_errors=True)
    fsync_directory(destination.parent)


def remove(path: Path) -> None:
    """Remove a directory so that its name never stands for half of it: renamed aside first; of a link, the link."""
    if path.is_symlink():
        path.unlink()
        return
    aside = aside_path(path, "removed")
    os.rename(path, aside)
    fsync_directory(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE))
    return done == 0
