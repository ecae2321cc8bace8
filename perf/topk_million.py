"""The 10 best of a million candidates for 10,000 queries: umer1's blocked search, NumPy's brute force and faiss.

    .venv/bin/python perf/topk_million.py --folder /tmp/topk [--candidates 1000000 --queries 10000 --dim 1536]

Writes random unit vectors to a file (6.1 GB) and searches it in a process of its own for every method: `umer1` reads
the candidates block by block from the file, `numpy` makes the scores of 250 queries with all candidates and partitions
them (all scores at once would be 40 GB), `faiss` puts the candidates into a flat index first.  Each runs once, at its
usual number of threads.  Their scores must agree.  Writes perf/results/topk_million_cpu.json; the vectors are deleted.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from provenance import new_record, save_record

K = 10
NUMPY_ROWS = 250
TOLERANCE = 1e-5  # of cosines


def write_vectors(path: Path, count: int, dim: int, seed: int) -> None:
    """float32 [count, dim], each of length 1."""
    rng = np.random.default_rng(seed)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, dim))
    for start in range(0, count, 50_000):
        drawn = rng.standard_normal((min(50_000, count - start), dim), dtype=np.float32)
        rows[start : start + len(drawn)] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    rows.flush()


def by_umer1(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    from umer1.evaluation.topk import top_k
    from umer1.progress import Progress

    progress = Progress("ranking", len(candidates), unit="candidates")
    scores, _ = top_k(queries, candidates, K, progress=progress.add)
    progress.finish()
    return scores


def by_numpy(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    best = []
    for start in range(0, len(queries), NUMPY_ROWS):
        scores = queries[start : start + NUMPY_ROWS] @ candidates.T
        places = np.argpartition(scores, -K, axis=1)[:, -K:]
        best.append(-np.sort(-np.take_along_axis(scores, places, axis=1), axis=1))
    return np.concatenate(best)


def by_faiss(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatIP(queries.shape[1])
    index.add(candidates)
    return index.search(queries, K)[0]


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "umer1": by_umer1,
    "numpy": by_numpy,
    "faiss": by_faiss,
}


class OwnMemory(threading.Thread):
    """Looks ten times a second at the resident memory that is not a file's pages (Linux)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.peak = self.now()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.1)


def measure(folder: Path, method: str) -> dict:
    """Seconds by the clock and of all cores, and the most memory above that of the imports and the queries."""
    queries = np.load(folder / "queries.npy")
    candidates = np.load(folder / "candidates.npy", mmap_mode="r")
    METHODS[method](queries[:1], np.ascontiguousarray(candidates[:64]))  # imports, threads
    memory = OwnMemory()
    memory.start()
    start, start_cpu = time.perf_counter(), time.process_time()
    scores = METHODS[method](queries, candidates)
    found = {"method": method, "seconds": time.perf_counter() - start, "cpu_s": time.process_time() - start_cpu}
    np.save(folder / f"{method}.npy", scores)
    return found | {"peak_mib": (memory.peak - memory.before) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the vectors are written")
    parser.add_argument("--candidates", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder, options.measure)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    found = []
    try:
        write_vectors(options.folder / "candidates.npy", options.candidates, options.dim, seed=0)
        write_vectors(options.folder / "queries.npy", options.queries, options.dim, seed=1)
        for method in METHODS:
            if method == "faiss" and importlib.util.find_spec("faiss") is None:
                found.append({"method": method, "not_measured": "not installed"})
                continue
            command = [sys.executable, __file__, "--folder", str(options.folder), "--measure", method]
            found.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
            others = np.load(options.folder / f"{method}.npy")
            found[-1]["largest_difference"] = float(np.abs(others - np.load(options.folder / "umer1.npy")).max())
            print(json.dumps(found[-1]), flush=True)
            if not found[-1]["largest_difference"] <= TOLERANCE:
                sys.exit(f"{method} finds other scores than umer1, by up to {found[-1]['largest_difference']:.1e}")
    finally:
        for name in ("candidates", "queries", *METHODS):
            (options.folder / f"{name}.npy").unlink(missing_ok=True)
    sizes = {"candidates": options.candidates, "queries": options.queries, "dim": options.dim, "k": K}
    save_record({**new_record("topk_million"), **sizes, "measured": found})


if __name__ == "__main__":
    main()
