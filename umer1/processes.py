"""What processes ask of the operating system."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process signal `number` when the thread that started it ends, however it ends.

    Linux; elsewhere nothing happens.  Kept over exec, not handed down to processes that this one starts.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
