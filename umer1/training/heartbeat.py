"""Where each rank is, in a small file of its own that a thread keeps fresh.

Read by people, by umer1.training.hang, and by a run that starts: two in one --save would remove each other's files.

The training thread only sets fields: a disk that hangs cannot hold it up here.
"""

import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from umer1.processes import is_running

RECORD_BYTES = 512
ALARM = "alarm"  # holds "1" once a rank has found that the run hangs
SPOKEN = "spoken"  # is there once a rank has the word to say where all are
_TOGETHER = 0.3  # seconds in which runs that start at one moment have written


@dataclass(frozen=True, slots=True)
class Beat:
    """A record: JSON on one line, filled up with blanks to RECORD_BYTES."""

    rank: int
    host: str
    pid: int
    step: int  # as the log numbers it
    phase: str
    passes: int  # what was done in the phase so far: forward passes, looks at rollouts
    seconds: float  # since the last progress
    written: int  # counts up with each writing: a process that lives writes on
    time: float  # of writing, seconds since 1970


class Heartbeat:
    """One rank's place in the run; `enter` and `beat` are progress.  A context manager runs the thread that writes."""

    def __init__(self, folder: Path, rank: int, interval: float):
        self.folder, self.rank, self.interval = folder, rank, interval
        self.step, self.phase, self.passes = 0, "starting", 0
        self.progress = 0  # counts up
        self.since = time.monotonic()
        self.alarm_heard = False
        self._written, self._failed = 0, False
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep_fresh, name="heartbeat", daemon=True)

    def enter(self, phase: str) -> None:
        """The rank is in another phase."""
        self.phase, self.passes = phase, 0
        self._moved()

    def beat(self) -> None:
        """Something was done inside a phase."""
        self.passes += 1
        self._moved()

    def _moved(self) -> None:
        self.since = time.monotonic()
        self.progress += 1

    def now(self) -> Beat:
        """What would be written."""
        still = time.monotonic() - self.since
        place = (self.rank, self._host[:100], self._pid, self.step, self.phase[:100], self.passes)
        return Beat(*place, round(still, 1), self._written, round(time.time(), 1))

    def write(self) -> None:
        """The record, in its place in the file.  A disk that refuses is said once; training goes on."""
        self._written += 1
        line = json.dumps(asdict(self.now())).encode()
        try:
            # Opened and closed each time: NFS shows others what was written before a close.
            file = os.open(record_path(self.folder, self.rank), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, line.ljust(RECORD_BYTES - 1) + b"\n", 0)
            finally:
                os.close(file)
        except OSError as error:
            if not self._failed:
                print(f"rank {self.rank}: the heartbeat cannot be written: {error}", file=sys.stderr, flush=True)
            self._failed = True

    def raise_alarm(self) -> None:
        """Tell the other ranks that the run hangs."""
        (self.folder / ALARM).write_text("1")

    def take_the_word(self) -> bool:
        """Whether this rank is the first to ask: a rank that stood still and wakes up later must not speak as well."""
        try:
            os.close(os.open(self.folder / SPOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            return False
        except OSError:  # rather twice than not at all
            return True
        return True

    def _keep_fresh(self) -> None:
        while not self._closing.wait(self.interval):
            self.write()
            self.alarm_heard = self.alarm_heard or _alarm_is_raised(self.folder)

    def __enter__(self) -> "Heartbeat":
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.enter("ended")
        self._closing.set()
        self._thread.join(timeout=10)  # longer only where the disk hangs
        if not self._thread.is_alive():
            self.write()


def record_path(folder: Path, rank: int) -> Path:
    """Where a rank's record is."""
    return folder / f"rank-{rank}.json"


def clear(folder: Path) -> None:
    """Make the folder, without what an earlier run said; its stacks stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("rank-*.json"), folder / ALARM, folder / SPOKEN]:
        path.unlink(missing_ok=True)


def read_beats(folder: Path) -> dict[int, Beat]:
    """The records of all ranks that can be seen from here; one that is just being written may be left out."""
    found = {}
    for path in folder.glob("rank-*.json"):
        try:
            beat = Beat(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            continue
        found[beat.rank] = beat
    return found


def claim(folder: Path) -> Beat | None:
    """Make the folder this run's and write its first rank's first record; or the record of a run that is at work in it.

    Of two runs that start at one moment the one that writes last has it.
    """
    if other := other_run(folder):
        return other
    clear(folder)
    heart = Heartbeat(folder, 0, 0.0)
    heart.write()
    time.sleep(_TOGETHER)
    mine, found = heart.now(), read_beats(folder).get(0)
    return found if found is not None and (found.host, found.pid) != (mine.host, mine.pid) else None


def other_run(folder: Path, patience: float = 11.0) -> Beat | None:
    """The first rank's record of a run that writes it now, or None.

    Only what may be alive is waited for, at most `patience` seconds, which is two intervals and more: a process of
    another host, or one of this host that runs.
    """
    before = now = read_beats(folder).get(0)
    deadline = time.monotonic() + patience
    while now is not None and _may_live(now) and time.monotonic() < deadline:
        if now != before:
            return now
        time.sleep(0.1)
        now = read_beats(folder).get(0, now)  # it may be in the middle of being written
    return None


def _may_live(beat: Beat) -> bool:
    if beat.phase == "ended" or beat.pid == os.getpid():
        return False
    return beat.host != socket.gethostname()[:100] or is_running(beat.pid)


def _alarm_is_raised(folder: Path) -> bool:
    try:
        return (folder / ALARM).read_text() == "1"
    except OSError:
        return False
