"""Annotation files as Hugging Face data sets lie on a disk: which files hold a subset's split, and their rows.

    annotation = find_annotation(root, ("video-tasks/MSVD", "VLM2Vec/MSVD"), subset=None, split="test")
    rows = annotation.rows(("video_id", "caption"))

Each place is a folder (or file) below the root; the first one that has the split is read.  Which files belong to a
subset is what the folder's README.md says in its `configs`, else the layouts that are usual (_PATTERNS).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from umer1.errors import UserError

ENDINGS = (".parquet", ".jsonl", ".json")
_ROWS_AT_ONCE = 64  # a row may hold a picture

# Without a README's word: {subset} and {split} below the data set's folder, each with any of ENDINGS.
_PATTERNS = ("data/{split}-*", "data/{split}", "{split}-*", "{split}", "default/{split}-*", "default/{split}")
_SUBSET_PATTERNS = (
    "{subset}/{split}-*",
    "{subset}/{split}",
    "data/{subset}/{split}-*",
    "data/{subset}/{split}",
    "{subset}/data/{split}-*",
    "data/{subset}-{split}",
    "{subset}-{split}",
    "{subset}",
    "data/{subset}",
    "json/{subset}",
)


class Annotation:
    """The files of one split of one subset."""

    def __init__(self, files: Sequence[Path]):
        self.files = tuple(files)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files' contents in order; where they lie and what they are called does not matter."""
        return combine(_sha256(file) for file in self.files)

    def rows(self, columns: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, Any]]:
        """All rows, with `columns` and those of `optional` that the files have; UserError for a missing column."""
        return [row for batch in self.batches(columns, optional) for row in batch]

    def batches(self, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[list[dict[str, Any]]]:
        """The same in bounded pieces, for columns that hold pictures."""
        for file in self.files:
            read = _parquet if file.suffix == ".parquet" else _json
            yield from read(file, columns, optional)


def find_annotation(
    root: str | Path, places: Sequence[str], *, subset: str | None = None, split: str = "test"
) -> Annotation:
    """The split's files in the first of `places` (relative to `root`) that has them.

    UserError, with all places that were looked at, where none has.
    """
    for place in places:
        path = Path(root, place)
        files = [path] if path.is_file() else _split_files(path, subset, split)
        if files:
            return Annotation(files)
    wanted = f"the {split!r} split" + (f" of {subset!r}" if subset else "")
    looked = "\n".join(f"  {Path(root, place)}" for place in places)
    raise UserError(
        f"no annotation files (parquet, jsonl or json) with {wanted}; looked in\n{looked}\n"
        "Put the data set there, or give another --data-root"
    )


def combine(digests: Iterable[str]) -> str:
    """One fingerprint of several."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _split_files(folder: Path, subset: str | None, split: str) -> list[Path]:
    if not folder.is_dir():
        return []
    told = _from_readme(folder, subset, split)
    if told:
        return told
    for pattern in _SUBSET_PATTERNS if subset else _PATTERNS:
        for ending in ENDINGS:
            found = sorted(folder.glob(pattern.format(subset=_literal(subset or ""), split=split) + ending))
            if found:
                return found
    return []


def _from_readme(folder: Path, subset: str | None, split: str) -> list[Path]:
    """What `configs` of the README's front matter says; nothing where it says nothing about this split."""
    try:
        head, *rest = (folder / "README.md").read_text(encoding="utf-8").split("\n---", 1)
        front = yaml.safe_load(head.removeprefix("---")) if rest and head.startswith("---") else None
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'README.md'} cannot be read: {error}") from None
    configs = front.get("configs") if isinstance(front, dict) else None
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict) and config.get("config_name", "default") == (subset or "default"):
            patterns = _split_patterns(config.get("data_files"), split)
            return sorted({file for pattern in patterns for file in _inside(folder, pattern)})
    return []


def _split_patterns(data_files: Any, split: str) -> list[str]:
    """`data_files` is a pattern, a list of them, or of {split, path}; a pattern without a split is the train split."""
    found: list[str] = []
    for item in data_files if isinstance(data_files, list) else [data_files]:
        if isinstance(item, dict):
            item, name = item.get("path"), item.get("split", "train")
        else:
            name = "train"
        if name == split:
            found += [pattern for pattern in (item if isinstance(item, list) else [item]) if isinstance(pattern, str)]
    return found


def _inside(folder: Path, pattern: str) -> list[Path]:
    if pattern.startswith("/") or ".." in pattern.split("/"):
        raise UserError(f"{folder / 'README.md'}: data_files {pattern!r} leads out of the data set's folder")
    try:
        found = [file for file in folder.glob(pattern) if file.suffix in ENDINGS]
    except (ValueError, IndexError) as error:  # "" and ".", as pathlib has it
        raise UserError(f"{folder / 'README.md'}: data_files {pattern!r} is no pattern ({error})") from None
    # hidden ones are none, as for the hub's own readers: what macOS puts beside a file, a downloader's cache
    return [file for file in found if not any(part[0] == "." for part in file.relative_to(folder).parts)]


def _literal(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _parquet(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file} is parquet, which needs pyarrow: pip install 'umer1[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            have = table.schema_arrow.names
            _check(file, columns, have)
            wanted = [*columns, *(name for name in optional if name in have)]
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted):
                yield batch.to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet: {error}") from None


def _json(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """JSON lines, or one JSON list, whichever the file is: both endings are used for both."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(s) for s in text.split("\n") if s.strip()]
        )
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{file}: row {number} must be an object, not {type(row).__name__}")
        _check(f"{file}: row {number}", columns, row)
    wanted = [*columns, *optional]
    yield [{name: row[name] for name in wanted if name in row} for row in rows]


def _check(where: object, columns: Sequence[str], have: Iterable[str]) -> None:
    lacking = [name for name in columns if name not in have]
    if lacking:
        raise UserError(f"{where} has no column {', '.join(map(repr, lacking))}; it has {', '.join(map(repr, have))}")


def _sha256(file: Path) -> str:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
