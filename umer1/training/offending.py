"""Steps whose loss or gradient is not finite or far above the usual, and the samples that they were made of."""

import json
import math
import os
import statistics
from collections import deque
from pathlib import Path

from umer1.data.bad_samples import locked

_WINDOW = 64  # steps that say what is usual
_FEWEST = 16  # steps before anything is called a spike
_FLOOR = 0.01  # least deviation, as a share of the median: a curve may be flat
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution


class LossWatch:
    """What is wrong with a step, by the steps before it.  It starts anew with each start of the program."""

    def __init__(self, deviations: float):
        self.deviations = deviations
        self._seen = {name: deque(maxlen=_WINDOW) for name in ("loss", "gradient")}

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """The cause: non_finite_loss, non_finite_gradient, loss_spike, gradient_spike; None for a usual step."""
        cause = None
        for name, value in (("gradient", grad_norm), ("loss", loss)):
            if not math.isfinite(value):
                cause = f"non_finite_{name}"
            elif self._is_spike(self._seen[name], value) and cause is None:
                cause = f"{name}_spike"
        for name, value in (("gradient", grad_norm), ("loss", loss)):
            if math.isfinite(value):
                self._seen[name].append(value)
        return cause

    def _is_spike(self, seen: deque, value: float) -> bool:
        if not self.deviations or len(seen) < _FEWEST:
            return False
        middle = statistics.median(seen)
        deviation = _MAD_TO_DEVIATION * statistics.median(abs(other - middle) for other in seen)
        return value - middle > self.deviations * max(deviation, _FLOOR * abs(middle))


def list_samples(path: Path, record: dict) -> None:
    """Append one line, whole, whatever other ranks append.  record: JSON but for numbers that are not finite."""
    clean = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file, locked(file):
        os.write(file.fileno(), json.dumps(clean).encode() + b"\n")
