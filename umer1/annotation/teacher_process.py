"""Becomes `python ARGUMENTS...`, and is ended by the kernel when the process that started it ends, however that ends.

python -m umer1.annotation.teacher_process PARENT_PID ARGUMENTS...
"""

import os
import signal
import sys

from umer1.processes import end_with_parent


def main() -> None:
    parent, *arguments = sys.argv[1:]
    end_with_parent(signal.SIGTERM)  # a server ends its own processes then
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        sys.exit(1)
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    main()
