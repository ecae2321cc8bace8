"""One piece of work at a time beside the training thread."""

import threading
import time
from collections.abc import Callable


class Background:
    """Runs a function in a thread; what it raised is kept for the training thread, which asks at moments of its own."""

    def __init__(self, name: str):
        self.name = name
        self.seconds: float | None = None  # of the last work that is over
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin; the work before must have been waited for."""
        assert self._thread is None
        # A daemon: a disk that hangs must not keep a process that has been told to end.
        self._thread = threading.Thread(target=self._run, args=(work,), name=self.name, daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        try:
            work()
        except BaseException as error:
            self._error = error
        self.seconds = time.perf_counter() - started

    @property
    def busy(self) -> bool:
        """Whether the work still runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether there is an error that `wait` would raise."""
        return self._error is not None

    def wait(self) -> None:
        """Until the work, if there is any, is over; raises what it raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
