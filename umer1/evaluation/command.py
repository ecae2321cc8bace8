"""`umer1 eval`: each benchmark is a module's main(argv)."""

import importlib

BENCHMARKS = {"mini": "umer1.evaluation.mini"}


def main(argv: list[str]) -> None:
    """Run the benchmark that `--benchmark` names; mini where it names none."""
    importlib.import_module(BENCHMARKS["mini"]).main(argv)
