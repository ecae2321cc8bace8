"""What processes ask of the operating system."""

import ctypes
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process signal `number` when the thread that started it ends, however it ends.

    Linux; elsewhere nothing happens.  Kept over exec, not handed down to processes that this one starts.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def is_running(pid: int) -> bool:
    """Whether a process of this host has this number and has not ended (Linux; elsewhere False)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")  # those have, and wait for their parent to look
