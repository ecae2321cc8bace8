"""Which weights a result was made with: one SHA-256 over a model's files."""

import hashlib
import json
from pathlib import Path

from umer1.checkpoints import layout
from umer1.checkpoints.search import is_checkpoint_place
from umer1.checkpoints.source import ASSETS
from umer1.errors import UserError
from umer1.files import write_json
from umer1.models.qwen2_vl.directory import HFDirectory

_DESCRIBED = ("config.json", "tokenizer.json")  # beside the weights: what else says what the model computes


def newest_model(path: str | Path) -> Path:
    """`path`, or in a save directory of umer1 the newest checkpoint whose files have the sizes they should have.

    For work that goes on for days, and is resumed, while training may add checkpoints.  UserError where none is sound.
    """
    path = Path(path)
    if not is_checkpoint_place(path):
        return path
    problems = []
    for checkpoint in layout.newest_first(path):
        try:
            layout.read_manifest(checkpoint)
            return checkpoint
        except ValueError as error:
            problems.append(f"{checkpoint}: {error}")
    raise UserError(f"{path} holds no whole checkpoint:\n" + "\n".join(f"  - {problem}" for problem in problems))


def model_fingerprint(path: str | Path, cache: str | Path | None = None) -> str:
    """SHA-256 (hex) over names and contents of the weights' files, config.json and tokenizer.json.

    path: a Hugging Face directory or one checkpoint (`newest_model`).  cache: a JSON file that remembers the answer; it
    holds as long as every file keeps its size and time of change.  UserError where a file cannot be read.
    """
    path = Path(path)
    try:
        names = _names(path)
        known = [[name, status.st_size, status.st_mtime_ns] for name in names if (status := (path / name).stat())]
        if cache is not None and (found := _cached(Path(cache), path, known)) is not None:
            return found
        digest = hashlib.sha256()
        for name in names:
            with open(path / name, "rb") as file:
                digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    except OSError as error:
        raise UserError(f"{path}: {error.filename} cannot be read ({error.strerror})") from None
    if cache is not None:
        write_json(cache, {"model": str(path.resolve()), "sha256": digest.hexdigest(), "files": known})
    return digest.hexdigest()


def _names(path: Path) -> list[str]:
    if (path / layout.MANIFEST).is_file():
        described = [f"{ASSETS}/{name}" for name in _DESCRIBED]
        weights = [file.name for file in path.iterdir() if file.suffix == ".distcp" or file.name == ".metadata"]
        return sorted([*described, *weights])
    weights = {entry.file.name for entry in HFDirectory.open(path).tensors.values()}
    return sorted([*_DESCRIBED, *weights])


def _cached(cache: Path, path: Path, known: list) -> str | None:
    """The remembered answer, None where there is none for these files."""
    try:
        found = json.loads(cache.read_text(encoding="utf-8"))
        same = found["model"] == str(path.resolve()) and found["files"] == known
        return str(found["sha256"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
