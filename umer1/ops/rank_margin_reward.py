"""Ranking x margin rewards of rollouts (METHOD section 5): the door, and the form in plain torch.

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
    given = (num_generations, query_valid, target_valid, target_ids)
    if _choose(query, impl) == "triton":
        return _triton(query, target, *given, both=False)[0]
    return _torch(query, target, *given)


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
    if _choose(query, impl) == "triton":
        return _triton(query, target, num_generations, query_valid, target_valid, target_ids, both=True)
    return (
        _torch(query, target, num_generations, query_valid, target_valid, target_ids),
        _torch(target, query, num_generations, target_valid, query_valid, target_ids),
    )


def _check(query, target, num_generations, query_valid, target_valid, target_ids) -> None:
    if query.dim() != 2 or query.shape != target.shape:
        raise ValueError(f"embeddings {tuple(query.shape)} and {tuple(target.shape)}: expected [N * G, D] twice")
    if query.dtype not in DTYPES or query.dtype != target.dtype:
        raise ValueError(f"embeddings of {query.dtype} and {target.dtype}: use one of fp16, bf16, fp32, fp64 for both")
    if query.device != target.device:
        raise ValueError(f"embeddings on {query.device} and {target.device}: expected one device")
    if query.numel() == 0:
        raise ValueError(f"embeddings {tuple(query.shape)} are empty: there is nothing to reward")
    if num_generations < 1 or len(query) % num_generations:
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


def _first_equal(rows: torch.Tensor) -> torch.Tensor:
    """int64 [R]: for each of the fp64 rows [R, C] the index of the first one with equal elements."""
    # As integers: NaN has an order too.  -0.0 + 0.0 is 0.0, which it equals.
    bits = (rows + 0.0).view(torch.int64)
    _, number = torch.unique(bits, dim=0, return_inverse=True)
    index = torch.arange(len(rows), device=rows.device)
    return index.new_full((len(rows),), len(rows)).scatter_reduce(0, number, index, "amin")[number]


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the masked values of the last dimension; 0 where there are none."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def _torch(query, target, num_generations, query_valid, target_valid, target_ids) -> RankMargin:
    """The results in fp64, some rows of the similarities at a time.

    A matrix product adds up in an order that depends on the place in the matrix, so that equal targets would not
    always have equal similarities and a tie be broken by round-off: each target gets the similarity of the first one
    that equals it.
    """
    queries, targets = query.detach().double(), target.detach().double()
    count, device = len(queries), queries.device
    index = torch.arange(count, device=device)
    groups = index // num_generations
    everyone = torch.ones(count, dtype=torch.bool, device=device)
    query_valid = everyone if query_valid is None else query_valid.to(device, torch.bool)
    target_valid = everyone if target_valid is None else target_valid.to(device, torch.bool)
    ids = groups if target_ids is None else target_ids.to(device)[groups]
    first = _first_equal(targets)
    has_copies = bool((first != index).any())

    num_own = target_valid.view(-1, num_generations).sum(1)[groups]
    rankings, margins = queries.new_zeros(count), queries.new_zeros(count)
    rows = max(1, CHUNK_ELEMENTS // count)
    for start in range(0, count, rows):
        chunk = slice(start, start + rows)
        similarity = queries[chunk] @ targets.T
        if has_copies:
            similarity = similarity[:, first]
        own_index = groups[chunk, None] * num_generations + index[:num_generations]
        own, own_valid, wanted = similarity.gather(1, own_index), target_valid[own_index], num_own[chunk, None]
        other_valid = (ids[chunk, None] != ids) & target_valid
        margins[chunk] = _mean(own, own_valid) - _mean(similarity, other_valid)
        similarity.masked_fill_(~other_valid.scatter_(1, own_index, own_valid), -math.inf)
        # The last similarity that still is in the top; of those equal to it, the first ones in index order are.
        last = similarity.topk(num_generations, dim=1).values.gather(1, (wanted - 1).clamp(min=0))
        place = (similarity > last).sum(1, keepdim=True) + (similarity == last).cumsum(1).gather(1, own_index)
        hits = own_valid & ((own > last) | ((own == last) & (place <= wanted)))
        rankings[chunk] = hits.sum(1) / wanted[:, 0].clamp(min=1).double()

    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rankings = torch.where(margins.to(dtype).isfinite(), rankings, math.nan)
    # Equal queries of one pair: the results of the first, not ones that differ by round-off.
    first = _first_equal(torch.cat([groups[:, None], queries], dim=1))
    scored = query_valid & (num_own > 0)
    results = [torch.where(scored, part[first], 0.0).to(dtype) for part in (rankings * margins, rankings, margins)]
    return RankMargin(*results)
