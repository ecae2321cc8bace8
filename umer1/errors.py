"""The two errors a user meets, and how a program ends on them: one message, no traceback."""

import os
import sys
import time
from contextlib import contextmanager


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
    """Turn a UserError into one message from one rank and exit status 2; other errors keep their traceback."""
    try:
        yield
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(1.0)  # torchrun ends all ranks when the first one leaves: the message comes first
        sys.exit(2)
