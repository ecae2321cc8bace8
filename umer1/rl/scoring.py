"""The rewards of a whole step: which terms count how much, and the comparison sets they are taken over.

A comparison set is `comparison_pairs` consecutive pairs of the global batch, whatever ranks they were rolled out on, so
that the same rollouts get the same rewards at any number of ranks.
"""

import importlib
import math
from dataclasses import dataclass, field

import torch

from umer1.errors import UserError
from umer1.ops.rank_margin_reward import rank_margin_rewards
from umer1.rl.rewards import REWARDS, RewardFunction, RewardInputs

SIDES = 2  # 0 the query, 1 the positive
DEFAULT_COMPARISON_PAIRS = 16  # docs/method.md, 5


@dataclass(kw_only=True, slots=True)
class RewardTerm:
    """One summand of the reward"""

    name: str
    """format, embedding, ranking, margin, threshold, length, or module:function for one of your own."""
    weight: float = 1.0
    """What it is multiplied by."""


def load_reward(name: str) -> RewardFunction:
    """The reward term of that name; UserError when there is none or it cannot be imported."""
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise UserError(f"rewards: {name!r} is no reward; use {', '.join(REWARDS)}, or module:function of your own")
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:  # a user's module may fail in any way
        raise UserError(
            f"rewards: {name!r}: module {module_name} cannot be imported ({type(error).__name__}: {error}); it must be "
            f"installed or on PYTHONPATH"
        ) from None
    if not callable(function):
        raise UserError(f"rewards: {name!r}: module {module_name} has no function {function_name}")
    return function


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """What a rollout is rewarded for, and what it is compared with"""

    rewards: list[RewardTerm] = field(default_factory=lambda: [RewardTerm(name="format"), RewardTerm(name="embedding")])
    """Terms of the reward, name and weight each: format, embedding (ranking * margin, the paper's), ranking, margin,
    threshold (share of the similarities to the own pair that reach reward_similarity_threshold), length (minus tokens
    / max_completion_length), or module:function of your own."""
    comparison_pairs: int | None = None
    """Pairs whose rollouts are compared with each other (N), over all ranks; global_batch_size is a multiple of it.
    Default: 16, or all pairs of a step where they are fewer."""
    reward_similarity_threshold: float = 0.5
    """Cosine that the threshold term asks for."""
    exclude_equal_targets: bool = False
    """Pairs with equal targets (same text and media) are no negatives of each other."""

    def violations(self) -> list[str]:
        found = []
        if not self.rewards:
            found.append("rewards is empty; give at least one, e.g. [{name: embedding, weight: 1.0}]")
        names = [term.name for term in self.rewards]
        found += [f"rewards: {name} stands there twice" for name in dict.fromkeys(names) if names.count(name) > 1]
        for term in self.rewards:
            if not math.isfinite(term.weight):
                found.append(f"rewards: weight={term.weight} of {term.name} must be a finite number")
            try:
                load_reward(term.name)
            except UserError as error:
                found.append(str(error))
        if self.rewards and all(term.weight == 0 for term in self.rewards):
            found.append("rewards: all weights are 0; nothing would be learnt")
        if self.comparison_pairs is not None and self.comparison_pairs < 2:
            found.append(
                f"comparison_pairs={self.comparison_pairs} must be 2 or above: a rollout is compared with other pairs'"
            )
        if not -1.0 <= self.reward_similarity_threshold <= 1.0:
            found.append(f"reward_similarity_threshold={self.reward_similarity_threshold} must lie between -1 and 1")
        return found

    def pairs_compared(self, global_batch_size: int) -> int:
        """N for a step of so many pairs."""
        return self.comparison_pairs or min(DEFAULT_COMPARISON_PAIRS, global_batch_size)

    def batch_violations(self, global_batch_size: int) -> list[str]:
        """What is wrong between the comparison sets and the pairs of a step."""
        pairs = self.pairs_compared(global_batch_size)
        if pairs < 1 or global_batch_size < 1 or global_batch_size % pairs == 0:
            return []
        nearest = [size for size in range(min(pairs, global_batch_size), 1, -1) if global_batch_size % size == 0]
        advice = f"--comparison-pairs {nearest[0]}, or " if nearest else ""
        return [
            f"global_batch_size={global_batch_size} is not a multiple of comparison_pairs={pairs}; use {advice}"
            f"--global-batch-size {-(-global_batch_size // pairs) * pairs}"
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRollouts:
    """All rollouts of one step in the order of global slots, the same on every rank: R = pairs * G for each side."""

    responses: list[list[str]]  # [2][R], "" for a rollout that failed
    lengths: torch.Tensor  # int64 [2, R], tokens of each response
    embeddings: torch.Tensor  # float [2, R, D], L2-normalised; anything where there is no <gen_emb>
    valid: torch.Tensor  # bool [2, R]: the rollout did not fail
    has_embedding: torch.Tensor  # bool [2, R]: its response has the token <gen_emb>
    target_ids: torch.Tensor | None = None  # int64 [pairs], `Sequence.target_id` of the positives


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRewards:
    """fp32 [2, R] each; 0 for a rollout that failed, which takes no part in means or advantages either."""

    total: torch.Tensor  # sum of weight * component
    components: dict[str, torch.Tensor]  # by name, unweighted
    ranking: torch.Tensor  # parts of the embedding reward, for the log whether rewarded or not
    margin: torch.Tensor


def _run_term(name: str, function: RewardFunction, inputs: RewardInputs) -> torch.Tensor:
    """The term's result; UserError when it is not one finite number for each rollout."""
    result = function(inputs)
    shape = tuple(inputs.valid.shape)
    if not isinstance(result, torch.Tensor) or tuple(result.shape) != shape:
        got = f"shape {tuple(result.shape)}" if isinstance(result, torch.Tensor) else f"a {type(result).__name__}"
        raise UserError(f"rewards: {name} gave {got}; it must return a float tensor of shape {shape}, one per rollout")
    result = result.detach().to(inputs.valid.device, torch.float32)
    if not torch.isfinite(result).all():
        rows = (~torch.isfinite(result)).nonzero().flatten().tolist()
        raise UserError(f"rewards: {name} is not finite for {len(rows)} of {len(result)} rollouts, first {rows[0]}")
    return result


def score_step(
    rollouts: StepRollouts, config: RewardConfig, *, num_generations: int, max_completion_length: int
) -> StepRewards:
    """Every rollout's reward and its parts.

    Pure: ranks that hold the same rollouts compute the same rewards.  Raises UserError when a term returns something
    else than one finite number a rollout.
    """
    functions = {term.name: load_reward(term.name) for term in config.rewards}
    valid = rollouts.valid.bool()
    embedded = valid & rollouts.has_embedding.bool()
    # What stands in the place of a missing embedding must not turn a product into NaN.
    embeddings = torch.where(embedded[..., None], rollouts.embeddings.detach(), 0.0)
    pairs_of_set = config.pairs_compared(valid.shape[1] // num_generations)
    rows_of_set = pairs_of_set * num_generations
    if valid.shape[1] % rows_of_set:
        raise ValueError(f"{valid.shape[1]} rollouts a side are no whole number of sets of {rows_of_set}")
    components = {name: torch.zeros(valid.shape, device=valid.device) for name in functions}
    ranking, margin = (torch.zeros(valid.shape, device=valid.device) for _ in range(2))
    for start in range(0, valid.shape[1], rows_of_set):
        rows = slice(start, start + rows_of_set)
        target_ids = None
        if config.exclude_equal_targets and rollouts.target_ids is not None:
            target_ids = rollouts.target_ids[start // num_generations :][:pairs_of_set]
        scores = rank_margin_rewards(
            embeddings[0, rows],
            embeddings[1, rows],
            num_generations,
            query_valid=embedded[0, rows],
            target_valid=embedded[1, rows],
            target_ids=target_ids,
        )
        for side in range(SIDES):
            inputs = RewardInputs(
                side=side,
                num_generations=num_generations,
                responses=rollouts.responses[side][rows],
                lengths=rollouts.lengths[side, rows],
                max_completion_length=max_completion_length,
                embeddings=embeddings[side, rows],
                other_embeddings=embeddings[1 - side, rows],
                valid=embedded[side, rows],
                other_valid=embedded[1 - side, rows],
                embedding_scores=scores[side],
                target_ids=target_ids,
                similarity_threshold=config.reward_similarity_threshold,
            )
            for name, function in functions.items():
                components[name][side, rows] = _run_term(name, function, inputs)
            ranking[side, rows], margin[side, rows] = scores[side].ranking.float(), scores[side].margin.float()
    components = {name: values.masked_fill(~valid, 0.0) for name, values in components.items()}
    total = sum(term.weight * components[term.name] for term in config.rewards)
    return StepRewards(total=total, components=components, ranking=ranking, margin=margin)
