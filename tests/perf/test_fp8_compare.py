"""The numbers of perf/fp8_compare.py's comparison, on values given by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PERF = Path(__file__).parents[2] / "perf"


def test_comparison(monkeypatch):
    monkeypatch.syspath_prepend(str(PERF))
    spec = importlib.util.spec_from_file_location("fp8_compare", PERF / "fp8_compare.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fp8_compare", module)
    spec.loader.exec_module(module)
    coarse, fine = {"losses": [1.1, 2.0], "seconds": 1.0}, {"losses": [1.0, 4.0], "seconds": 1.5}
    found = module.compare(coarse, fine, torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert found["largest_relative_difference"] == pytest.approx(0.5)
    assert found["mean_relative_difference"] == pytest.approx(0.3)
    assert found["smallest_cosine"] == pytest.approx(0.5**0.5)
    assert found["mean_cosine"] == pytest.approx((1 + 0.5**0.5) / 2)
    assert found["speed_ratio"] == 1.5
