"""What is wrong with a sample: one exception, a fixed list of causes, counts over ranks, and a file that lists them."""

import fcntl
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from umer1.errors import UserError

_JUDGED_SAMPLES = 64  # fewest samples over which a share of bad ones is judged

# The fixed order makes counts a vector that ranks can add up.
CAUSES = (
    "missing_file",
    "corrupt_image",
    "too_many_pixels",
    "file_too_large",
    "aspect_ratio",
    "path_escape",
    "marker_mismatch",
    "no_gen_emb",
    "no_disc_emb",
    "over_length",
    "reserved_token",
    "bad_record",
    "empty_response",
    "too_many_frames",
    "frame_sizes",
    "corrupt_video",
    "no_video_decoder",
)


class BadSample(Exception):
    """A sample that cannot be used: `cause` is one of CAUSES, `detail` says what and where."""

    def __init__(self, cause: str, detail: str):
        assert cause in CAUSES, cause
        super().__init__(cause, detail)  # both in args, so that it survives pickling between processes
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"


@dataclass(frozen=True, slots=True)
class BadRecord:
    """One bad sample as it is counted and listed."""

    index: int  # position in the data file
    dataset: str
    cause: str
    detail: str


class BadSampleCounts:
    """Samples seen, and bad ones by data set and cause, over all data-parallel ranks and all resumes.

    A rank notes what it meets; `take_delta` gives that as a vector which ranks add up (every data-parallel rank holds
    the same layout), and `add` takes the sum:  delta = take_delta(); all_reduce(delta); add(delta); check(limit).
    """

    _FIXED = 2  # seen, failed steps

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self._local = np.zeros(self._FIXED + len(names) * len(CAUSES), dtype=np.int64)
        self._global = np.zeros_like(self._local)
        self._place = {name: self._FIXED + i * len(CAUSES) for i, name in enumerate(names)}
        self._earlier: dict[str, dict[str, int]] = {}  # of data sets that a resumed run had and this one has not
        self._failure: str | None = None

    def note(self, seen: int, bad: list[BadRecord], failure: str | None = None) -> None:
        """Of one step and rank: samples tried, the bad ones among them, and why the step could not be filled."""
        self._local[0] += seen
        for record in bad:
            self._local[self._place[record.dataset] + CAUSES.index(record.cause)] += 1
        if failure is not None:
            self._local[1] += 1
            self._failure = failure

    def take_delta(self) -> torch.Tensor:
        """int64 [K]: what was noted since the last call; sum it over data-parallel ranks."""
        delta = torch.from_numpy(self._local.copy())
        self._local[:] = 0
        return delta

    def add(self, delta: torch.Tensor) -> None:
        self._global += delta.cpu().numpy()

    @property
    def seen(self) -> int:
        return int(self._global[0])

    @property
    def bad(self) -> int:
        return int(self._global[self._FIXED :].sum()) + sum(sum(item.values()) for item in self._earlier.values())

    def by_dataset(self) -> dict[str, dict[str, int]]:
        """Data set -> cause -> count, where it is not 0."""
        table = self._global[self._FIXED :].reshape(len(self.names), len(CAUSES))
        found = {name: dict(causes) for name, causes in self._earlier.items()}
        for name, row in zip(self.names, table.tolist(), strict=True):
            if any(row):
                found[name] = {cause: count for cause, count in zip(CAUSES, row, strict=True) if count}
        return found

    def report(self) -> str:
        """One line for people."""
        parts = [
            f"{name or '(unnamed)'}: " + ", ".join(f"{cause} {count}" for cause, count in causes.items())
            for name, causes in self.by_dataset().items()
        ]
        return f"{self.bad} of {self.seen} samples were bad" + (f" ({'; '.join(parts)})" if parts else "")

    def check(self, limit: float, where: str | None = None) -> None:
        """UserError, on every rank alike, when a step could not be filled or the share of bad samples is over `limit`.

        The share is judged over at least 64 samples, so that one early bad sample does not stop a run; a limit of 0
        allows none.
        """
        listed = f" They are listed in {where}." if where else ""
        if self._global[1]:
            failure = self._failure or "another rank could not fill its share of the batch"
            raise UserError(f"{failure}. {self.report()}.{listed} Check --data-root and the data file")
        if self.bad > limit * max(self.seen, _JUDGED_SAMPLES):
            raise UserError(
                f"{self.report()}, more than --max-bad-sample-fraction {limit}.{listed} Mend the data, or raise the "
                "fraction"
            )

    def state_dict(self) -> dict[str, Any]:
        """JSON, for the checkpoint."""
        return {"seen": self.seen, "bad": self.by_dataset()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._local[:] = self._global[:] = 0
        self._earlier = {}
        self._global[0] = int(state["seen"])
        for name, causes in state["bad"].items():
            for cause, count in causes.items():
                if name in self._place and cause in CAUSES:
                    self._global[self._place[name] + CAUSES.index(cause)] = int(count)
                else:
                    self._earlier.setdefault(name, {})[cause] = int(count)


class BadSampleLog:
    """`bad_samples.jsonl`: each bad sample once, however many ranks, epochs and resumes meet it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._listed: set[int] = set()
        self._read = 0  # bytes of the file that `_listed` knows

    def append(self, records: list[BadRecord]) -> None:
        """List those that no rank has listed yet, each in one line written by one call."""
        new = {record.index: record for record in records if record.index not in self._listed}
        if not new:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            with locked(file):
                self._catch_up(file)
                lines = [_line(record) for index, record in new.items() if index not in self._listed]
                os.write(file.fileno(), b"".join(lines))  # opened for appending
                self._listed.update(new)
                self._read = os.fstat(file.fileno()).st_size

    def _catch_up(self, file) -> None:
        """Read what other ranks and earlier runs wrote; a line cut off by a kill is closed."""
        file.seek(self._read)
        text = file.read()
        if text and not text.endswith(b"\n"):
            os.write(file.fileno(), b"\n")
        for line in text.splitlines():
            try:
                self._listed.add(int(json.loads(line)["index"]))
            except (ValueError, KeyError, TypeError):
                continue  # the cut-off line


def _line(record: BadRecord) -> bytes:
    value = {"index": record.index, "dataset": record.dataset, "cause": record.cause, "detail": record.detail}
    return json.dumps(value).encode() + b"\n"


@contextmanager
def locked(file):
    """Hold the file's lock where the file system has locks; appending stays whole without one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
