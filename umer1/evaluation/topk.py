"""The k best candidates of every query, exactly, in bounded memory: a million candidates may stay in a file.

Candidates are read once, block by block; what a query has found so far is a sorted list of k.  A later candidate enters
only with a higher score than the k-th, since of equal scores the earlier candidate comes first, so after the first
blocks almost nothing has to be sorted: most blocks cost their matrix product and one reading of it.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

GROUP = 32  # scores of a row that are looked at by their maximum first
# Candidates of a block at least.  On two CPU cores the product is as fast as it gets from 1,024 on; a wider block means
# fewer merges, and 8,192 x 1,536 float32 are 48 MiB.
_BLOCK = 8192
# Bytes that a score of a block may take at its worst, where every score of it enters: itself (twice where it is summed
# in float64), its copy, place and row, and the sorted list with the sort's own copy.
_BYTES_PER_SCORE = 64
BUDGET = 1 << 30

Progress = Callable[[int], None]


def top_k(
    queries: np.ndarray,
    candidates: np.ndarray,
    k: int,
    *,
    device: torch.device | str | None = None,
    sum_in: torch.dtype = torch.float32,
    budget: int = BUDGET,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(scores float32 [Q, k], indices int64 [Q, k]) of the k highest dot products of each query, best first.

    The order is that of a stable descending sort of all N scores: equal ones in candidate order.  k above N means N.

    `queries` [Q, D] and `candidates` [N, D] are arrays or memory maps of floating point; rows are taken as they stand.
    Products are those of float32 rows, summed in `sum_in` (never in TF32): float32, or float64 and then rounded to
    float32, which costs twice the time and makes candidates with the same vector score the same wherever they stand.
    `budget` bounds the bytes of blocks (on `device`, the CPU by default), beside inputs and results.  `progress` is
    called with the number of candidates that are done since the last call.

    ValueError where shapes do not fit, k is below 1, or a number (or one of the best scores) is not finite.
    """
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"queries {queries.shape} and candidates {candidates.shape} must be [Q, D] and [N, D]")
    if k < 1:
        raise ValueError(f"k={k} must be 1 or above")
    place = torch.device("cpu" if device is None else device)
    k = min(k, len(candidates))
    best = torch.full((len(queries), k), -torch.inf, device=place)
    found = torch.full((len(queries), k), -1, dtype=torch.int64, device=place)
    sides = _Side(queries, "queries", place, sum_in), _Side(candidates, "candidates", place, sum_in)
    search = _sort_rows if 4 * k >= len(candidates) else _merge_blocks
    with torch.inference_mode(), _exact_float32():
        search(*sides, best, found, budget, progress or (lambda count: None))
    if not torch.isfinite(best).all() or (found < 0).any():
        raise ValueError("some of the best scores are not finite: the vectors are too long for float32")
    return best.cpu().numpy(), found.cpu().numpy()


@dataclass(frozen=True, slots=True)
class _Side:
    """Queries or candidates, read in blocks."""

    array: np.ndarray  # [N, D]
    name: str
    place: torch.device
    dtype: torch.dtype

    def slices(self, size: int) -> list[slice]:
        return [slice(start, min(start + size, len(self.array))) for start in range(0, len(self.array), size)]

    def row_bytes(self) -> int:
        return self.array.shape[1] * (8 + self.dtype.itemsize)  # float32 as read and on the device, and as multiplied

    def read(self, part: slice, height: int = 0) -> torch.Tensor:
        """The rows of `part`, rounded to float32, then zeros up to `height` rows; of `dtype`."""
        # What is float32 in memory is taken as it stands; torch takes no array that must not be written to (a map's).
        rows = np.require(self.array[part], dtype=np.float32, requirements=["C", "W"])
        block = torch.from_numpy(rows).to(self.place)
        finite = torch.isfinite(block.sum(dim=1))
        if not finite.all():
            bad = (part.start + torch.nonzero(~finite)[:8, 0]).tolist()
            raise ValueError(f"{self.name}: rows {bad} are not finite")
        if height > len(block):
            block = torch.nn.functional.pad(block, (0, 0, 0, height - len(block)))
        return block.to(self.dtype)


def _merge_blocks(
    queries: _Side, candidates: _Side, best: torch.Tensor, found: torch.Tensor, budget: int, progress: Progress
) -> None:
    """Fill `best` and `found` [Q, k], every candidate read once."""
    num_candidates, k = len(candidates.array), best.shape[1]
    columns = min(num_candidates, max(_BLOCK, 4 * k))
    columns = -(-columns // GROUP) * GROUP
    rows = budget - columns * candidates.row_bytes()
    rows = max(1, rows // (columns * _BYTES_PER_SCORE + queries.row_bytes()))
    parts = queries.slices(rows)
    # queries are read once where they take little of the budget, else once for every block of candidates
    small = len(queries.array) * queries.row_bytes() <= budget // 4
    kept = [queries.read(part) for part in parts] if small else None
    # One place for all products: memory that is fresh for each would be mapped and zeroed by the system first.
    products = torch.empty(parts[0].stop * columns, dtype=queries.dtype, device=queries.place)
    for taken in candidates.slices(columns):
        block = candidates.read(taken, height=columns)
        count = taken.stop - taken.start
        for index, part in enumerate(parts):
            own = kept[index] if kept is not None else queries.read(part)
            scores = _product(own, block, products[: len(own) * columns].view(len(own), columns)).float()
            scores[:, count:] = -torch.inf  # the padding
            best[part], found[part] = _merge(best[part], found[part], scores, taken.start)
        progress(count)


def _sort_rows(
    queries: _Side, candidates: _Side, best: torch.Tensor, found: torch.Tensor, budget: int, progress: Progress
) -> None:
    """Fill `best` and `found` [Q, k] where k is a large part of N: all scores of some queries at once, sorted."""
    num_queries, num_candidates = len(queries.array), len(candidates.array)
    rows = budget - _BLOCK * candidates.row_bytes()
    rows = max(1, rows // (num_candidates * _BYTES_PER_SCORE + queries.row_bytes()))
    for part in queries.slices(rows):
        own = queries.read(part)
        scores = torch.empty(len(own), num_candidates, device=own.device)
        for taken in candidates.slices(_BLOCK):
            block = candidates.read(taken)
            scores[:, taken] = _product(own, block, own.new_empty(len(own), len(block)))
        ordered = torch.sort(scores, dim=1, descending=True, stable=True)
        best[part], found[part] = (kind[:, : best.shape[1]] for kind in (ordered.values, ordered.indices))
        progress(num_candidates * part.stop // num_queries - num_candidates * part.start // num_queries)


def _product(queries: torch.Tensor, block: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """queries [q, D] times block [c, D]: `out` [q, c], filled."""
    if out.device.type != "cpu":
        return torch.mm(queries, block.T, out=out)
    # By NumPy's OpenBLAS: on an AMD EPYC it makes 0.19 TFLOP/s of two cores where torch's MKL makes 0.13.
    with np.errstate(over="ignore", invalid="ignore"):  # `top_k` refuses what is not finite
        np.matmul(queries.numpy(), block.numpy().T, out=out.numpy())
    return out


def _merge(
    best: torch.Tensor, found: torch.Tensor, scores: torch.Tensor, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lists best, found [q, k] after the candidates start, start + 1, ... with `scores` [q, c]."""
    num_queries, k = best.shape
    groups = scores.view(num_queries, -1, GROUP)
    maxima = groups.amax(dim=2)
    entering = maxima > best[:, -1:]
    least = None
    if maxima.shape[1] > k and entering.sum() > 2 * k * num_queries:
        # k groups reach the k-th highest maximum, so what is below it cannot be among the k best
        least = maxima.topk(k, dim=1).values[:, -1:]
        entering &= maxima >= least
    rows, places = entering.nonzero(as_tuple=True)
    near = groups[rows, places]
    inside = near > best[rows, -1:]
    if least is not None:
        inside &= near >= least[rows]
    which, offset = inside.nonzero(as_tuple=True)  # by row, and within a row by candidate
    rows, places = rows[which], places[which] * GROUP + offset + start
    counts = torch.bincount(rows, minlength=num_queries)
    width = int(counts.max())
    if width == 0:
        return best, found
    column = k + torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    values = torch.cat([best, best.new_full((num_queries, width), -torch.inf)], dim=1)
    indices = torch.cat([found, found.new_full((num_queries, width), -1)], dim=1)
    values[rows, column] = near[which, offset]
    indices[rows, column] = places
    # what was there comes first: a stable sort keeps equal scores in candidate order
    ordered = torch.sort(values, dim=1, descending=True, stable=True)
    kept = ordered.indices[:, :k]
    return ordered.values[:, :k], indices.gather(1, kept)


@contextmanager
def _exact_float32():
    """Matrix products of float32 in float32, whatever the process has chosen for its training."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
