"""Ranking x margin rewards of rollouts (docs/method.md, 5): the door, and the form in plain torch.

    ranking = |S+ ∩ top_G(S+ ∪ S-)| / G     margin = mean(S+) - mean(S-)     reward = ranking * margin

with S+ a rollout's similarities to the G rollouts of its own pair on the other side, and S- those to all others'.
Source: "UME-R1: Exploring Reasoning-Driven Generative Multimodal Embeddings", arXiv 2511.00405, section 3.3; equal
similarities rank in index order, which the paper leaves open.
"""

import math
from typing import NamedTuple

import torch

from umer1.ops.dispatch import choose, triton_obstacle

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Elements of the similarities of one chunk of rows in the torch form, fp64: 32 MiB, and a few masks of that shape.
CHUNK_ELEMENTS = 1 << 22


class RankMargin(NamedTuple):
    """What the rollouts of one side get, [N * G] each: fp64 for fp64 embeddings, else fp32; without gradient."""

    reward: torch.Tensor
    ranking: torch.Tensor
    margin: torch.Tensor


def rank_margin_reward(
    query: torch.Tensor,
    target: torch.Tensor,
    num_generations: int,
    impl: str = "auto",
    *,
    query_valid: torch.Tensor | None = None,
    target_valid: torch.Tensor | None = None,
    target_ids: torch.Tensor | None = None,
) -> RankMargin:
    """(reward, ranking, margin) of the query side's rollouts; `rank_margin_rewards` gives both sides at once.

    query, target: [N * G, D], fp16, bf16, fp32 or fp64, both the same, in group order (row = pair * G + generation);
    compared by dot product as they are given, so callers normalise.  num_generations: G.
    query_valid, target_valid: bool [N * G], None for all.  A target that is not valid leaves S+ and S-, and G becomes
    the number of valid S+; a query rollout that is not valid, or has no valid S+, gets 0, 0, 0; without any valid S-
    the margin is mean(S+).  What is not valid may hold anything.
    target_ids: integers [N]; pairs of equal ids are no negatives of each other (None: all are).

    Ties: equal similarities rank in the order of the targets' rows, and targets with equal elements have equal
    similarities to the last bit wherever they stand; equal queries of one pair get equal results.
    Not finite: where the margin is NaN or infinite (a NaN, an infinity or an overflow among the similarities that a
    valid rollout is compared by), ranking and reward are NaN: no such rollout can look good.

    impl: torch sums in fp64 and serves every dtype and device; triton (CUDA, not fp64) sums in fp32, with fp32
    embeddings multiplied as three TF32 products, and ranks similarities closer than about 1e-6 |q| |t| by round-off.
    Neither holds the [N * G, N * G] similarities; triton's buffers take about 12 G + N * G / 4 bytes a rollout.
    Raises ValueError for shapes, dtypes or devices that do not fit together and for empty batches, UserError for an
    impl that cannot run.
    """
    _check(query, target, num_generations, query_valid, target_valid, target_ids)
    run = _triton if _choose(query, impl) == "triton" else _torch
    return run(query, target, num_generations, query_valid, target_valid, target_ids, both=False)[0]


def rank_margin_rewards(
    query: torch.Tensor,
    target: torch.Tensor,
    num_generations: int,
    impl: str = "auto",
    *,
    query_valid: torch.Tensor | None = None,
    target_valid: torch.Tensor | None = None,
    target_ids: torch.Tensor | None = None,
) -> tuple[RankMargin, RankMargin]:
    """What the query's rollouts and what the target's rollouts get: `rank_margin_reward`, and it with swapped roles.

    Arguments as there.  The Triton form serves both sides from one sweep of the similarities.
    """
    _check(query, target, num_generations, query_valid, target_valid, target_ids)
    run = _triton if _choose(query, impl) == "triton" else _torch
    return tuple(run(query, target, num_generations, query_valid, target_valid, target_ids, both=True))


def _check(query, target, num_generations, query_valid, target_valid, target_ids) -> None:
    if query.dim() != 2 or query.shape != target.shape:
        raise ValueError(f"embeddings {tuple(query.shape)} and {tuple(target.shape)}: expected [N * G, D] twice")
    if query.dtype not in DTYPES or query.dtype != target.dtype:
        raise ValueError(f"embeddings of {query.dtype} and {target.dtype}: use one of fp16, bf16, fp32, fp64 for both")
    if query.device != target.device:
        raise ValueError(f"embeddings on {query.device} and {target.device}: expected one device")
    if query.numel() == 0:
        raise ValueError(f"embeddings {tuple(query.shape)} are empty: there is nothing to reward")
    if not isinstance(num_generations, int) or num_generations < 1 or len(query) % num_generations:
        raise ValueError(f"{len(query)} rollouts are no whole number of groups of num_generations={num_generations}")
    for name, valid in (("query_valid", query_valid), ("target_valid", target_valid)):
        if valid is not None and valid.shape != query.shape[:1]:
            raise ValueError(f"{name} {tuple(valid.shape)}: expected one flag for each of {len(query)} rollouts")
    pairs = len(query) // num_generations
    if target_ids is not None and (target_ids.shape != (pairs,) or target_ids.is_floating_point()):
        raise ValueError(
            f"target_ids {tuple(target_ids.shape)} of {target_ids.dtype}: expected an integer for each of {pairs} pairs"
        )


def _choose(query: torch.Tensor, impl: str) -> str:
    obstacle = triton_obstacle(query.device)
    if query.dtype == torch.float64:
        obstacle = "fp64 embeddings are summed in fp64, which the Triton kernels do not do"
    obstacles = {"triton": obstacle, "torch": None}
    if query.device.type == "cpu":  # the interpreter is for tests that ask for it
        obstacles = {"torch": None, "triton": obstacle}
    return choose("rank_margin_reward", impl, obstacles)


def _triton(query, target, num_generations, query_valid, target_valid, target_ids, *, both) -> list[RankMargin]:
    from umer1_kernels.rank_margin import rank_margin

    device = query.device
    flags = [
        None if valid is None else valid.to(device, torch.bool).contiguous().view(torch.uint8)
        for valid in (query_valid, target_valid)
    ]
    ids = None if target_ids is None else target_ids.to(device, torch.int64).contiguous()
    sides = rank_margin(
        query.detach().contiguous(),
        target.detach().contiguous(),
        num_generations,
        query_valid=flags[0],
        target_valid=flags[1],
        ids=ids,
        both=both,
    )
    return [RankMargin(*side) for side in sides]


class _Side(NamedTuple):
    """One side's embeddings in fp64."""

    rows: torch.Tensor  # [R, D]
    valid: torch.Tensor  # bool [R]
    first: torch.Tensor  # int64 [R]: for each row the index of the first one with equal elements


def _side(rows: torch.Tensor, valid: torch.Tensor | None) -> _Side:
    valid = rows.new_ones(len(rows)) if valid is None else valid
    return _Side(rows.detach().double(), valid.to(rows.device, torch.bool), _first_equal(rows.detach()))


def _first_equal(rows: torch.Tensor) -> torch.Tensor:
    # As integers: NaN has an order too, and checksums do not depend on one.  -0.0 + 0.0 is 0.0, which it equals.
    bits = (rows + 0.0).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.itemsize])
    bits = bits.to(torch.int64 if rows.itemsize == 8 else torch.int32)
    factors = torch.randint(2**31, bits.shape[1:], dtype=bits.dtype, generator=torch.Generator().manual_seed(0)) | 1
    first = _first_of((bits * factors.to(bits.device)).sum(1))
    copies = (first != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
    if not torch.equal(bits[copies], bits[first[copies]]):  # rows that differ and have one checksum
        first = _first_of(torch.unique(bits, dim=0, return_inverse=True)[1])
    return first


def _first_of(numbers: torch.Tensor) -> torch.Tensor:
    """int64 [R]: for each of the integers [R] the index of the first one that equals it."""
    _, kinds = torch.unique(numbers, return_inverse=True)
    index = torch.arange(len(kinds), device=kinds.device)
    return torch.full_like(index, len(kinds)).scatter_reduce(0, kinds, index, "amin")[kinds]


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the masked values of the last dimension; 0 where there are none."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def _torch(query, target, num_generations, query_valid, target_valid, target_ids, *, both) -> list[RankMargin]:
    """The results of the query's side and, with `both`, of the target's; made in fp64."""
    sides = _side(query, query_valid), _side(target, target_valid)
    groups = torch.arange(len(query), device=query.device) // num_generations
    ids = groups if target_ids is None else target_ids.to(query.device)[groups]
    # Where the whole of it is no more than one chunk, one matrix product serves both sides.
    whole = sides[0].rows @ sides[1].rows.T if len(query) ** 2 <= CHUNK_ELEMENTS else None
    given = (num_generations, groups, ids, torch.float64 if query.dtype == torch.float64 else torch.float32)
    found = [_one_side(*sides, whole, *given)]
    if both:
        found.append(_one_side(*sides[::-1], None if whole is None else whole.T, *given))
    return found


def _one_side(
    query: _Side,
    target: _Side,
    whole: torch.Tensor | None,
    num_generations: int,
    groups: torch.Tensor,
    ids: torch.Tensor,
    dtype: torch.dtype,
) -> RankMargin:
    """The results of the query's rollouts, some rows of the similarities at a time.

    A matrix product adds up in an order that depends on the place in the matrix, so that equal targets would not
    always have equal similarities and a tie be broken by round-off: each target gets the similarity of the first one
    that equals it.

    whole: the similarities [R, R] where they are there already; groups: int64 [R], each row's pair; ids: [R].
    """
    count, index = len(groups), torch.arange(len(groups), device=groups.device)
    has_copies = bool((target.first != index).any())
    num_own = target.valid.view(-1, num_generations).sum(1)[groups]
    rankings, margins = query.rows.new_zeros(count), query.rows.new_zeros(count)
    rows = max(1, CHUNK_ELEMENTS // count)
    for start in range(0, count, rows):
        chunk = slice(start, start + rows)
        similarity = query.rows[chunk] @ target.rows.T if whole is None else whole[chunk]
        if has_copies:
            similarity = similarity[:, target.first]
        own_index = groups[chunk, None] * num_generations + index[:num_generations]
        own, own_valid, wanted = similarity.gather(1, own_index), target.valid[own_index], num_own[chunk, None]
        other_valid = (ids[chunk, None] != ids) & target.valid
        margins[chunk] = _mean(own, own_valid) - _mean(similarity, other_valid)
        similarity = similarity.masked_fill(~other_valid.scatter_(1, own_index, own_valid), -math.inf)
        # The last similarity that still is in the top; of those equal to it, the first ones in index order are.
        last = similarity.topk(num_generations, dim=1).values.gather(1, (wanted - 1).clamp(min=0))
        hits = own_valid & (own >= last)
        crowded = ((similarity >= last).sum(1) != wanted[:, 0]).nonzero()[:, 0]
        if len(crowded):
            hits[crowded] &= _in_index_order(*(part[crowded] for part in (similarity, last, own_index, wanted)))
        rankings[chunk] = hits.sum(1) / wanted[:, 0].clamp(min=1).double()

    rankings = torch.where(margins.to(dtype).isfinite(), rankings, math.nan)
    # Equal queries of one pair: the results of the first, not ones that differ by round-off.
    first = _first_of(query.first * count + groups)
    scored = query.valid & (num_own > 0)
    results = [torch.where(scored, part[first], 0.0).to(dtype) for part in (rankings * margins, rankings, margins)]
    return RankMargin(*results)


def _in_index_order(
    similarity: torch.Tensor, last: torch.Tensor, own_index: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """bool, as own_index: among the `wanted` first ones, where those equal to the `last` of them count by index."""
    place = (similarity > last).sum(1, keepdim=True) + (similarity == last).cumsum(1).gather(1, own_index)
    return (similarity.gather(1, own_index) > last) | (place <= wanted)
