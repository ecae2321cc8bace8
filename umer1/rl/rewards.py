"""What a rollout is worth: pure functions of the rollouts of one comparison set (docs/method.md, 5).

A comparison set is N pairs with G rollouts on either side, in group order (row = pair * G + generation).  A reward
term takes a RewardInputs, one side of one comparison set, and returns fp32 [N * G].  A term of one's own has the same
form: `module:function` in the configuration.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from umer1.data.prompts import has_format
from umer1.ops.rank_margin_reward import RankMargin


def format_reward(responses: list[str]) -> torch.Tensor:
    """fp32 [R]: 1 where `<think>.*?</think>.*?<answer>.*?<gen_emb>` (dot matches newline) is found, else 0."""
    return torch.tensor([float(has_format(response)) for response in responses], dtype=torch.float32)


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the masked values of the last dimension; 0 where there are none."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def _check(query: torch.Tensor, target: torch.Tensor, num_generations: int) -> None:
    if query.dim() != 2 or query.shape != target.shape:
        raise ValueError(f"embeddings {tuple(query.shape)} and {tuple(target.shape)}: expected [N * G, D] twice")
    if num_generations < 1 or len(query) % num_generations:
        raise ValueError(f"{len(query)} rollouts are no whole number of groups of {num_generations}")


def threshold_share(
    query_embeddings: torch.Tensor,
    target_embeddings: torch.Tensor,
    num_generations: int,
    threshold: float,
    *,
    query_valid: torch.Tensor,
    target_valid: torch.Tensor,
) -> torch.Tensor:
    """fp32 [N * G]: the share of a rollout's valid S+ that is at least `threshold`; 0 where there is none."""
    _check(query_embeddings, target_embeddings, num_generations)
    shape = (-1, num_generations, query_embeddings.shape[1])
    queries, targets = (part.detach().double().view(shape) for part in (query_embeddings, target_embeddings))
    similarity = (queries[:, :, None, :] * targets[:, None, :, :]).sum(-1)  # [N, G, G]
    valid = target_valid.view(-1, 1, num_generations).expand_as(similarity)
    share = _mean((similarity >= threshold).double(), valid).flatten()
    return torch.where(query_valid, share, 0.0).float()


@dataclass(frozen=True, kw_only=True)
class RewardInputs:
    """One side of one comparison set: R = N * G rollouts in group order, and the other side's embeddings.

    `valid`: the rollout exists and its response has <gen_emb>; an embedding elsewhere means nothing.
    """

    side: int  # 0: rollouts of the query, 1: of the positive
    num_generations: int  # G
    responses: list[str]  # [R], "" for a rollout that failed
    lengths: torch.Tensor  # int64 [R], tokens of each response
    max_completion_length: int  # tokens
    embeddings: torch.Tensor  # float [R, D], L2-normalised
    other_embeddings: torch.Tensor  # float [R, D], L2-normalised
    valid: torch.Tensor  # bool [R]
    other_valid: torch.Tensor  # bool [R]
    embedding_scores: RankMargin  # (reward, ranking, margin) of `umer1.ops.rank_margin_reward`, [R] each
    target_ids: torch.Tensor | None = None  # int64 [N]: pairs of equal ids are no negatives of each other
    similarity_threshold: float = 0.5


RewardFunction = Callable[[RewardInputs], torch.Tensor]


def format_term(inputs: RewardInputs) -> torch.Tensor:
    """1 for the right form; 0 without the token <gen_emb>, even where other tokens spell it."""
    reward = format_reward(inputs.responses).to(inputs.valid.device)
    return torch.where(inputs.valid, reward, 0.0)


def embedding_term(inputs: RewardInputs) -> torch.Tensor:
    """ranking * margin, the paper's reward."""
    return inputs.embedding_scores.reward.float()


def ranking_term(inputs: RewardInputs) -> torch.Tensor:
    """The ranking alone (ablation)."""
    return inputs.embedding_scores.ranking.float()


def margin_term(inputs: RewardInputs) -> torch.Tensor:
    """The margin alone (ablation)."""
    return inputs.embedding_scores.margin.float()


def threshold_term(inputs: RewardInputs) -> torch.Tensor:
    """The share of similarities to the own pair that reach the threshold (ablation)."""
    return threshold_share(
        inputs.embeddings,
        inputs.other_embeddings,
        inputs.num_generations,
        inputs.similarity_threshold,
        query_valid=inputs.valid,
        target_valid=inputs.other_valid,
    )


def length_term(inputs: RewardInputs) -> torch.Tensor:
    """Minus the response's tokens over the most it may have: between -1 and 0."""
    return -inputs.lengths.float() / inputs.max_completion_length


REWARDS: dict[str, RewardFunction] = {
    "format": format_term,
    "embedding": embedding_term,
    "ranking": ranking_term,
    "margin": margin_term,
    "threshold": threshold_term,
    "length": length_term,
}
