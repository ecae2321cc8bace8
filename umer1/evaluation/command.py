"""`umer1 eval`: scores of a model on a benchmark.

    umer1 eval --benchmark mini --model DIR --output DIR
    umer1 eval --benchmark mmeb-v2 --model DIR --data-root DIR --output DIR [--tasks K700 MSVD] [--query-mode gen ...]

mini: the generated benchmark, which needs no data (the default).  mmeb-v2: the 78 tasks of MMEB-V2, from files on disk.
Each has settings of its own: umer1 eval --benchmark NAME --help.
"""

import importlib
from dataclasses import dataclass, field

from umer1.configuration import read_flags, read_yaml
from umer1.errors import UserError

BENCHMARKS = {"mini": "umer1.evaluation.mini", "mmeb-v2": "umer1.evaluation.mmeb_v2.command"}


@dataclass(kw_only=True, slots=True)
class _Choice:
    benchmark: str | None = None
    """Name of the benchmark."""


@dataclass(kw_only=True, slots=True)
class _Chosen:
    eval: _Choice = field(default_factory=_Choice)


def main(argv: list[str]) -> None:
    """Run the benchmark that `--benchmark` (or the YAML file of `--config`) names; mini where none is named."""
    passed_over: list[str] = []  # the other settings: the benchmark knows them
    flags, config = read_flags(argv, _Chosen, passed_over)
    if {"-h", "--help"} & set(argv) and "benchmark" not in flags:
        print(__doc__)
        return
    named = (read_yaml(config, _Chosen, passed_over) if config else {}) | flags
    name = named.get("benchmark", "mini")
    if name not in BENCHMARKS:
        raise UserError(f"benchmark={name!r} is not legal; use {' or '.join(BENCHMARKS)}")
    importlib.import_module(BENCHMARKS[name]).main(argv)
