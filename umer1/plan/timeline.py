"""A step as a row of allocations: what is live at each moment, and what of it stands at the peak."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Timeline:
    """Bytes by name.  `peak` is the most that was ever live together, `parts` what it was made of, `moment` when."""

    live: Counter = field(default_factory=Counter)
    peak: int = 0
    moment: str = ""
    parts: dict[str, int] = field(default_factory=dict)

    def hold(self, name: str, size: float, moment: str) -> None:
        """From now on `size` bytes more are live under `name`."""
        self.live[name] += int(size)
        self.touch(moment)

    def drop(self, name: str, size: float | None = None) -> None:
        """`size` bytes of `name` are given back, or all of them."""
        self.live[name] -= self.live[name] if size is None else int(size)
        assert self.live[name] >= 0, name

    def touch(self, moment: str, **working: float) -> None:
        """A moment that takes `working` bytes, by name, beside what is live, and gives them back."""
        total = self.live.total() + sum(map(int, working.values()))
        if total > self.peak:
            extra = Counter({name: int(size) for name, size in working.items()})
            self.peak, self.moment = total, moment
            self.parts = {name: size for name, size in (self.live + extra).items() if size}
