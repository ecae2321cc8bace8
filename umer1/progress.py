"""One line now and then about how far a long job is."""

import sys
import time
from collections.abc import Callable


def clock(seconds: float) -> str:
    """1:02:03"""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Progress:
    """Prints `what: 128/1,024 inputs, 60.1/s, ETA 0:00:15` to stderr at most every `interval` seconds."""

    def __init__(
        self,
        what: str,
        total: int,
        *,
        unit: str = "inputs",
        enabled: bool = True,
        interval: float = 5.0,
        now: Callable[[], float] = time.monotonic,
    ):
        self.what, self.total, self.unit = what, total, unit
        self.enabled, self.interval, self.now = enabled, interval, now
        self.start = self.last = now()
        self.done = 0

    def add(self, count: int) -> None:
        """`count` more of the total are done."""
        self.done += count
        time_now = self.now()
        if self.enabled and self.done < self.total and time_now - self.last >= self.interval:
            self.last = time_now
            rate = self.done / (time_now - self.start)
            left = clock((self.total - self.done) / rate) if rate > 0 else "unknown"
            self._print(f"{self.done:,}/{self.total:,} {self.unit}, {rate:.1f}/s, ETA {left}")

    def skip(self, count: int) -> None:
        """`count` of the total turn out to need no work."""
        self.total -= count

    def finish(self) -> None:
        seconds = self.now() - self.start
        if self.enabled:
            self._print(f"{self.done:,} {self.unit} in {seconds:.1f} s")

    def _print(self, text: str) -> None:
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)
