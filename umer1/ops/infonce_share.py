"""One rank's share of the symmetric InfoNCE loss, from what sweeps over blocks of columns leave.

A block of columns may be this process's own keys, a part of the gathered ones or what a ring brings; the arithmetic
that turns maxima and sums into losses and gradients is here, once (formula: umer1/ops/infonce_torch.py).
"""

from dataclasses import dataclass
from types import ModuleType

import torch

from umer1.ops.infonce_torch import Entries, Kept, Partials, merge

KEPT_BYTES = 32 * 2**20
"""Logits that stay between the two sweeps where they are no more than this, up to some 2,900 pairs: three products
instead of four.  A part of them would save a part of one product, and memory is what a large batch lacks."""


@dataclass(kw_only=True, slots=True)
class Problem:
    """A rank's rows and columns, checked by the door."""

    query: torch.Tensor  # [B, D]
    key: torch.Tensor  # [N, D]
    negatives: torch.Tensor  # [M, D], M may be 0
    labels: torch.Tensor | None  # int64 [B], row of key; None: B = N and row i's is i
    temperature: float | torch.Tensor
    query_ids: torch.Tensor | None  # int64 [B]
    key_ids: torch.Tensor | None  # int64 [N]
    negative_ids: torch.Tensor | None  # int64 [M]
    blocks: ModuleType  # an implementation of the block interface: its `sweep` and `gradients` are called
    weight: float  # multiplies the gradients
    with_gradients: bool
    with_statistics: bool

    def own_labels(self) -> torch.Tensor:
        """int64 [B]: each row's positive, a row of key."""
        if self.labels is None:
            return torch.arange(len(self.query), device=self.query.device)
        return self.labels

    def label_counts(self) -> torch.Tensor | None:
        """[N], how many of the rows have this key as their positive, in the dtype of sums; None: 1 each."""
        if self.labels is None:
            return None
        return torch.bincount(self.labels, minlength=len(self.key)).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of sums and gradients: fp64 for fp64 inputs, else fp32."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def entries(self, columns, labels, column_ids) -> Entries:
        """This rank's rows against a block of columns."""
        return Entries(self.query, columns, labels, self.temperature, self.query_ids, column_ids)

    def sweep(self, columns, labels, column_ids, *, symmetric: bool, kept: Kept | None) -> Partials:
        """The implementation's sums over this rank's rows against a block of columns."""
        entries = self.entries(columns, labels, column_ids)
        return self.blocks.sweep(entries, symmetric=symmetric, statistics=self.with_statistics, kept=kept)


@dataclass(slots=True)
class Share:
    """Sums over this rank's rows; gradients are complete for this rank's tensors, whatever rank used them."""

    loss: torch.Tensor  # 0-dim: sum over the rows of both directions' -log softmax
    statistics: torch.Tensor | None  # fp32 [4]: sum of positive similarities, hits, sum and count of the negatives'
    query: torch.Tensor | None = None  # fp32 (fp64) [B, D]: weight * d sum of the ranks' losses / d query
    key: torch.Tensor | None = None  # [N, D]
    negatives: torch.Tensor | None = None  # [M, D]
    log_scale: torch.Tensor | None = None  # 0-dim: weight * d loss / d log(1 / temperature), this rank's rows alone


class Rows:
    """Partials of this rank's rows, block after block."""

    def __init__(self):
        self.partials: Partials | None = None

    def add(self, block: Partials) -> None:
        """Merge the sums over further columns; what was found by columns is the caller's."""
        mine = self.partials
        if mine is None:
            self.partials = block._replace(column_max=None, column_sum=None)
            return
        row_max, row_sum = merge(mine.row_max, mine.row_sum, block.row_max, block.row_sum)
        with_statistics = mine.negative_sum is not None
        self.partials = Partials(
            row_max,
            row_sum,
            None,
            None,
            mine.positive + block.positive,
            torch.maximum(mine.row_best_other, block.row_best_other),
            mine.negative_sum + block.negative_sum if with_statistics else None,
            mine.negative_count + block.negative_count if with_statistics else None,
        )


@dataclass(slots=True)
class Terms:
    """What the second sweep needs of the rows."""

    loss: torch.Tensor  # 0-dim
    row_lse: torch.Tensor  # [B]
    positive_gradient: torch.Tensor  # [B]


def row_terms(rows: Partials, column_max: torch.Tensor, column_sum: torch.Tensor, counts: torch.Tensor | None) -> Terms:
    """The losses of the rows; column_max, column_sum, counts: [B], those of each row's positive column over all ranks.

    Maximum and logarithm are subtracted one after the other: their sum, some 50 at temperature 0.02, would round a
    small loss away, and exp(..) - 1 at the positive with it.
    """
    by_row = (rows.positive - rows.row_max) - rows.row_sum.log()
    by_column = (rows.positive - column_max) - column_sum.log()
    gradient = torch.expm1(by_column)
    if counts is not None:  # count * P - 1: where several rows share a positive, each P is near 1 / count instead of 1
        gradient = torch.where(counts > 1, counts * by_column.exp() - 1, gradient)
    gradient += torch.expm1(by_row)
    return Terms(-(by_row.sum() + by_column.sum()), rows.row_max + rows.row_sum.log(), gradient)


def column_lse(column_max: torch.Tensor, column_sum: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """`column_lse` of the block interface: log-sum-exp less log(count), +inf where nobody's positive is."""
    lse = column_max + column_sum.log()
    return lse if counts is None else torch.where(counts > 0, lse - counts.log(), torch.inf)


def statistics(problem: Problem, rows: Partials) -> torch.Tensor | None:
    """fp32 [4], see Share.  A tie with the best other is no hit."""
    if not problem.with_statistics:
        return None
    positive, others = rows.positive.sum() * problem.temperature, rows.negative_sum.sum() * problem.temperature
    hits = (rows.positive > rows.row_best_other).sum()
    return torch.stack([positive.float(), hits.float(), others.float(), rows.negative_count.sum().float()])


def log_scale_gradient(problem: Problem, grad_query: torch.Tensor) -> torch.Tensor | None:
    """sum_i <q_i, d loss / d q_i>, since q enters as q / temperature; None for a temperature that needs none."""
    if not isinstance(problem.temperature, torch.Tensor):
        return None
    return torch.linalg.vecdot(problem.query.to(problem.dtype), grad_query).sum()


def local_share(problem: Problem) -> Share:
    """The share of a process that holds every row and column."""
    labels, rows = problem.own_labels(), Rows()
    entries = len(problem.query) * (len(problem.key) + len(problem.negatives))
    all_fit = entries * problem.dtype.itemsize <= KEPT_BYTES
    kept = Kept(KEPT_BYTES) if problem.with_gradients and all_fit else None
    symmetric = problem.sweep(problem.key, labels, problem.key_ids, symmetric=True, kept=kept)
    rows.add(symmetric)
    kept_negatives = Kept(kept.budget) if kept else None
    if len(problem.negatives):
        args = (problem.negatives, None, problem.negative_ids)
        rows.add(problem.sweep(*args, symmetric=False, kept=kept_negatives))
    maximum, total, counts = symmetric.column_max, symmetric.column_sum, problem.label_counts()
    if counts is None:
        terms = row_terms(rows.partials, maximum, total, None)
    else:
        terms = row_terms(rows.partials, maximum[labels], total[labels], counts[labels])
    share = Share(terms.loss, statistics(problem, rows.partials))
    if problem.with_gradients:
        share.query, share.key, share.negatives = (
            torch.zeros(part.shape, dtype=problem.dtype, device=part.device)
            for part in (problem.query, problem.key, problem.negatives)
        )
        lse = column_lse(maximum, total, counts)
        add_gradients(problem, terms, problem.key, labels, problem.key_ids, lse, share.query, share.key, kept)
        if len(problem.negatives):
            ids, into = problem.negative_ids, (share.query, share.negatives)
            add_gradients(problem, terms, problem.negatives, None, ids, None, *into, kept_negatives)
        share.log_scale = log_scale_gradient(problem, share.query)
    return share


def add_gradients(
    problem: Problem,
    terms: Terms,
    columns: torch.Tensor,
    labels: torch.Tensor | None,
    column_ids: torch.Tensor | None,
    lse: torch.Tensor | None,
    grad_query: torch.Tensor,
    grad_columns: torch.Tensor,
    kept: Kept | None,
) -> None:
    """One block's part of the gradients, see `gradients` of the block interface."""
    problem.blocks.gradients(
        problem.entries(columns, labels, column_ids),
        row_lse=terms.row_lse,
        column_lse=lse,
        positive_gradient=None if labels is None else terms.positive_gradient,
        weight=problem.weight,
        grad_query=grad_query,
        grad_columns=grad_columns,
        kept=kept,
    )
