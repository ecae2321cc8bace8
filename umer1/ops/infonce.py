"""Symmetric InfoNCE: the door.  Formula and blocks are in infonce_torch.py, ranks in infonce_distributed.py.

Source: InfoNCE, "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748, in the symmetric form
of CLIP, arXiv 2103.00020, figure 3; gathering over ranks with both directions' gradients complete.
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
import torch.distributed as dist

from umer1.errors import UserError
from umer1.ops import infonce_torch
from umer1.ops.autograd import graph_is_kept
from umer1.ops.dispatch import choose, triton_obstacle
from umer1.ops.infonce_distributed import all_rank_counts, gathered_share, ring_share, uses_ring
from umer1.ops.infonce_share import Problem, Share, local_share
from umer1.ops.infonce_small import is_small, small_share

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COLUMNS = ("auto", "gather", "ring")
Columns = Literal["auto", "gather", "ring"]


def infonce(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    labels: torch.Tensor | None = None,
    negatives: torch.Tensor | None = None,
    query_ids: torch.Tensor | None = None,
    key_ids: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
    columns: Columns = "auto",
) -> torch.Tensor:
    """Mean over the queries of both directions' cross-entropies, 0-dim fp32 (fp64 for fp64 embeddings).

        L = 1/(2B) sum_i [ -log softmax_j(s_ij over keys and negatives)_l_i  -  log softmax_h(s_h,l_i over queries)_i ]
        with s_ij = query_i . column_j / temperature and l_i = labels_i

    query: [B, D]; key: [N, D]; negatives: [M, D], more columns of the query -> key direction; fp16, bf16, fp32 or fp64,
        all the same, and taken as they are: callers normalise.
    temperature: a number above 0, or a 0-dim tensor of any floating dtype above 0 (learnt: it gets its gradient; on
        CUDA its value is not looked at).
    labels: int64 [B], the row of key that is each query's positive; None: N = B and l_i = i.  Equal labels are legal:
        such queries compete for their key.  A key that is nobody's positive is a column of query -> key alone.
        Labels out of range are refused on the CPU; on CUDA, where looking would wait, they are the caller's fault.
    query_ids: int64 [B], key_ids: int64 [N + M] (keys, then negatives), both or none: entry (i, j) of equal ids, j not
        l_i, takes part in neither direction.
    group: each rank of it passes its own rows (any number, also 0) with labels into its OWN keys; B and the softmaxes
        run over the rows of all ranks.  The value is the global loss, equal on all ranks.  The gradient of query, key
        and negatives is d L / d own rows, complete: neither sum nor scale it over ranks.  The temperature's gradient is
        this rank's share: sum it over the ranks, as every replicated parameter's.  Every rank gives the same options,
        and asks for gradients if one does.
    columns: "gather" collects all ranks' columns, "ring" passes them on, so that memory does not grow with the number
        of ranks; "auto" gathers up to `infonce_distributed.GATHER_LIMIT` bytes.
    impl: "torch" (tiles of logits, any dtype and device), "triton" (CUDA, not fp64), "auto" (on CUDA triton, but torch
        for up to `infonce_small.CUDA_PAIRS` pairs without options, whose logits then exist as a whole).

    Logits, softmaxes and the gradients' sums are fp32 (fp64); the logits never exist as a whole.  The gradient is made
    in the forward where any input needs one; a backward hands it over, scaled.  There is no second derivative.
    Not finite: NaN and infinities give a loss and gradients that are not finite where plain torch's are not.
    Raises ValueError for shapes, dtypes, devices or values that do not fit together and for empty batches; UserError
    for an impl that cannot run.
    """
    counts = _check(query, key, temperature, labels, negatives, query_ids, key_ids, group, columns)
    total = sum(queries for queries, _, _ in counts)
    plain = labels is None and query_ids is None and (negatives is None or not len(negatives)) and len(counts) == 1
    small = is_small(query, key, plain=plain)
    blocks = _implementation(query, impl, small)
    inputs = _Inputs(
        labels=labels,
        query_ids=query_ids,
        key_ids=key_ids,
        blocks=blocks,
        small=small and blocks is infonce_torch,
        weight=1 / (2 * total),
        group=group,
        counts=counts,
        columns=columns,
        with_statistics=False,
        reduce=True,
    )
    return _apply(query, key, negatives, temperature, inputs)[0]


def infonce_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    weight: float,
    negatives: torch.Tensor | None = None,
    query_ids: torch.Tensor | None = None,
    key_ids: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    impl: str = "auto",
    columns: Columns = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight * sum of both directions' losses over this rank's queries, statistics fp32 [4]); see `infonce`.

    The gradient of the embeddings is that of the ranks' sum.  No rank needs to hold a row.
    statistics: sum of the positives' similarities, queries whose positive is above every other column, sum and count of
    the similarities to the other columns that take part.
    """
    counts = _check(query, key, temperature, None, negatives, query_ids, key_ids, group, columns, may_be_empty=True)
    inputs = _Inputs(
        labels=None,
        query_ids=query_ids,
        key_ids=key_ids,
        blocks=_implementation(query, impl),
        small=False,
        weight=weight,
        group=group,
        counts=counts,
        columns=columns,
        with_statistics=True,
        reduce=False,
    )
    return _apply(query, key, negatives, temperature, inputs)


@dataclass(kw_only=True, slots=True)
class _Inputs:
    """What has no gradient."""

    labels: torch.Tensor | None
    query_ids: torch.Tensor | None
    key_ids: torch.Tensor | None
    blocks: ModuleType
    small: bool  # all logits at once, see infonce_small
    weight: float
    group: dist.ProcessGroup | None
    counts: list[list[int]]  # by rank: queries, keys, negatives
    columns: str
    with_statistics: bool
    reduce: bool  # the loss is summed over the ranks


@torch.compiler.disable
def _apply(query, key, negatives, temperature, inputs: _Inputs):
    return _InfoNCE.apply(query, key, negatives, temperature, inputs, torch.is_grad_enabled())


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, negatives, temperature, inputs: _Inputs, grad_enabled: bool):
        problem = Problem(
            query=query,
            key=key,
            negatives=key[:0] if negatives is None else negatives,
            labels=inputs.labels,
            temperature=_in_dtype(temperature, query.dtype),
            query_ids=inputs.query_ids,
            key_ids=None if inputs.key_ids is None else inputs.key_ids[: len(key)],
            negative_ids=None if inputs.key_ids is None else inputs.key_ids[len(key) :],
            blocks=inputs.blocks,
            weight=inputs.weight,
            with_gradients=grad_enabled and any(ctx.needs_input_grad[:4]),
            with_statistics=inputs.with_statistics,
        )
        with torch.autocast(query.device.type, enabled=False):
            if inputs.small:
                share = small_share(problem)
            else:
                share = make_share(problem, inputs.group, inputs.counts, inputs.columns)
        loss = share.loss * inputs.weight
        if inputs.reduce and len(inputs.counts) > 1:
            dist.all_reduce(loss, group=inputs.group)
        ctx.dtypes = (query.dtype, getattr(temperature, "dtype", None))
        if problem.with_gradients:
            grad_temperature = None
            if ctx.needs_input_grad[3]:
                grad_temperature = -share.log_scale / problem.temperature
            ctx.save_for_backward(
                *(
                    part if needed else None
                    for part, needed in zip(
                        (share.query, share.key, share.negatives, grad_temperature), ctx.needs_input_grad, strict=False
                    )
                )
            )
        if share.statistics is not None:
            ctx.mark_non_differentiable(share.statistics)
        return loss, share.statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        dtypes = (ctx.dtypes[0],) * 3 + (ctx.dtypes[1],)
        kept = graph_is_kept()
        scaled = []
        for part, dtype in zip(ctx.saved_tensors, dtypes, strict=True):
            if part is not None:
                # Scaled into the inputs' dtype; where that is its own, and no second backward comes, in place.
                into = part if part.dtype == dtype and not kept else torch.empty_like(part, dtype=dtype)
                part = torch.mul(part, gradient, out=into)
            scaled.append(part)
        return *scaled, None, None


def make_share(problem: Problem, group: dist.ProcessGroup | None, counts: list[list[int]], columns: str) -> Share:
    """The share of this rank, by the form that fits; counts: by rank, (queries, keys, negatives)."""
    if len(counts) == 1 or not any(queries for queries, _, _ in counts):
        return local_share(problem)
    if uses_ring(problem, counts, columns):
        return ring_share(problem, group, counts)
    return gathered_share(problem, group, counts)


def _in_dtype(temperature: float | torch.Tensor, dtype: torch.dtype) -> float | torch.Tensor:
    if isinstance(temperature, torch.Tensor):
        return temperature.detach().to(infonce_torch.accumulator_dtype(dtype))
    return float(temperature)


def _implementation(query: torch.Tensor, impl: str, small: bool = False) -> ModuleType:
    obstacle = triton_obstacle(query.device)
    if query.dtype == torch.float64:
        obstacle = "fp64 embeddings are summed in fp64, which the Triton kernels do not do"
    obstacles = {"triton": obstacle, "torch": None}
    if query.device.type == "cpu" or small:  # the interpreter is for tests that ask for it; few launches for few pairs
        obstacles = {"torch": None, "triton": obstacle}
    if choose("infonce", impl, obstacles) == "torch":
        return infonce_torch
    from umer1_kernels import infonce as infonce_triton

    return infonce_triton


def _check(
    query, key, temperature, labels, negatives, query_ids, key_ids, group, columns, may_be_empty=False
) -> list[list[int]]:
    """By rank of the group: (queries, keys, negatives)."""
    if columns not in COLUMNS:
        raise UserError(f"infonce: columns={columns!r} is not legal; use one of {', '.join(COLUMNS)}")
    given = {"query": query, "key": key} | ({} if negatives is None else {"negatives": negatives})
    for name, rows in given.items():
        if rows.dim() != 2 or rows.shape[1] != query.shape[-1]:
            raise ValueError(f"infonce: {name} {tuple(rows.shape)} and query {tuple(query.shape)}: expected [rows, D]")
        if rows.dtype not in DTYPES or rows.dtype != query.dtype:
            raise ValueError(f"infonce: {name} is {rows.dtype}, query {query.dtype}: one of fp16, bf16, fp32, fp64")
        if rows.device != query.device:
            raise ValueError(f"infonce: {name} is on {rows.device}, query on {query.device}: expected one device")
    if query.shape[1] == 0:
        raise ValueError(f"infonce: query {tuple(query.shape)} has rows of no values")
    _check_temperature(temperature, query)
    extra = 0 if negatives is None else len(negatives)
    _check_labels(labels, query, key)
    if (query_ids is None) != (key_ids is None):
        raise ValueError("infonce: give query_ids and key_ids both, or neither")
    if query_ids is not None:
        for name, ids, size in (("query_ids", query_ids, len(query)), ("key_ids", key_ids, len(key) + extra)):
            if ids.shape != (size,) or ids.dtype != torch.int64 or ids.device != query.device:
                raise ValueError(
                    f"infonce: {name} {tuple(ids.shape)} {ids.dtype} on {ids.device}: expected int64 [{size}] on "
                    f"{query.device} (key_ids cover keys, then negatives)"
                )
    counts = all_rank_counts((len(query), len(key), extra), group, query.device)
    if not may_be_empty and not sum(queries for queries, _, _ in counts):
        raise ValueError(f"infonce: query {tuple(query.shape)} is empty{' on every rank' if len(counts) > 1 else ''}")
    return counts


def _check_temperature(temperature, query: torch.Tensor) -> None:
    if isinstance(temperature, torch.Tensor):
        if temperature.dim() or not temperature.is_floating_point() or temperature.device != query.device:
            raise ValueError(
                f"infonce: temperature {tuple(temperature.shape)} {temperature.dtype} on {temperature.device}: "
                f"expected a number or a 0-dim floating tensor on {query.device}"
            )
        if temperature.device.type != "cpu":  # looking would wait for the device
            return
        temperature = temperature.item()
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"infonce: temperature={temperature} must be finite and above 0, e.g. 0.02")


def _check_labels(labels: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> None:
    if labels is None:
        if len(query) != len(key):
            raise ValueError(f"infonce: {len(query)} queries and {len(key)} keys need labels, int64 [{len(query)}]")
        return
    if labels.shape != query.shape[:1] or labels.dtype != torch.int64 or labels.device != query.device:
        raise ValueError(
            f"infonce: labels {tuple(labels.shape)} {labels.dtype} on {labels.device}: expected int64 "
            f"[{len(query)}] on {query.device}"
        )
    if len(query) and not len(key):
        raise ValueError(f"infonce: {len(query)} queries and no key")
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(key):
        first, last = int(labels.min()), int(labels.max())
        raise ValueError(f"infonce: labels from {first} to {last}: expected rows of key, 0 to {len(key) - 1}")
