"""Group-relative policy optimisation: advantages, the clipped objective with a KL penalty, and what is logged of it.

docs/method.md, 5.  For token t of response i with advantage A_i, ratio r = exp(log p - log p_old):

    l_it = -min(r A_i, clip(r, 1 - epsilon, 1 + epsilon_high) A_i) * w_it + beta * k3(log p_ref - log p)
    k3(d) = exp(d) - d - 1,   w_it = min(exp(log p_old - log p_engine), cap), or 1

and the loss of a side is the mean over its responses of sum_t l_it / |i| ("response", the paper) or / the longest
legal response ("constant", upstream).  The loss of a step is the mean of both sides' losses.
"""

import math
from typing import Literal

import torch

LossNormalisation = Literal["response", "constant"]

ADVANTAGE_EPSILON = 1e-4  # docs/method.md, 5: (R - mean) / (std + 1e-4)
NO_SPREAD = 1e-6  # rewards are fp32 of order 1; what differs by less is round-off of equal responses

TOKEN_STATISTICS = ("tokens", "kl", "ratio", "clipped_low", "clipped_high")
MISMATCH_SUMS = ("tokens", "absolute", "k3", "truncated")


def _float(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _grouped(rewards: torch.Tensor, num_generations: int, valid: torch.Tensor | None):
    """(rewards, valid) as [..., P, G]."""
    if num_generations < 1 or rewards.shape[-1] % num_generations:
        raise ValueError(f"{rewards.shape[-1]} rewards are no whole number of groups of {num_generations}")
    shape = (*rewards.shape[:-1], -1, num_generations)
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid.bool()
    return _float(rewards).reshape(shape), valid.reshape(shape)


def _spread(rewards: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Largest less smallest valid reward of each group; 0 where there are fewer than two."""
    largest = rewards.masked_fill(~valid, -math.inf).amax(-1)
    smallest = rewards.masked_fill(~valid, math.inf).amin(-1)
    return torch.where(valid.sum(-1) >= 2, largest - smallest, 0.0)


def group_advantages(rewards: torch.Tensor, num_generations: int, *, valid: torch.Tensor | None = None) -> torch.Tensor:
    """(R - mean) / (std + 1e-4) within each group of `num_generations` consecutive rewards; std is the unbiased one.

    rewards: [..., P * G]; valid: bool of that shape, or None for all.  Mean and std are those of a group's valid
    rewards; what is not valid gets 0, and so does a group of fewer than two valid ones, or of equal ones (where
    round-off over 1e-4 would be all there is).  fp64 for fp64, else fp32.
    """
    grouped, valid = _grouped(rewards, num_generations, valid)
    grouped = grouped.masked_fill(~valid, 0.0)
    count = valid.sum(-1, keepdim=True)
    centred = (grouped - grouped.sum(-1, keepdim=True) / count.clamp(min=1)).masked_fill(~valid, 0.0)
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    advantages = centred / (std + ADVANTAGE_EPSILON)
    return advantages.masked_fill(_spread(grouped, valid)[..., None] == 0, 0.0).reshape(rewards.shape)


def groups_with_spread(
    rewards: torch.Tensor, num_generations: int, *, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """bool [..., P]: whether a group's valid rewards differ by more than round-off, so that it teaches something.

    False for groups of fewer than two valid rewards.
    """
    return _spread(*_grouped(rewards, num_generations, valid)) > NO_SPREAD


def _held(difference: torch.Tensor) -> torch.Tensor:
    """Within what the dtype can hold the exp of, for 0 * inf in backward would be no number."""
    limit = 0.9 * math.log(torch.finfo(difference.dtype).max)
    return difference.clamp(-limit, limit)


def _exp(difference: torch.Tensor) -> torch.Tensor:
    return _held(difference).exp()


def k3(difference: torch.Tensor) -> torch.Tensor:
    """exp(d) - d - 1: with d = log q - log p at samples of p, an estimate of KL(p || q) that is never negative."""
    return torch.expm1(_held(difference)) - difference  # exp(d) - 1 would lose all digits of a small d in fp32


def importance_weights(old_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """min(exp(old - engine), cap), detached: corrects for tokens drawn from the engine's distribution."""
    return _exp(_float(old_logprobs).detach() - _float(engine_logprobs).detach()).clamp(max=cap)


def token_losses(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    beta: float,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of each token: clipped policy term times its importance weight, plus beta times k3.

    All tensors have one shape (`advantages`: each token its response's) or broadcast to it; gradient flows to
    `logprobs` alone.  epsilon_high None: epsilon.  importance: what `importance_weights` gives, or None for 1.
    ref_logprobs may be None when beta is 0.
    """
    logprobs = _float(logprobs)
    ratio = _exp(logprobs - _float(old_logprobs).detach())
    advantages = advantages.detach().to(ratio.dtype)
    clipped = ratio.clamp(1.0 - epsilon, 1.0 + (epsilon if epsilon_high is None else epsilon_high))
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    if importance is not None:
        losses = losses * importance.detach()
    if beta != 0.0:
        if ref_logprobs is None:
            raise ValueError(f"beta={beta} needs ref_logprobs")
        losses = losses + beta * k3(_float(ref_logprobs).detach() - logprobs)
    return losses


def token_weights(
    lengths: torch.Tensor,
    *,
    loss_normalisation: LossNormalisation,
    max_completion_length: int | None = None,
    num_responses: int | None = None,
) -> torch.Tensor:
    """What each token of a response of that length counts: fp64 [R], so that sum_it weight_i l_it is a side's loss.

    lengths: int [R], tokens of each response; 0 gives 0.  num_responses: how many responses (that have tokens) the mean
    is taken over, over all micro-batches and ranks; None counts those of `lengths`.
    """
    if loss_normalisation not in ("response", "constant"):
        raise ValueError(f"loss_normalisation={loss_normalisation!r} is not legal; use response or constant")
    if num_responses is None:
        num_responses = int((lengths > 0).sum())
    if loss_normalisation == "constant":
        if max_completion_length is None:
            raise ValueError("loss_normalisation=constant needs max_completion_length")
        divisor = torch.full_like(lengths, max_completion_length)
    else:
        divisor = lengths
    weights = 1.0 / (divisor.double().clamp(min=1.0) * max(num_responses, 1))
    return weights.masked_fill(lengths <= 0, 0.0)


def grpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    beta: float,
    loss_normalisation: LossNormalisation,
    max_completion_length: int | None = None,
    engine_logprobs: torch.Tensor | None = None,
    importance_cap: float | None = None,
) -> torch.Tensor:
    """Scalar loss of R padded responses: the mean, over those that have tokens, of each response's loss.

    logprobs (with gradient), old_logprobs, ref_logprobs, engine_logprobs: [R, L]; advantages: [R]; mask: [R, L], true
    at response tokens; what padding holds does not matter.  epsilon_high None: epsilon.  loss_normalisation: "response"
    divides a response's token sum by its own length, "constant" by max_completion_length (None: L).
    The truncated importance weight is on when both engine_logprobs and importance_cap are given.
    """
    mask = mask.bool()
    logprobs, old, ref, engine = (
        None if values is None else _float(values).masked_fill(~mask, 0.0)
        for values in (logprobs, old_logprobs, ref_logprobs, engine_logprobs)
    )
    importance = None
    if engine is not None and importance_cap is not None:
        importance = importance_weights(old, engine, importance_cap)
    losses = token_losses(
        logprobs,
        old,
        ref,
        advantages[:, None],
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        beta=beta,
        importance=importance,
    )
    per_token = token_weights(
        mask.sum(1),
        loss_normalisation=loss_normalisation,
        max_completion_length=mask.shape[1] if max_completion_length is None else max_completion_length,
    )
    return (losses * mask * per_token[:, None].to(losses.dtype)).sum()


@torch.no_grad()
def token_statistics(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
) -> torch.Tensor:
    """Sums over tokens for the log, fp32 [5] as TOKEN_STATISTICS names them; they add up over batches and ranks.

    All tensors have one shape, response tokens alone.  kl is 0 without ref_logprobs.  A token counts as clipped where
    the clip is active: ratio below 1 - epsilon at a negative advantage, above 1 + epsilon_high at a positive one.
    """
    logprobs = _float(logprobs)
    ratio = _exp(logprobs - _float(old_logprobs))
    kl = torch.zeros_like(ratio) if ref_logprobs is None else k3(_float(ref_logprobs) - logprobs)
    low = (ratio < 1.0 - epsilon) & (advantages < 0)
    high = (ratio > 1.0 + (epsilon if epsilon_high is None else epsilon_high)) & (advantages > 0)
    return torch.stack([torch.ones_like(kl).sum(), kl.sum(), ratio.sum(), low.sum(), high.sum()]).float()


@torch.no_grad()
def mismatch_sums(
    old_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, cap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums fp32 [4] as MISMATCH_SUMS names them, ratios fp32 [T] = exp(trainer - engine)) of the same tokens.

    absolute: sum of |trainer - engine|; k3: the estimate of KL(engine || trainer), for the engine drew the tokens;
    truncated: how many ratios are above the cap.  Sums add up over batches and ranks; ratios are for the percentile.
    """
    difference = _float(old_logprobs).flatten() - _float(engine_logprobs).flatten()
    ratios = _exp(difference)
    truncated = (ratios > (math.inf if cap is None else cap)).sum()
    sums = [torch.ones_like(difference).sum(), difference.abs().sum(), k3(difference).sum(), truncated]
    return torch.stack(sums).float(), ratios.float()


def mismatch_summary(sums: torch.Tensor, ratios: torch.Tensor, cap: float | None = None) -> dict[str, float]:
    """What the log says of trainer and engine: mean |difference|, k3, and the ratio's 99th percentile.

    sums: [4] and ratios: [T] of `mismatch_sums`, added up and put together.  The percentile (nearest rank) before and
    after truncation at the cap.  No tokens: zeros, and ratios of 1.
    """
    tokens, absolute, estimate, truncated = sums.tolist()
    p99 = 1.0
    if ratios.numel():
        p99 = ratios.flatten().kthvalue(math.ceil(0.99 * ratios.numel())).values.item()
    return {
        "mean_abs": absolute / max(tokens, 1.0),
        "k3": estimate / max(tokens, 1.0),
        "ratio_p99": p99,
        "ratio_p99_truncated": p99 if cap is None else min(p99, cap),
        "truncated_share": truncated / max(tokens, 1.0),
    }
