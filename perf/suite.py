"""A benchmark suite: inputs of several sizes, providers side by side, and the record that their numbers go into."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Cost, Provider, Results, dtype_name, errors, measure_ceilings, measured, wall_seconds
from provenance import new_record, save_record
from torch._dynamo.utils import counters

from umer1 import device
from umer1.errors import UserError

# Relative error that a provider of ours may have in a run that only checks: a few times the dtype's rounding.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size."""

    shape: Mapping[str, int]
    dtype: torch.dtype
    mode: str = "forward + backward"
    reference: bool = True
    """Whether there is time and memory for the fp64 reference."""
    least_rounds: int = 3

    def __str__(self) -> str:
        sizes = "-".join(f"{name}{value}" for name, value in self.shape.items())
        return f"{sizes}-{dtype_name(self.dtype)}-{self.mode.replace(' ', '')}"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a bench_*.py file measures."""

    name: str
    cases: Mapping[str, Sequence[Case]]
    """Of "tiny" (checks), "cpu" and "gpu"."""
    providers: Sequence[Provider]
    inputs: Callable[[Case, torch.device], Any]
    """The same for every provider."""
    reference: Callable[[Any], Results]
    """In fp64."""
    cost: Callable[[Case], Cost]


@contextmanager
def as_named(provider: Provider) -> Iterator[None]:
    """AssertionError where a provider named torch.compile compiles nothing inside: the row would be eager's."""
    if not provider.name.startswith("torch.compile"):
        yield
        return
    torch._dynamo.reset()  # else a graph of an earlier case may serve this one
    counters.clear()
    yield
    assert counters["stats"]["unique_graphs"], f"{provider.name}: no graph was compiled"


@dataclass
class Session:
    """One run of one suite."""

    suite: Suite
    folder: Path | None
    record: dict[str, Any] = field(init=False)
    _made: tuple[Case, Any, Results | None] | None = field(init=False, default=None)

    def __post_init__(self):
        self.record = new_record(self.suite.name)

    def inputs(self, case: Case) -> tuple[Any, Results | None]:
        """A case's inputs and reference, made once."""
        if self._made is None or self._made[0] is not case:
            self._made = None  # the last case's memory first
            torch.manual_seed(0)
            inputs = self.suite.inputs(case, device.device())
            self._made = case, inputs, self.suite.reference(inputs) if case.reference else None
        return self._made[1:]

    def check(self, case: Case, provider: Provider, benchmark: Any) -> None:
        """Run once, untimed; a provider of ours has to be near the reference."""
        inputs, reference = self.inputs(case)
        if (obstacle := provider.obstacle(inputs)) is not None:
            pytest.skip(obstacle)
        try:
            with provider.within(), as_named(provider):
                results = benchmark.pedantic(provider.make(inputs))
        except UserError as error:
            pytest.skip(str(error))
        found = errors(results, reference)
        if provider.ours:
            limit = TOLERANCE[case.dtype]
            wrong = {name: error for name, error in found.items() if not error <= limit}
            assert not wrong, f"{provider.name} on {case}: relative errors {wrong} above {limit}"

    def measure(self, case: Case, provider: Provider, benchmark: Any) -> None:
        """Time it and put the row into the record, which is written after every row: a later hang loses nothing."""
        if "ceilings" not in self.record:
            dtypes = {case.dtype for cases in self.suite.cases.values() for case in cases}
            self.record["ceilings"] = measure_ceilings(tuple(dtypes | {torch.float32}))
        inputs, reference = self.inputs(case)

        def timer(call: Callable[[], Any], once: float) -> list[float]:
            if once < 2.0:  # what measured its memory took time as well
                (once,) = wall_seconds(call, 1)
            rounds = min(30, max(case.least_rounds, math.ceil(1.0 / max(once, 1e-6))))

            def run() -> None:
                call()
                device.synchronize()

            benchmark.pedantic(run, rounds=rounds)
            return list(benchmark.stats.stats.data)

        cost = self.suite.cost(case)
        shape = {"shape": dict(case.shape), "dtype": dtype_name(case.dtype), "mode": case.mode}
        row = {"provider": provider.name, "ours": provider.ours, "not_measured": "broke off"}
        try:
            if (obstacle := provider.obstacle(inputs)) is not None:
                row = row | {"not_measured": obstacle}
            else:
                with as_named(provider):
                    row = measured(provider, inputs, reference, cost, self.record["ceilings"], timer)
        finally:  # one of ours that fails, and what is interrupted, are lines of the record too
            self.record["rows"].append(shape | {"flops": cost.flops, "bytes": cost.bytes} | row)
            save_record(self.record, self.folder)
        if "not_measured" in row:
            pytest.skip(row["not_measured"])
        benchmark.extra_info.update(
            {key: row[key] for key in ("peak_bytes", "error", "share_of_ceiling") if key in row}
        )
