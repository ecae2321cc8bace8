"""Every answer, the moment it is there: an append-only file that survives kill -9.

The first line says which settings the answers were made with; each further line is one side.  Lines are written
together and made durable before they count.  A last line without its end was being written when the process died and
is cut off; a broken line anywhere else is damage, and refused.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from umer1.annotation.client import Answer, Refused
from umer1.errors import UserError
from umer1.files import fsync_directory, lock_for_run

_KINDS = {"answer": Answer, "refused": Refused}


class Journal:
    """Answers by side key; in memory are keys and places alone.

    settings: what shapes an answer; a journal of others is refused, since its answers would be mixed with new ones.
    forget_refusals: sides that the server refused count as never asked.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, forget_refusals: bool = False):
        self.path, self._forget_refusals = path, forget_refusals
        self.input_tokens = self.output_tokens = 0  # of all answers in the file
        self._places: dict[bytes, tuple[int, int]] = {}  # key -> offset, length of the line
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            lock_for_run(self._fd, path)
        except UserError:
            os.close(self._fd)
            raise
        self._load(settings)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def __len__(self) -> int:
        return len(self._places)

    def append(self, entries: list[tuple[str, Answer | Refused]]) -> None:
        """Durable on return."""
        lines = [_line(key, entry) for key, entry in entries]
        self._write(b"".join(lines))
        for (key, entry), line in zip(entries, lines, strict=True):
            self._note(bytes.fromhex(key), entry, self._end, len(line))
            self._end += len(line)

    def read(self, key: str) -> Answer | Refused | None:
        """The entry of a side; None when there is none yet."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        return _entry(json.loads(os.pread(self._fd, place[1], place[0])))

    def close(self) -> None:
        os.close(self._fd)

    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError:  # a full disk: half a line must not stand before what a last try appends
            os.ftruncate(self._fd, self._end)
            raise

    def _note(self, key: bytes, entry: Answer | Refused, offset: int, length: int) -> None:
        self._places[key] = (offset, length)
        if isinstance(entry, Answer):
            self.input_tokens += entry.input_tokens
            self.output_tokens += entry.output_tokens

    def _load(self, settings: dict[str, Any]) -> None:
        self._end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    os.ftruncate(self._fd, self._end)
                    os.fsync(self._fd)
                    break
                try:
                    record = json.loads(line)
                    if number == 1:
                        self._check(record["settings"], settings)
                    else:
                        key, entry = bytes.fromhex(record["key"]), _entry(record)
                        if not (self._forget_refusals and isinstance(entry, Refused)):
                            self._note(key, entry, self._end, len(line))
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"{self.path} is damaged in line {number} ({error}); take that line out, or choose another "
                        "--output"
                    ) from None
                self._end += len(line)
        if self._end == 0:
            header = json.dumps({"journal": 1, "settings": settings}).encode() + b"\n"
            self._write(header)
            fsync_directory(self.path.parent)
            self._end = len(header)

    def _check(self, there: dict[str, Any], settings: dict[str, Any]) -> None:
        changed = [
            f"{name} was {there.get(name)!r} and is {value!r}"
            for name, value in settings.items()
            if there.get(name) != value
        ]
        if changed:
            raise UserError(
                f"{self.path} holds answers made with other settings: {'; '.join(changed)}. Give the same ones to go "
                "on, or another --output to begin anew"
            )


def _line(key: str, entry: Answer | Refused) -> bytes:
    kind = "answer" if isinstance(entry, Answer) else "refused"
    # ASCII: half a surrogate pair in an answer must not stop the run
    return json.dumps({"key": key, "kind": kind, **asdict(entry)}).encode() + b"\n"


def _entry(record: dict[str, Any]) -> Answer | Refused:
    return _KINDS[record["kind"]](**{name: value for name, value in record.items() if name not in ("key", "kind")})
