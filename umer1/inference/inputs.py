"""Reads the inputs of `umer1 encode`: JSONL of `{"id", "text", "image": path | [paths], "video": path | [paths]}`.

Every line is looked at before any work starts, so that a user mends a file once and not line by line.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umer1.data.bad_samples import BadSample
from umer1.data.fields import check_keys
from umer1.data.video_files import is_video_file
from umer1.errors import UserError

_KEYS = ("id", "text", "image", "video")
_MAX_ID = 1024  # characters: the file of vectors gives every id the room of the longest
_SHOWN = 20  # offending lines that one message lists


@dataclass(frozen=True, slots=True)
class Input:
    """One thing to embed."""

    id: str
    text: str
    images: tuple[str, ...]  # paths relative to the data root
    video: tuple[str, ...]  # frame paths, in order, or one path of a video file
    line: int  # 1-based line of the file


@dataclass(frozen=True, slots=True)
class BadInput:
    """One line that cannot be embedded, and why."""

    line: int
    id: str | None
    cause: str
    detail: str


def read_inputs(path: str | Path, more: tuple[str, ...] = ()) -> tuple[list[Input], list[BadInput]]:
    """All usable inputs in file order, and every line that is not one.

    more: keys that the caller reads for itself.
    """
    inputs: list[Input] = []
    bad: list[BadInput] = []
    first_line: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                record_id = None
                try:
                    record = _parse(raw)
                    record_id = _id(record)
                    check_keys("", record, _KEYS + more)
                    item = Input(record_id, _text(record), _paths(record, "image"), _paths(record, "video"), number)
                    if not item.text.strip() and not item.images and not item.video:
                        raise ValueError("there is neither text nor image nor video")
                    if record_id in first_line:
                        raise ValueError(f"the id {record_id!r} stands in line {first_line[record_id]} already")
                except (ValueError, BadSample) as error:
                    reason = error.detail if isinstance(error, BadSample) else str(error)
                    bad.append(BadInput(number, record_id, "bad_record", reason))
                    continue
                first_line[record_id] = number
                inputs.append(item)
    except OSError as error:
        raise UserError(f"--input {path}: cannot be read ({error.strerror}); give a JSONL file") from None
    if not inputs and not bad:
        raise UserError(f"--input {path}: the file is empty; each line is one input")
    return inputs, bad


def _parse(raw: bytes) -> dict:
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is expected, not a {type(record).__name__}")
    return record


def _id(record: dict) -> str:
    value = record.get("id")
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f'"id" must be a non-empty string or a whole number, not {value!r}')
    if len(str(value)) > _MAX_ID:
        raise ValueError(f'"id" has {len(str(value))} characters, more than {_MAX_ID}')
    if "\0" in str(value) or not str(value).isprintable():
        raise ValueError(f'"id" {value!r} holds characters that cannot be printed')
    return str(value)


def _text(record: dict) -> str:
    value = record.get("text")
    if value is not None and not isinstance(value, str):
        raise ValueError(f'"text" must be a string, not {value!r}')
    return value or ""


def _paths(record: dict, key: str) -> tuple[str, ...]:
    """Media paths of one field; an empty string, as some files have it where there is none, names nothing."""
    value: Any = record.get(key)
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError(f'"{key}" must be a path or a list of paths, not {value!r}')
    paths = tuple(item for item in items if item)
    if key == "video" and len(paths) > 1 and any(map(is_video_file, paths)):
        raise ValueError('"video" must be one video file or the frames of one video')
    return paths


def bad_inputs_message(path: str | Path, bad: list[BadInput], total: int) -> str:
    """The one message about all offending lines."""
    bad = sorted(bad, key=lambda entry: entry.line)
    lines = [f"  line {entry.line}: {entry.cause}: {entry.detail}" for entry in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN} more")
    return (
        f"{path}: {len(bad)} of {total} inputs cannot be embedded; mend them, or leave them out by --skip-bad-inputs:\n"
        + "\n".join(lines)
    )
