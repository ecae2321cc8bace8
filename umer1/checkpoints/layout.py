"""What lies in a save directory, and which of it can be trusted: names, manifests, the tracker, pruning.

    SAVE/latest_checkpointed_iteration.txt   the last iteration published (a hint for people and tools, not the truth)
    SAVE/iter_0000010/                       one checkpoint; appears by a rename when it is complete and durable
        umer1.json                           manifest: every other file with its size and CRC-32, and its own CRC-32
        *.distcp, .metadata, common.pt, metadata.json     megatron's torch_dist format
        extra.json, rng.json, hf/            the trainer's state, generators' states, the Hugging Face assets
    SAVE/reference/                          GRPO: the model that the run started from
    SAVE/.tmp-iter_0000020-...               being written, or left behind by a killed process

No torch in here; every function runs on one process.
"""

import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from umer1.atomic_directory import aside_path, publish, remove
from umer1.files import write_json, write_text
from umer1.rules import cannot_be_looked_at

logger = logging.getLogger(__name__)

MANIFEST = "umer1.json"
TRACKER = "latest_checkpointed_iteration.txt"
FORMAT_VERSION = 2
# Of a manifest, beside the files.
_FIELDS = {"iteration": int, "optimizer": bool, "distributed_optimizer": bool, "dtype": str, "layout": dict}
_FIELDS |= {"model": dict, "trained": list, "crc32": int}
_NEEDED = {"extra.json", "rng.json", "common.pt", ".metadata", "metadata.json"}
_NAME = re.compile(r"iter_([0-9]{7}|[1-9][0-9]{7,})")  # what `iteration_path` makes, and nothing else
_LEFT_BEHIND = re.compile(r"\.(tmp|old|removed)-(iter_\d{7,}|reference)-[0-9a-f]{12}")
_BLOCK = 1 << 22


def iteration_path(save: str | Path, iteration: int) -> Path:
    return Path(save) / f"iter_{iteration:07d}"


def new_aside(save: str | Path, iteration: int) -> Path:
    """A fresh empty directory in which the checkpoint of `iteration` is put together."""
    aside = aside_path(iteration_path(save, iteration))
    aside.mkdir(parents=True)
    return aside


def list_iterations(save: str | Path) -> list[int]:
    """Iterations that have a directory under `save`, ascending; whether they are whole is not asked."""
    if not Path(save).is_dir():
        return []
    matches = (_NAME.fullmatch(entry.name) for entry in Path(save).iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def newest_first(place: str | Path) -> list[Path]:
    """The checkpoints of a save directory, newest first, unchecked; `place` alone when it is itself one."""
    if (Path(place) / MANIFEST).is_file():
        return [Path(place)]
    return [iteration_path(place, iteration) for iteration in reversed(list_iterations(place))]


def seal(aside: Path, destination: Path, content: dict[str, Any], checksums: dict[str, int]) -> None:
    """Write the manifest over all files in `aside` and publish it as `destination`.

    checksums: CRC-32 of the files for which it is known already (every rank's own shards); the rest is read here.
    """
    files = {}
    for path in sorted(aside.rglob("*")):
        if path.is_file():
            name = path.relative_to(aside).as_posix()
            checksum = checksums.get(name)
            files[name] = {"size": path.stat().st_size, "crc32": crc32(path) if checksum is None else checksum}
    write_manifest(aside, {"format_version": FORMAT_VERSION, **content, "files": files})
    publish(aside, destination)


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """With a checksum of its own."""
    write_json(directory / MANIFEST, {**manifest, "crc32": _own_crc32(manifest)})


def _own_crc32(manifest: dict[str, Any]) -> int:
    """Of what it says, however that is laid out."""
    return zlib.crc32(json.dumps({**manifest, "crc32": None}, sort_keys=True).encode())


def crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, after a check of its form and of every file's size.  Raises ValueError saying what is wrong.

    What passes can be loaded if its contents are as they were written.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{MANIFEST} is not a manifest")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"format version {manifest.get('format_version')!r}, this program reads {FORMAT_VERSION}")
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(manifest.get(name), kind)]
    if wrong or _NEEDED - set(manifest["files"]):
        raise ValueError(f"{MANIFEST} lacks {', '.join([*wrong, *sorted(_NEEDED - set(manifest['files']))])}")
    if manifest["crc32"] != _own_crc32(manifest):
        raise ValueError(f"the content of {MANIFEST} is not what was written (CRC-32)")
    named = _NAME.fullmatch(directory.name)
    if named and int(named.group(1)) != manifest["iteration"]:
        raise ValueError(f"it was renamed: its content is that of iteration {manifest['iteration']}")
    root = directory.resolve()
    for name, entry in manifest["files"].items():
        try:
            _check_file(root, name, entry)
        except OSError as error:
            raise ValueError(f"{name} cannot be looked at ({error.strerror})") from error
    return manifest


def _check_file(root: Path, name: str, entry: Any) -> None:
    path = root / name
    # No links: they could lead out of the checkpoint.
    if ".." in Path(name).parts or Path(name).is_absolute() or path.resolve() != path:
        raise ValueError(f"{name!r} leads out of the checkpoint")
    if not path.is_file():
        raise ValueError(f"{name} is missing")
    if not isinstance(entry, dict) or path.stat().st_size != entry.get("size"):
        raise ValueError(f"{name} has {path.stat().st_size} bytes, not those of the manifest")


def corrupt_files(directory: Path, manifest: dict[str, Any], share: int = 0, shares: int = 1) -> list[str]:
    """Files whose CRC-32 is not the manifest's, among every `shares`-th file starting with number `share`."""
    mine = sorted(manifest["files"])[share::shares]
    return [name for name in mine if crc32(directory / name) != manifest["files"][name].get("crc32")]


def read_tracker(save: str | Path) -> int | None:
    try:
        return int((Path(save) / TRACKER).read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return None


def write_tracker(save: str | Path, iteration: int) -> None:
    write_text(Path(save) / TRACKER, f"{iteration}\n")


def remove_left_behind(save: str | Path) -> list[str]:
    """Remove what killed processes left under hidden names; returns the names."""
    if not Path(save).is_dir():
        return []
    left = [(entry, _LEFT_BEHIND.fullmatch(entry.name)) for entry in sorted(Path(save).iterdir())]
    names = []
    for entry, match in left:
        if match is None:
            continue
        destination = entry.with_name(match.group(2))
        if match.group(1) == "old" and not destination.exists():
            entry.rename(destination)  # killed while a checkpoint was replaced: the earlier one gets its name back
            continue
        shutil.rmtree(entry, ignore_errors=True)
        names.append(entry.name)
    return names


def removable(iterations: list[int], keep_latest: int, keep_every: int) -> list[int]:
    """Of ascending `iterations` of whole checkpoints those that may go.

    The `keep_latest` newest stay (0: all do), and with `keep_every` above 0 every multiple of it.
    """
    if keep_latest == 0:
        return []
    return [number for number in iterations[:-keep_latest] if not (keep_every and number % keep_every == 0)]


def prune(save: str | Path, keep_latest: int, keep_every: int = 0) -> list[int]:
    """Remove what is `removable` of the checkpoints that pass `read_manifest`; damaged ones are left for a person.

    Returns the iterations removed.
    """
    gone = []
    for iteration in removable(sound_iterations(save), keep_latest, keep_every):
        try:
            remove(iteration_path(save, iteration))
            gone.append(iteration)
        except OSError as error:  # a full disk is worse than a missing clean-up; training goes on
            logger.warning("checkpoint of iteration %d could not be removed: %s", iteration, error)
    return gone


def sound_iterations(save: str | Path) -> list[int]:
    """Ascending iterations whose checkpoints pass `read_manifest`."""
    sound = []
    for iteration in list_iterations(save):
        try:
            read_manifest(iteration_path(save, iteration))
            sound.append(iteration)
        except ValueError:
            continue
    return sound


def place_problem(save: str | Path) -> str | None:
    """Why nothing could be saved under `save`, or None; for checks before a run, as it makes nothing."""
    path = Path(save).absolute()
    try:
        nearest = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:
        return cannot_be_looked_at(f"save={save}", error)
    if not nearest.is_dir():
        return f"save={save} cannot be a directory: {nearest} is a file"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"save={save} cannot be written: {nearest} is not writable"
    return None


def is_writable(save: str | Path) -> str | None:
    """Why nothing can be saved under `save`, or None."""
    try:
        Path(save).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"save={save} cannot be made a directory ({error.strerror})"
    return None if os.access(save, os.W_OK | os.X_OK) else f"save={save} is not writable"
