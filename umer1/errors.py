"""The two errors a user meets, and how a program ends on them: one message, no traceback."""

import os
import select
import sys
import time
import warnings
from contextlib import contextmanager

from umer1.printable import printable

NO_READER = 141  # what a shell says of a program that SIGPIPE ended


class UserError(Exception):
    """Something the user can mend.  The message names the value, the rule, the legal values and the next step."""


class ConfigError(UserError):
    """All violations of a configuration at once."""

    def __init__(self, violations: list[str]):
        self.violations = list(violations)
        count = len(self.violations)
        lines = "\n".join(f"  - {violation}" for violation in self.violations)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in the configuration:\n{lines}")


@contextmanager
def exit_on_user_error(program: str):
    """Turn a UserError into one message from one rank and exit status 2; other errors keep their traceback.

    A program whose output nobody reads any more (`... | head`) ends without a word, as other programs do.
    Control characters in a message, which quotes data, are escaped.
    """
    # megatron-core calls collectives by names that torch will change; a program may say what it shows, a library not
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..* is deprecated", category=FutureWarning)
    with _end_with_the_reader():
        try:
            yield
        except UserError as error:
            if int(os.environ.get("RANK", "0")) == 0:
                print(f"{program}: error: {printable(error)}", file=sys.stderr, flush=True)
            else:
                time.sleep(1.0)  # torchrun ends all ranks when the first one leaves: the message comes first
            sys.exit(2)


@contextmanager
def _end_with_the_reader():
    """Exit status 141 where standard output is a pipe that the other end has closed."""
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()  # here it can be caught; at the interpreter's end it is a warning and status 120
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not _is_without_reader(1):
            raise  # a socket's
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in the buffer goes there
        sys.exit(NO_READER)


def _is_without_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
