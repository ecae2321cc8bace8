"""perf/topk_million.py: every method finds the same scores, and what it took is there."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "perf"))
import topk_million


def test_methods_agree_and_are_measured(tmp_path):
    topk_million.write_vectors(tmp_path / "candidates.npy", 3000, 24, seed=0)
    topk_million.write_vectors(tmp_path / "queries.npy", 300, 24, seed=1)
    queries, candidates = (np.load(tmp_path / f"{name}.npy") for name in ("queries", "candidates"))
    np.testing.assert_allclose(np.linalg.norm(candidates, axis=1), 1.0, rtol=1e-5)
    expected = -np.sort(-(queries.astype(np.float64) @ candidates.astype(np.float64).T), axis=1)[:, : topk_million.K]
    for method in ("umer1", "numpy"):
        found = topk_million.measure(tmp_path, method)
        assert found["method"] == method and found["seconds"] > 0 and found["peak_mib"] >= 0
        np.testing.assert_allclose(np.load(tmp_path / f"{method}.npy"), expected, rtol=0, atol=1e-6)
