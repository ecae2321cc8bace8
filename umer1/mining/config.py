"""The settings of `umer1 mine`, and their rules."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from umer1.inference.engine import EngineConfig
from umer1.rules import bound_problems, data_root_problems, path_problems, same_place


@dataclass(kw_only=True, slots=True)
class MineConfig:
    """What negatives are looked for, and where"""

    input: str | None = None
    """SFT file of pairs, a JSON list or JSONL (docs/data.md)."""
    data_root: str | None = None
    """Folder that media paths start at and cannot leave; default: the input's folder."""
    output: str | None = None
    """The same file with negatives; FILE.mining.json beside it says how they came about."""
    mode: Literal["disc", "gen"] = "disc"
    """State that is compared: disc = at <disc_emb>; gen = at <gen_emb> of the responses that are in the file."""
    num_negatives: int = 1
    """Most negatives that a pair gets."""
    top_k: int = 100
    """Candidates of a query, best first, among which negatives are taken."""
    skip_top: int = 0
    """Best candidates that are passed over, of those that could be negatives."""
    relative_margin: float | None = 0.05
    """A negative's score is at most s - margin * |s|, with s the score of the pair's positive; none: any score."""
    absolute_margin: float | None = None
    """A negative's score is at most s - margin."""
    across_data_sets: bool = False
    """Take negatives from all data sets of the file, not from the pair's own alone."""
    replace: bool = False
    """Drop the negatives that the file has; otherwise they stay and the new ones follow them."""
    skip_bad_inputs: bool = False
    """Leave pairs that cannot be embedded as they are, and count them, in place of stopping."""
    save_every: int = 1024
    """Inputs of each copy of the model between two saves; what a killed run may lose."""
    num_workers: int = 4
    """Threads of each process that decode images ahead of the model."""

    def violations(self) -> list[str]:
        found = [f"--{name} is required" for name in ("input", "output") if not getattr(self, name)]
        found += bound_problems(self, 1, "num_negatives", "top_k", "save_every", "num_workers")
        if not 0 <= self.skip_top < self.top_k:
            found.append(f"skip_top={self.skip_top} must be at least 0 and below top_k={self.top_k}")
        for name in ("relative_margin", "absolute_margin"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                found.append(f"{name}={value} must be 0 or above, or none")
        rule = "is not a file; give a JSON list or JSONL of SFT pairs"
        found += path_problems("input", self.input, Path.is_file, rule)
        found += data_root_problems(self.data_root)
        found += path_problems("output", self.output, lambda path: not path.is_dir(), "is a directory; name a file")
        if self.input and self.output and same_place(self.input, self.output):
            found.append(f"output={self.output} is the input; name another file")
        return found


@dataclass(kw_only=True, slots=True)
class MineCommand:
    """umer1 mine"""

    mine: MineConfig = field(default_factory=MineConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def violations(self) -> list[str]:
        return self.mine.violations() + self.engine.violations()
