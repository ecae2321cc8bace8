"""Where a scenario runs, what it starts, and how its end is compared with the undisturbed one's.

Runs are small (two layers, 24 pairs) and save every second step, so that a fault hits a save about as often as a step.
"""

import functools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from grpo_reference import write_rl_pairs
from grpo_runs import START_SECONDS, TESTS, Program, metrics
from safetensors.torch import load_file
from sft_reference import write_pairs
from tiny_qwen2_vl import make_tiny_directory

SFT = str(TESTS.parent / "examples" / "pretrain_sft.py")
STEP = "elapsed time"  # in the log line of every step
CURVE = ("iteration", "loss", "reward", "kl", "grad_norm", "learning_rate")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    faults: int
    starts: int  # of the program after a fault
    end: str  # beside the undisturbed run
    longest: float | None  # seconds from a fault to the end of all processes


@dataclass(eq=False)
class Place:
    """Where scenarios run, and how much they do."""

    root: Path
    kills: int
    rng: random.Random
    say: Callable[[str], None]
    seconds: list[float] = field(default_factory=list)  # from each fault to the end of all processes

    @functools.cached_property
    def model(self) -> Path:
        return make_tiny_directory(self.root / "model", layers=2)

    @functools.cached_property
    def wide_model(self) -> Path:
        """vLLM's attention on a CPU wants wide heads."""
        return make_tiny_directory(self.root / "wide_model", layers=2, hidden=128)

    @functools.cached_property
    def pairs(self) -> Path:
        return write_pairs(self.root / "data", count=24)

    @functools.cached_property
    def rl_pairs(self) -> Path:
        return write_rl_pairs(self.root / "rl_data", count=12)

    @functools.cache  # noqa: B019 - one place a process
    def undisturbed(self, iterations: int, processes: int) -> Path:
        folder = self.root / f"undisturbed-{iterations}-{processes}"
        self.sft(folder, iterations, processes=processes).finish(seconds=1800)
        return folder

    def sft(self, folder: Path, iterations: int, *flags: str, processes: int = 2, under: tuple[str, ...] = ()):
        given = (
            f"--fp32 --global-batch-size 4 --micro-batch-size 2 --train-iters {iterations} --lr 1e-3 --save-interval 2"
        )
        given += f" --lr-warmup-iters 4 --data-block-size 4 --num-workers {0 if under else 1}"
        paths = ["--hf-model", self.model, "--data-path", self.pairs, "--data-root", self.pairs.parent]
        paths += ["--save", folder / "run", "--export-hf", folder / "hf"]
        command = [SFT, *map(str, paths), *given.split(), *flags]
        return Program(command, folder, processes=processes, under=under)

    def until_ended(self, run: Program) -> None:
        """After a fault: what is left must end by itself, and leave nothing behind."""
        since = time.monotonic()
        run.wait_to_end(START_SECONDS)
        run.assert_no_orphans()
        self.seconds.append(time.monotonic() - since)

    def take_longest(self) -> float | None:
        longest = max(self.seconds, default=None)
        self.seconds.clear()
        return longest


def tensors_differ(got: Path, want: Path) -> int:
    """Tensors of the exported models that are not bit for bit the same."""
    first, second = (load_file(folder / "hf" / "model.safetensors") for folder in (got, want))
    assert first.keys() == second.keys()
    return sum(not first[name].equal(second[name]) for name in second)


def largest_error(got: Path, want: Path) -> float:
    """Relative, over the tensors of the exported models."""
    first, second = (load_file(folder / "hf" / "model.safetensors") for folder in (got, want))
    return max(float((first[name] - second[name]).norm() / second[name].norm()) for name in second)


def assert_same_end(got: Path, want: Path) -> str:
    """The same weights and the same curve, each step once."""
    different = tensors_differ(got, want)
    assert not different, f"{different} tensors differ from the undisturbed run's: {got}"
    curves = [
        [{name: line[name] for name in CURVE if name in line} for line in metrics(folder)] for folder in (got, want)
    ]
    assert curves[0] == curves[1], f"the curve differs from the undisturbed run's: {got}"
    left = [entry.name for entry in (got / "run").iterdir() if entry.name.startswith(".")]
    assert not left, f"left behind in {got / 'run'}: {left}"
    return f"same weights and curve ({len(curves[0])} steps), bit for bit"
