"""What a training run has written into its --save directory, read for people: damaged parts are counted, not fatal."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from umer1.errors import UserError

_SAMPLE_CHARACTERS = 20_000  # of a file of rollouts
_BAD_SAMPLES = 20
_LARGEST = 1e300  # no number of a run; an axis that ends there can still be computed, and one of its inverse


@dataclass(kw_only=True)
class Run:
    """One run, in the order of its steps."""

    name: str
    path: Path
    curves: dict[str, list[tuple[int, float]]]  # field -> (iteration, finite value)
    last: dict[str, Any]  # what metrics.jsonl says of the newest step
    damaged_lines: int = 0  # of metrics.jsonl that are no record
    not_finite: dict[str, int] = field(default_factory=dict)  # field -> values that are NaN or infinite
    settings: dict[str, str] = field(default_factory=dict)  # "section.name" -> value, of config.yaml
    versions: list[tuple[int, str, str]] = field(default_factory=list)  # (from this step on, package, version)
    pairs: dict[str, int] = field(default_factory=dict)  # data set -> pairs
    rollouts: list[tuple[str, str]] = field(default_factory=list)  # (file name, readable text), first and newest
    bad_samples: list[dict[str, Any]] = field(default_factory=list)  # the first ones
    bad_causes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what could not be read


def read_run(name: str, path: Path) -> Run:
    """UserError where `path` holds no metrics.jsonl with at least one record."""
    metrics = path / "metrics.jsonl"
    try:
        if not metrics.is_file():
            raise UserError(f"{path} is no training run: it has no metrics.jsonl; give the directory that was --save")
        records, damaged = _records(metrics)
    except OSError as error:
        raise UserError(f"{metrics} cannot be read: {error.strerror}") from None
    records = [record for record in records if _is_step(record.get("iteration"))]
    if not records:
        raise UserError(f"{metrics} has no record of a step ({damaged} damaged lines)")
    records.sort(key=lambda record: record["iteration"])
    # A held-out evaluation that a resumed run makes up for has a record of its own, of the same step.
    newest = [record for record in records if record["iteration"] == records[-1]["iteration"]]
    last = {key: value for record in newest for key, value in record.items()}
    run = Run(name=name, path=path, curves={}, last=last, damaged_lines=damaged)
    absent: dict[str, int] = {}  # the log writes what is not finite, and what cannot be measured, as null
    for record in records:
        for key, value in record.items():
            if value is None:
                absent[key] = absent.get(key, 0) + 1
            if isinstance(value, bool) or not isinstance(value, int | float) or key == "iteration":
                continue
            if is_finite(value):
                shown = float(value) if abs(value) > 1 / _LARGEST else 0.0
                run.curves.setdefault(key, []).append((record["iteration"], shown))
            else:
                run.not_finite[key] = run.not_finite.get(key, 0) + 1
    for key in absent.keys() & (run.curves.keys() | {"loss", "grad_norm"}):  # these two are always measured
        run.not_finite[key] = run.not_finite.get(key, 0) + absent[key]
    _read_settings(run)
    _read_environment(run)
    try:
        _read_samples(run)
    except OSError as error:
        run.notes.append(f"{error.filename} cannot be read: {error.strerror}")
    return run


def is_finite(value: Any) -> bool:
    """Whether it is a number that a chart can have."""
    return isinstance(value, int | float) and abs(value) < _LARGEST


def _is_step(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**53


def _records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """JSON objects of a JSONL file, and how many lines are none."""
    found, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            found.append(record)
        elif line.strip():
            damaged += 1
    return found, damaged


def _read_settings(run: Run) -> None:
    try:
        config = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
        for section, values in config.items() if isinstance(config, dict) else ():
            for key, value in values.items() if isinstance(values, dict) else ():
                run.settings[f"{section}.{key}"] = json.dumps(value, ensure_ascii=False, default=str)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        run.notes.append(f"config.yaml cannot be read: {error}")


def _read_environment(run: Run) -> None:
    path = run.path / "run.json"
    if not path.is_file():
        return
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        run.pairs = {str(key): int(value) for key, value in noted.get("pairs", {}).items()}
        for entry in noted.get("versions", []):
            run.versions += [(int(entry["step"]), str(key), str(value)) for key, value in entry["packages"].items()]
    except (OSError, ArithmeticError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        run.notes.append(f"run.json cannot be read: {error}")


def _read_samples(run: Run) -> None:
    files = sorted((run.path / "rollouts").glob("iter_*.txt"))
    for path in [files[0], files[-1]] if len(files) > 1 else files:
        text = path.read_text(encoding="utf-8", errors="replace")
        cut = f"\n... {len(text) - _SAMPLE_CHARACTERS:,} more characters in {path.name}"
        run.rollouts.append((path.name, text[:_SAMPLE_CHARACTERS] + (cut if len(text) > _SAMPLE_CHARACTERS else "")))
    path = run.path / "bad_samples.jsonl"
    if path.is_file():
        found, damaged = _records(path)
        run.bad_samples = found[:_BAD_SAMPLES]
        for record in found:
            cause = str(record.get("cause"))
            run.bad_causes[cause] = run.bad_causes.get(cause, 0) + 1
        if damaged:
            run.notes.append(f"bad_samples.jsonl has {damaged} damaged lines")
