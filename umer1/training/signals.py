"""SIGTERM (a scheduler's or a user's) and SIGUSR1 (a warning before the time limit): save at the next step, leave.

One that comes while the run starts is remembered until the first step; one during the last export changes nothing.

A rank whose launcher was killed ends as well: an orphan would train on, and save beside the run that replaces it.
"""

import os
import signal
from types import FrameType

from umer1.files import write_text
from umer1.processes import end_with_parent

LEAVE = (signal.SIGTERM, signal.SIGUSR1)


def end_with_launcher() -> None:
    """Have the kernel kill this rank when torchrun dies without ending it (Linux; elsewhere nothing happens)."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


class SignalWatch:
    """A context manager that remembers the first signal; the loop looks at it once a step and all ranks agree on it.

    Around all of the program: a start takes minutes, and a job that is preempted in one has not failed.  A launcher
    that ignores these signals, as under Slurm (examples/slurm/job.sh), hands that down: here they are taken back.
    """

    def __init__(self):
        self.received: int = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def __enter__(self) -> "SignalWatch":
        self._before = {number: signal.signal(number, self._note) for number in LEAVE}
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def tell_job_script() -> None:
    """Write the file that UMER1_STOPPED_FILE names, where it names one: training was stopped, not completed.

    The exit status is 0 either way, as nothing went wrong; examples/slurm/job.sh puts a stopped job back into the
    queue.
    """
    if path := os.environ.get("UMER1_STOPPED_FILE"):
        write_text(path, "stopped\n")
