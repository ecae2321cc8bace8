"""The k best of N candidates for Q queries, by dot product.

    pytest perf/bench_topk.py [--sizes cpu|gpu] [--benchmark-json FILE]

Vectors are random and L2-normalised; candidates of a million are in a file.  Work is counted as the matrix product.
NumPy makes all scores first, and is left out where they take more than 8 GiB.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import Cost, Provider, Results
from suite import Case, Suite

_ALL_SCORES = 8 << 30
_IN_MEMORY = 100_000  # candidates


@dataclass
class Inputs:
    queries: np.ndarray  # [Q, D]
    candidates: np.ndarray  # [N, D], a memory map where they are many
    k: int
    place: torch.device
    folder: tempfile.TemporaryDirectory  # of the map


def make_inputs(case: Case, place: torch.device) -> Inputs:
    num_queries, num_candidates, dim, k = (case.shape[name] for name in ("Q", "N", "D", "k"))
    folder = tempfile.TemporaryDirectory()
    rng = np.random.default_rng(0)

    def unit(count: int) -> np.ndarray:
        rows = rng.standard_normal((count, dim), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    if num_candidates <= _IN_MEMORY:
        return Inputs(unit(num_queries), unit(num_candidates), k, place, folder)
    path = Path(folder.name) / "candidates.npy"
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num_candidates, dim))
    for start in range(0, num_candidates, _IN_MEMORY):
        rows[start : start + _IN_MEMORY] = unit(min(_IN_MEMORY, num_candidates - start))
    rows.flush()
    return Inputs(unit(num_queries), np.load(path, mmap_mode="r"), k, place, folder)


def results(scores: np.ndarray) -> Results:
    return {"scores": torch.from_numpy(np.ascontiguousarray(scores))}


def full_sort(inputs: Inputs) -> Callable[[], Results]:
    def call() -> Results:
        scores = inputs.queries @ inputs.candidates.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, : inputs.k]
        return results(np.take_along_axis(scores, order, axis=1))

    return call


def partition(inputs: Inputs) -> Callable[[], Results]:
    def call() -> Results:
        scores = inputs.queries @ inputs.candidates.T
        order = np.argpartition(-scores, inputs.k, axis=1)[:, : inputs.k]
        return results(-np.sort(-np.take_along_axis(scores, order, axis=1), axis=1))

    return call


def torch_topk(inputs: Inputs) -> Callable[[], Results]:
    queries, candidates = (torch.from_numpy(rows).to(inputs.place) for rows in (inputs.queries, inputs.candidates))
    return lambda: {"scores": (queries @ candidates.T).topk(inputs.k, dim=1).values}


def faiss_flat(inputs: Inputs) -> Callable[[], Results]:
    import faiss

    index = faiss.IndexFlatIP(inputs.queries.shape[1])
    index.add(np.ascontiguousarray(inputs.candidates))
    return lambda: results(index.search(inputs.queries, inputs.k)[0])


def umer1(inputs: Inputs) -> Callable[[], Results]:
    from umer1.evaluation.topk import top_k

    return lambda: results(top_k(inputs.queries, inputs.candidates, inputs.k, device=inputs.place)[0])


def scores_fit(inputs: Inputs) -> str | None:
    return "the scores alone take more than 8 GiB" if 4 * _num_scores(inputs) > _ALL_SCORES else None


def _num_scores(inputs: Inputs) -> int:
    return len(inputs.queries) * len(inputs.candidates)


def reference(inputs: Inputs) -> Results:
    scores = inputs.queries.astype(np.float64) @ inputs.candidates.astype(np.float64).T
    order = np.argpartition(-scores, inputs.k, axis=1)[:, : inputs.k]
    return results(-np.sort(-np.take_along_axis(scores, order, axis=1), axis=1))


def cost(case: Case) -> Cost:
    num_queries, num_candidates, dim, k = (case.shape[name] for name in ("Q", "N", "D", "k"))
    moved = 4.0 * dim * (num_queries + num_candidates) + 12.0 * num_queries * k
    return Cost(flops=2.0 * num_queries * num_candidates * dim, bytes=moved, dtype=torch.float32)


def sized(queries: int, candidates: int, dim: int, k: int, *, reference: bool = True, least_rounds: int = 3) -> Case:
    shape = {"Q": queries, "N": candidates, "D": dim, "k": k}
    return Case(shape=shape, dtype=torch.float32, mode="search", reference=reference, least_rounds=least_rounds)


SUITE = Suite(
    name="topk",
    cases={
        "tiny": [sized(5, 300, 16, 7)],
        "cpu": [sized(1000, 50_000, 1536, 10), sized(1000, 50_000, 1536, 100)],
        "gpu": [
            sized(1000, 50_000, 1536, 10),
            sized(1000, 50_000, 1536, 100),
            sized(10_000, 1_000_000, 1536, 10, reference=False, least_rounds=1),
        ],
    },
    providers=[
        Provider(name="numpy, argpartition", make=partition, fits=scores_fit),
        Provider(name="numpy, argsort", make=full_sort, fits=scores_fit),
        Provider(name="torch topk", make=torch_topk, fits=scores_fit),
        Provider(name="faiss IndexFlatIP, CPU", make=faiss_flat, package="faiss"),
        Provider(name="umer1", make=umer1, ours=True),
    ],
    inputs=make_inputs,
    reference=reference,
    cost=cost,
)


def test_topk(case, provider, bench, benchmark):
    bench(case, provider, benchmark)
