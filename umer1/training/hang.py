"""A run that hangs says where every rank is and ends, before collectives time out without a word about it.

A thread of each rank sees that the training thread makes no progress.  It raises the alarm for all ranks; each writes
the Python stacks of all its threads to rank-N.stacks beside the heartbeats, the lowest rank that lives prints one
message, and all leave with status 75 (sysexits.h: a temporary failure, try again).
"""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from umer1.training.heartbeat import Beat, Heartbeat, read_beats

HANG_STATUS = 75
_MAX_INTERVAL = 5.0  # seconds between looks
_MIN_WAIT = 1.0  # seconds in which a live rank is seen to write its record
_DISK_SECONDS = 10.0  # after which the report is given up: the disk hangs too


def look_interval(timeout: float | None) -> float:
    """Seconds between looks, and between heartbeats, for a time-out in seconds; None: there is no time-out."""
    return min(_MAX_INTERVAL, timeout / 8) if timeout else _MAX_INTERVAL


class HangWatch:
    """A context manager around the run.  `timeout`: seconds without progress; None switches it off.

    leave: ends the process with a status, whatever its threads do.
    """

    def __init__(
        self,
        heart: Heartbeat,
        world_size: int,
        timeout: float | None,
        leave: Callable[[int], None] = os._exit,
    ):
        self.heart, self.world_size, self.timeout, self.leave = heart, world_size, timeout, leave
        self.interval = look_interval(timeout)
        self.path = heart.folder / f"rank-{heart.rank}.stacks"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look, name="hang watch", daemon=True)

    def __enter__(self) -> "HangWatch":
        if self.timeout:
            self._stacks = open(self.path, "ab")  # open by now: a hang may come from the disk
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.timeout:
            self._closing.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            with contextlib.suppress(OSError):  # where the disk has turned read-only the empty file stays
                if not self.path.stat().st_size:
                    self.path.unlink()

    def _look(self) -> None:
        """Time in which this process did not run at all, stopped or suspended as a whole, is not counted."""
        idle, seen, before = 0.0, self.heart.progress, time.monotonic()
        while not self._closing.wait(self.interval):
            now, progress = time.monotonic(), self.heart.progress
            idle = 0.0 if progress != seen else idle + min(now - before, 2 * self.interval)
            seen, before = progress, now
            # Extension code that keeps the interpreter's lock stops this thread too; faulthandler's own needs no lock.
            faulthandler.dump_traceback_later(self.timeout + 2 * self.interval, file=self._stacks)
            if idle >= self.timeout or self.heart.alarm_heard:
                self._end()

    def _end(self) -> None:
        report = threading.Thread(target=self._report, name="hang report", daemon=True)
        report.start()
        report.join(6 * self._wait + _DISK_SECONDS)
        if report.is_alive():
            say(
                f"rank {self.heart.rank} hangs in {self.heart.phase}, and the disk of {self.heart.folder} hangs as well"
            )
            faulthandler.dump_traceback(file=2)
        self.leave(HANG_STATUS)

    @property
    def _wait(self) -> float:
        return max(2 * self.interval, _MIN_WAIT)

    def _report(self) -> None:
        mine = self.heart.now()
        header = f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {place_of(mine)}\n"
        os.write(self._stacks.fileno(), header.encode())
        faulthandler.dump_traceback(file=self._stacks)
        self.heart.raise_alarm()
        before = read_beats(self.heart.folder)
        time.sleep(self._wait)
        after = read_beats(self.heart.folder)
        live = {rank for rank, beat in after.items() if rank in before and beat.written != before[rank].written}
        if self.heart.rank == min(live | {self.heart.rank}) and self.heart.take_the_word():
            say(message(after, live | {self.heart.rank}, self.world_size, self.timeout, self.heart.folder))
        time.sleep(2 * self._wait)  # the launcher ends everything when the first rank leaves: others may be at it still


def place_of(beat: Beat) -> str:
    """One rank's line."""
    passes = f" ({beat.passes} passes done)" if beat.passes else ""
    return (
        f"rank {beat.rank} (pid {beat.pid} on {beat.host}): step {beat.step}, {beat.phase}{passes}, no progress for "
        f"{beat.seconds:.0f} s"
    )


def message(beats: dict[int, Beat], live: set[int], world_size: int, timeout: float, folder: Path) -> str:
    """Where every rank is; those that do not write any more are named first among the suspects."""
    lines = []
    for rank in range(world_size):
        beat = beats.get(rank)
        if beat is None:
            lines.append(f"rank {rank}: its heartbeat cannot be seen from here")
        elif beat.phase == "ended":
            lines.append(f"rank {rank}: has ended")
        elif rank in live:
            lines.append(place_of(beat))
        else:
            silent = max(time.time() - beat.time, 0.0)
            lines.append(
                f"{place_of(beat)} when it was last heard, {silent:.0f} s ago: stopped, killed or out of reach"
            )
    silent_ranks = [rank for rank, beat in beats.items() if rank not in live and beat.phase != "ended"]
    there = [beat for beat in beats.values() if beat.phase != "ended"]
    behind = min((beat.step for beat in there), default=0)
    suspects = sorted(silent_ranks) or [beat.rank for beat in there if beat.step == behind]
    named = ", ".join(map(str, suspects)) if len(suspects) < world_size else "none stands out"
    return (
        f"umer1: no progress for {timeout:g} s (--hang-timeout-minutes); the run ends with status {HANG_STATUS}. Where "
        "every rank is:\n  " + "\n  ".join(lines) + f"\nLook first at: {named}. Python stacks of all threads: "
        f"{folder}/rank-N.stacks"
    )


def say(text: str) -> None:
    """To stderr past Python's locks, which a thread that hangs may hold."""
    os.write(2, f"{text}\n".encode())
