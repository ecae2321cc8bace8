"""Where each record of a data file starts and ends, and which data set it belongs to.

Memory is a few bytes a record and one chunk of the file, whatever the file's size.
"""

import codecs
import json
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from umer1.errors import UserError

MAX_RECORD_BYTES = 64 * 2**20
_CHUNK = 8 * 2**20
_PROBED_LINES = 100  # of a JSONL file, at least one of these must be an object
_EXPECTED = "a data file is a JSON list of pairs, or JSONL with one pair a line"

# Keys of a record: the first that is a string and not empty names its data set.
NAME_KEYS = ("dataset_name",)
RL_NAME_KEYS = ("dataset_name", "dataset")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class FileIndex:
    """N records: byte offsets, byte lengths and data sets."""

    starts: np.ndarray  # int64 [N]
    lengths: np.ndarray  # int64 [N]
    name_ids: np.ndarray  # int32 [N]
    names: tuple[str, ...]  # "" stands for records that name none


class _Names:
    """Reads the data set's name out of a record, whole or as a line that is better not parsed."""

    def __init__(self, keys: tuple[str, ...]):
        self.keys = keys
        # With bare quotes this can only be a key: inside a JSON string the quotes would be escaped.
        self._patterns = [re.compile(rb'"%b"\s*:\s*"((?:[^"\\]|\\.)*)"' % key.encode()) for key in keys]

    def of(self, record: Any) -> str:
        """ "" when the record names none."""
        values = [record.get(key) for key in self.keys] if isinstance(record, dict) else []
        return next((value for value in values if isinstance(value, str) and value), "")

    def of_line(self, raw: bytes) -> str:
        """Of a line without parsing it all; a line that holds a key more than once is parsed."""
        try:
            for pattern in self._patterns:
                found = pattern.findall(raw)
                if len(found) > 1:
                    return self.of(json.loads(raw))
                if found and (name := json.loads(b'"' + found[0] + b'"')):
                    return name
        except (ValueError, RecursionError):
            pass
        return ""


class _Builder:
    def __init__(self):
        self.starts, self.lengths, self.name_ids = array("q"), array("q"), array("i")
        self.names: dict[str, int] = {}

    def add(self, start: int, length: int, name: str) -> None:
        name = name.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair could not be printed
        self.starts.append(start)
        self.lengths.append(length)
        self.name_ids.append(self.names.setdefault(name, len(self.names)))

    def build(self, path: Path) -> FileIndex:
        if not self.starts:
            raise UserError(f"the data file {path} holds no records; {_EXPECTED}")
        arrays = (np.frombuffer(values, dtype=values.typecode) for values in (self.starts, self.lengths, self.name_ids))
        return FileIndex(*arrays, names=tuple(self.names))


def index_file(
    path: str | Path, name_keys: tuple[str, ...] = NAME_KEYS, progress: Callable[[int], None] | None = None
) -> FileIndex:
    """Index a JSON list or a JSONL file; UserError with the line and byte when it is neither.

    name_keys: where a record says its data set, the first that does.  progress: called with the bytes read since the
    last call.
    """
    progress = progress or (lambda count: None)
    path, names = Path(path), _Names(name_keys)
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise UserError(f"the data file {path} {what}; {_EXPECTED}")
    try:
        with open(path, "rb") as file:
            start = 3 if file.read(3) == codecs.BOM_UTF8 else 0
            file.seek(start)
            first = _first_byte(file)
            file.seek(start)
            if first == b"":
                raise UserError(f"the data file {path} is empty; {_EXPECTED}")
            if first == b"[":
                return _index_list(path, file, start, names, progress)
            if first == b"{":
                return _index_lines(path, file, start, names, progress)
    except OSError as error:
        raise UserError(f"the data file {path} cannot be read: {error.strerror}") from None
    raise UserError(f"the data file {path} starts with {first!r}, not with '[' or '{{'; {_EXPECTED}")


def _first_byte(file: BinaryIO) -> bytes:
    while chunk := file.read(4096):
        if text := chunk.lstrip():
            return text[:1]
    return b""


# -- JSONL -----------------------------------------------------------------------------------------------------------


def _index_lines(
    path: Path, file: BinaryIO, position: int, names: _Names, progress: Callable[[int], None]
) -> FileIndex:
    builder = _Builder()
    probe = _Probe()
    for raw in iter(lambda: file.readline(MAX_RECORD_BYTES + 1), b""):
        length = len(raw)
        while not raw.endswith(b"\n") and (rest := file.readline(MAX_RECORD_BYTES + 1)):
            length += len(rest)  # a line longer than any record: its length alone is kept, and refuses it later
            raw = rest
        if length != len(raw) or raw.strip():
            builder.add(position, length, names.of_line(raw))
            probe.look(raw, len(builder.starts))
        position += length
        progress(length)
    probe.judge(path)
    return builder.build(path)


class _Probe:
    """Whether a file is JSONL at all: one object among its first lines is enough."""

    def __init__(self):
        self.error: str | None = None
        self.good = False

    def look(self, raw: bytes, number: int) -> None:
        if self.good or number > _PROBED_LINES:
            return
        try:
            self.good = isinstance(json.loads(raw), dict)
            problem = "line 1 is not an object"
        except (ValueError, RecursionError) as error:
            problem = f"line 1 is not a whole JSON object ({error})"
        self.error = self.error or problem

    def judge(self, path: Path) -> None:
        if not self.good:
            raise UserError(f"the data file {path} is not JSONL: {self.error}; {_EXPECTED}")


# -- JSON list -------------------------------------------------------------------------------------------------------


class _Window:
    """A text file seen through a window: `text[at:]` is ahead, `byte` and `line` are those of character `at`."""

    def __init__(self, path: Path, file: BinaryIO, start: int, progress: Callable[[int], None]):
        self.path, self.file, self.progress = path, file, progress
        self.byte, self.line = start, 1
        self.text, self.at, self.ended = "", 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    @property
    def ahead(self) -> int:
        return len(self.text) - self.at

    def fill(self) -> bool:
        """Read on; False at the end of the file."""
        if self.ended:
            return False
        chunk = self.file.read(_CHUNK)
        self.progress(len(chunk))
        self.ended = not chunk
        try:
            more = self.decoder.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            self.text += error.object[: error.start].decode("utf-8")
            raise self.error(f"is not UTF-8: {error.reason}", len(self.text)) from None
        self.text, self.at = self.text[self.at :] + more, 0
        return True

    def advance(self, end: int) -> int:
        """Move on to character `end` of the window; the bytes passed over."""
        passed = self.text[self.at : end]
        size = len(passed) if passed.isascii() else len(passed.encode("utf-8"))
        self.byte += size
        self.line += passed.count("\n")
        self.at = end
        return size

    def error(self, what: str, where: int | None = None) -> UserError:
        passed = self.text[self.at : where if where is not None else self.at]
        line, byte = self.line + passed.count("\n"), self.byte + len(passed.encode("utf-8"))
        return UserError(f"the data file {self.path} {what} (line {line}, byte {byte}); {_EXPECTED}")


def _index_list(path: Path, file: BinaryIO, start: int, names: _Names, progress: Callable[[int], None]) -> FileIndex:
    builder = _Builder()
    window = _Window(path, file, start, progress)
    decode = json.JSONDecoder().raw_decode
    assert _next(window) == "["
    window.advance(window.at + 1)
    if _next(window) != "]":
        while True:
            _next(window)
            record, end = _decode_one(window, decode)
            position = window.byte
            builder.add(position, window.advance(end), names.of(record))
            mark = _next(window)
            if mark == "]":
                break
            if mark != ",":
                what = "ends inside the list" if mark == "" else f"has {mark!r} where ',' or ']' is expected"
                raise window.error(what)
            window.advance(window.at + 1)
    window.advance(window.at + 1)
    if _next(window) != "":
        raise window.error("goes on after the list's end")
    return builder.build(path)


def _next(window: _Window) -> str:
    """Pass over white space; the character there, "" at the end of the file."""
    while True:
        window.advance(_SPACE.match(window.text, window.at).end())
        if window.ahead or not window.fill():
            return window.text[window.at : window.at + 1]


def _decode_one(window: _Window, decode):
    """(value, the character behind it) at the window's place, reading on while the value is cut off."""
    while True:
        try:
            value, end = decode(window.text, window.at)
            if end + 2 < len(window.text) or window.ended:  # a number at the edge may go on, by .5 or e+5
                return value, end
            problem = window.error("is malformed")
        except RecursionError:
            raise window.error("has a record that is nested too deeply") from None
        except ValueError as error:
            problem = window.error(f"is not JSON: {getattr(error, 'msg', error)}", getattr(error, "pos", window.at))
        if window.ahead > MAX_RECORD_BYTES or not window.fill():
            raise problem
