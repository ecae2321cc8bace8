"""Ranking x margin rewards in fp64 numpy, row by row and by sorting, and random cases to compare with."""

from dataclasses import dataclass

import numpy as np
import torch

KINDS = ("random", "integers", "copies")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison set; the embeddings in fp64 are those of the tensors, to the last bit."""

    seed: int
    kind: str
    size: int
    query: torch.Tensor
    target: torch.Tensor
    options: dict[str, torch.Tensor]  # query_valid, target_valid, target_ids where given

    def __str__(self) -> str:
        rows, dimension = self.query.shape
        given = ", ".join(self.options) or "no options"
        return f"seed {self.seed}: {self.kind} {rows} x {dimension}, G = {self.size}, {self.query.dtype}, {given}"

    def swapped(self) -> "Case":
        """The same with the roles of the sides exchanged."""
        names = {"query_valid": "target_valid", "target_valid": "query_valid", "target_ids": "target_ids"}
        options = {names[name]: value for name, value in self.options.items()}
        return Case(
            seed=self.seed, kind=self.kind, size=self.size, query=self.target, target=self.query, options=options
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """query, target and the options, filled in, as numpy has them."""
        rows = len(self.query)
        everything = {
            "query_valid": torch.ones(rows, dtype=torch.bool),
            "target_valid": torch.ones(rows, dtype=torch.bool),
            "target_ids": torch.arange(rows // self.size),
        } | self.options
        everything |= {"query": self.query.double(), "target": self.target.double()}
        return {name: value.numpy() for name, value in everything.items()}


def draw_case(seed: int, most_rows: int, most_dimensions: int, dtypes=DTYPES) -> Case:
    """A random case: any number of pairs and rollouts, ties within and between pairs, flags and ids or none."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, most_rows + 1))
    size = int(rng.choice([divisor for divisor in range(1, rows + 1) if rows % divisor == 0]))
    dimension, kind = int(rng.integers(1, most_dimensions + 1)), str(rng.choice(KINDS))
    values = rng.standard_normal((2, rows, dimension))
    if kind == "integers":  # similarities are small whole numbers: exact in every dtype, ties everywhere
        values = rng.integers(-1, 2, (2, rows, dimension)).astype(float)
    if kind == "copies":  # a few vectors again and again, as equal responses have equal embeddings
        values = values[:, rng.integers(0, max(1, rows // 3), rows)]
    if kind != "integers":
        values = values / np.linalg.norm(values, axis=-1, keepdims=True)
    options = {}
    if rng.random() < 0.5:
        share = rng.choice([0.2, 0.7, 0.95])
        options["query_valid"], options["target_valid"] = (torch.from_numpy(rng.random(rows) < share) for _ in "qt")
    if rng.random() < 0.4:
        options["target_ids"] = torch.from_numpy(rng.integers(0, max(1, rows // size // 2), rows // size))
    query, target = torch.from_numpy(values).to(dtypes[int(rng.integers(len(dtypes)))])
    return Case(seed=seed, kind=kind, size=size, query=query, target=target, options=options)


def _rows(case: Case, rows):
    """(row, similarities to all targets, own candidates' indices, other candidates' indices) of scored rows."""
    part = case.arrays()
    pair = np.arange(len(part["query"])) // case.size
    for row in rows:
        same = pair == pair[row]
        other = part["target_ids"][pair] != part["target_ids"][pair[row]]
        own, other = (np.flatnonzero(mask & part["target_valid"]) for mask in (same, other))
        if part["query_valid"][row] and len(own):
            with np.errstate(all="ignore"):  # adds up along rows, in the same order for each of them
                similarity = (part["query"][row] * part["target"]).sum(-1)
            yield row, similarity, own, other


def _margin(similarity, own, other) -> float:
    with np.errstate(all="ignore"):
        return similarity[own].mean() - (similarity[other].mean() if len(other) else 0.0)


def by_sorting(case: Case, rows=None) -> np.ndarray:
    """(reward, ranking, margin) fp64 [3, rows]: the definition; of some rows only where they are given."""
    rows = range(len(case.query)) if rows is None else rows
    results = np.zeros((3, len(case.query)))
    for row, similarity, own, other in _rows(case, rows):
        margin = _margin(similarity, own, other)
        candidates = np.concatenate([own, other])
        top = candidates[np.lexsort((candidates, -similarity[candidates]))][: len(own)]
        ranking = len(np.intersect1d(top, own)) / len(own) if np.isfinite(margin) else np.nan
        results[:, row] = ranking * margin, ranking, margin
    return results[:, list(rows)]


def with_tolerance(case: Case, tolerance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lowest ranking, highest ranking, margin), fp64 [rows] each, where similarities have an error below tolerance.

    Equal targets tie all the same, and so do whole numbers.
    """
    count = len(case.query)
    low, high, margins = np.zeros((3, count))
    _, label = np.unique(case.target.double().numpy(), axis=0, return_inverse=True)
    label = label.reshape(-1)
    for row, similarity, own, other in _rows(case, range(count)):
        candidates = np.concatenate([own, other])
        gap = similarity[candidates][None, :] - similarity[own][:, None]
        tied = label[candidates][None, :] == label[own][:, None]
        if case.kind == "integers":
            tied |= gap == 0
        sure = ((gap > tolerance) & ~tied) | (tied & (candidates[None, :] < own[:, None]))
        perhaps = (np.abs(gap) <= tolerance) & ~tied
        low[row] = ((sure | perhaps).sum(1) < len(own)).mean()
        high[row] = (sure.sum(1) < len(own)).mean()
        margins[row] = _margin(similarity, own, other)
    return low, high, margins
