"""The harness: what it measures is there, what cannot be measured is said, records are whole."""

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))
import provenance
from harness import Cost, Provider, errors, measured, peak_bytes, quantiles, relative_error, wall_seconds, worst

from umer1.errors import UserError

CEILINGS = {"copy_bytes_per_second": 1e9, "matmul_float32_flops": 1e12, "launch_seconds": 1e-6}
COST = Cost(flops=2e9, bytes=4e6, dtype=torch.float32)


def run(provider: Provider, reference=None) -> dict:
    inputs = torch.ones(8)
    return measured(provider, inputs, reference, COST, CEILINGS, lambda call, once: wall_seconds(call, 3))


def failing(error: Exception) -> Provider:
    def make(inputs):
        raise error

    return Provider(name="failing", make=make)


def test_floor_is_the_largest_of_its_parts():
    assert COST.floor_seconds(CEILINGS) == pytest.approx(4e-3)  # bytes
    assert COST.floor_seconds(CEILINGS | {"copy_bytes_per_second": 1e12}) == pytest.approx(2e-3)  # arithmetic
    assert Cost(flops=0.0, bytes=1.0, dtype=torch.bfloat16).floor_seconds(CEILINGS) == 1e-6  # one launch


def test_quantiles():
    found = quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 100.0])
    assert found == {"median": 3.5, "best": 1.0, "low": 2.0, "high": 5.0, "rounds": 6}


def test_errors_are_relative_and_nan_is_the_worst():
    want = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    found = errors({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0, 2.0])}, want)
    assert found == {"a": pytest.approx(0.1), "b": pytest.approx(2.0)}
    assert worst(found) == pytest.approx(2.0)
    assert math.isnan(worst(errors({"a": torch.tensor([3.0, math.nan]), "b": torch.zeros(2)}, want)))
    with pytest.raises(ValueError, match="shape"):
        relative_error(torch.zeros(3), torch.zeros(2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the high-water mark of a process is measured without a GPU")
def test_peak_memory_sees_what_a_call_frees_again():
    size = 64 << 20

    def call():
        held = torch.ones(size, dtype=torch.uint8)
        return held[:1].clone()

    call()
    found = peak_bytes(call)
    assert 0.9 * size < found < 1.5 * size
    assert peak_bytes(lambda: None) < 0.2 * size  # the mark starts anew


def test_a_row_has_everything():
    row = run(Provider(name="twice", make=lambda inputs: lambda: {"out": 2 * inputs}), {"out": torch.full((8,), 2.0)})
    assert row["error"] == 0.0 and row["floor_seconds"] == pytest.approx(4e-3)
    assert row["seconds"]["median"] > 0 and row["wall_seconds"]["rounds"] == 3


def test_what_cannot_be_measured_is_said():
    def fine(inputs):
        return lambda: {"out": inputs}

    absent = Provider(name="absent", make=fine, package="a_package_that_is_not_there")
    assert run(absent)["not_measured"] == "not installed"
    unfit = Provider(name="unfit", make=fine, fits=lambda inputs: f"{len(inputs)} rows are too many")
    assert run(unfit)["not_measured"] == "8 rows are too many"
    assert run(failing(UserError("needs CUDA")))["not_measured"] == "needs CUDA"
    assert run(failing(torch.OutOfMemoryError("of the device")))["not_measured"] == "out of memory"
    assert run(failing(RuntimeError("first\nsecond")))["not_measured"] == "fails: RuntimeError: first"


def test_a_failure_of_our_own_is_no_line_of_the_record():
    def make(inputs):
        raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        run(Provider(name="ours", make=make, ours=True))


def test_records_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(provenance.ROOT / "perf" / "x.py"), "--results", str(tmp_path)])
    record = provenance.new_record("infonce")
    path = provenance.save_record(record, tmp_path)
    assert json.loads(path.read_text()) == record
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert record["command"] == f"python perf/x.py --results {tmp_path.name}"  # no path of this machine
    assert record["versions"]["torch"] == version("torch") and len(record["commit"]) in (7, 40)
