"""Top-k against a full stable sort in fp64: whole numbers, so that every dot product is exact and ties are many."""

import os

import numpy as np
import pytest
import torch

from umer1.evaluation import topk
from umer1.evaluation.topk import top_k

FRESH = int.from_bytes(os.urandom(4), "little")


def plain(queries, candidates, k):
    scores = queries.astype(np.float64) @ candidates.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize("sum_in", [torch.float32, torch.float64])
def test_equals_a_full_stable_sort(monkeypatch, sum_in):
    monkeypatch.setattr(topk, "_BLOCK", 64)  # many blocks of few candidates
    for case in range(120):
        rng = np.random.default_rng([FRESH, case])
        num_queries, num_candidates, dim = rng.integers(1, 20), rng.integers(1, 700), rng.integers(1, 5)
        k = int(rng.integers(1, num_candidates + 3) if case % 3 == 0 else rng.integers(1, 12))
        queries = rng.integers(-2, 3, (num_queries, dim)).astype(np.float32)
        candidates = rng.integers(-2, 3, (num_candidates, dim)).astype(np.float32)
        if case % 5 == 0:  # later candidates score higher: all of them enter
            candidates = np.sort(candidates, axis=0)
            queries = np.abs(queries)
        progress = []
        budget = int(rng.integers(1, 10**6))
        scores, indices = top_k(queries, candidates, k, sum_in=sum_in, budget=budget, progress=progress.append)
        want_scores, want = plain(queries, candidates, k)
        about = f"seed {FRESH}, case {case}: {num_queries} x {num_candidates} x {dim}, k {k}"
        np.testing.assert_array_equal(indices, want, err_msg=about)
        np.testing.assert_array_equal(scores, want_scores, err_msg=about)
        assert scores.dtype == np.float32 and indices.dtype == np.int64 and sum(progress) == num_candidates, about


def test_candidates_in_a_file_and_real_vectors(tmp_path):
    rng = np.random.default_rng(FRESH)
    rows = rng.normal(size=(20_000, 32)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    queries = rng.normal(size=(7, 32)).astype(np.float32)
    scores, indices = top_k(queries, np.load(tmp_path / "rows.npy", mmap_mode="r"), 20, sum_in=torch.float64)
    want_scores, want = plain(queries, rows, 20)
    np.testing.assert_array_equal(indices, want, err_msg=f"seed {FRESH}")
    np.testing.assert_array_equal(scores, want_scores.astype(np.float32), err_msg=f"seed {FRESH}")


def test_arrays_as_they_come_and_stay():
    rng = np.random.default_rng(FRESH)
    rows = rng.integers(-2, 3, (90, 6)).astype(np.float32)
    locked = rows.copy()
    locked.flags.writeable = False
    for form in (rows, rows[::-1], rows[:, ::-1], rows[::2], np.asfortranarray(rows), rows.astype(np.float16), locked):
        before = form.copy()
        scores, indices = top_k(form[:5], form, 4)
        want_scores, want = plain(before[:5], before, 4)
        np.testing.assert_array_equal(indices, want, err_msg=f"seed {FRESH}")
        np.testing.assert_array_equal(scores, want_scores, err_msg=f"seed {FRESH}")
        np.testing.assert_array_equal(form, before)


def test_the_same_vector_scores_the_same_wherever_it_stands():
    rng = np.random.default_rng(FRESH)
    rows = rng.normal(size=(300, 48)).astype(np.float32)
    rows[[3, 77, 151, 299]] = rows[200]
    queries = rows[200:201] + 0.01 * rng.normal(size=(5, 48)).astype(np.float32)
    _, indices = top_k(queries, rows, 5, sum_in=torch.float64)
    assert (indices == [3, 77, 151, 200, 299]).all(), f"seed {FRESH}"


def test_float32_stays_float32_whatever_the_process_has_chosen():
    torch.set_float32_matmul_precision("medium")
    try:
        top_k(np.ones((1, 2), np.float32), np.ones((3, 2), np.float32), 1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_edges():
    ones = np.ones((3, 2), np.float32)
    assert top_k(ones[:0], ones, 2)[1].shape == (0, 2)
    assert top_k(ones, ones[:0], 2)[1].shape == (3, 0)
    with pytest.raises(ValueError, match="k=0"):
        top_k(ones, ones, 0)
    with pytest.raises(ValueError, match=r"\(3, 2\) and candidates \(3, 1\)"):
        top_k(ones, ones[:, :1], 1)
    bad = ones.copy()
    bad[1, 0] = np.nan
    with pytest.raises(ValueError, match=r"candidates: rows \[1\] are not finite"):
        top_k(ones, bad, 1)
    with pytest.raises(ValueError, match=r"queries: rows \[1\]"):
        top_k(bad, ones, 1)
    with pytest.raises(ValueError, match="too long for float32"):
        top_k(ones * 1e20, ones * 1e19, 1)
