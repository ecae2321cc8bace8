"""From rollouts to advantages: one teacher-forced forward, rewards over all ranks' rollouts, numbers for the log."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from umer1.distributed.parallel import ParallelState
from umer1.losses.grpo import (
    group_advantages,
    groups_with_spread,
    mismatch_summary,
    mismatch_sums,
)
from umer1.rl.scoring import StepRewards, StepRollouts, score_step
from umer1.rl.types import Completion
from umer1.training import policy_step
from umer1.training.policy_batches import PolicyBatch, Round, SpecialIds, pack_rollouts, plan
from umer1.training.policy_config import GRPOConfig
from umer1.training.policy_step import PolicyStep, VisionCache
from umer1.training.schedule import run_schedule


@dataclass(slots=True)
class ScoredRound:
    """A round of this data-parallel rank and what came of it, and the whole step's rollouts as all ranks have them."""

    round_: Round
    parts: list[list[PolicyBatch]]  # micro-batches of each mini-batch
    step: PolicyStep
    entropy: torch.Tensor  # fp32 [K]
    embeddings: torch.Tensor  # fp32 [2 * P * G, H]
    rollouts: StepRollouts | None = None  # N pairs: all ranks'
    datasets: list[str] | None = None  # [N], data set of each pair
    rewards: StepRewards | None = None
    cut_off: torch.Tensor | None = None  # int64 [2, N * G]: 1 where the response was cut off at the longest length
    advantages: torch.Tensor | None = None  # fp32 [2, N * G]
    spread: torch.Tensor | None = None  # bool [2, N]: groups whose rewards differ


class Scorer:
    """Runs the model over rounds of rollouts.  Every method is collective."""

    def __init__(self, config: GRPOConfig, special: SpecialIds, tokenizer: Any, state: ParallelState):
        self.config, self.special, self.tokenizer, self.state = config, special, tokenizer, state

    # -- micro-batches -----------------------------------------------------------------------------------------------

    def batches(self, round_: Round, pairs: list[int]) -> list[PolicyBatch]:
        """Micro-batches of the rollouts of `pairs`; at least one, since every rank takes part in every pass."""
        parallel, data = self.config.parallel, self.config.data
        multiple = self.state.pp_size if parallel.num_layers_per_virtual_pipeline_stage else 1
        rollouts = plan(
            round_,
            pairs,
            micro_batch_size=data.micro_batch_size,
            max_tokens=data.max_tokens_per_micro_batch,
            max_patches=data.max_patches_per_micro_batch,
            multiple_of=multiple,
        )
        while not rollouts or len(rollouts) % multiple:
            rollouts.append([])
        padding = self.config.fp8.token_multiple(self.state.tp_size if parallel.sequence_parallel else 1)
        return [pack_rollouts(round_, batch, self.special, padding).to(self.state.device) for batch in rollouts]

    def parts(self, round_: Round) -> list[list[PolicyBatch]]:
        """Micro-batches of each mini-batch.  Every n-th slot belongs to it, so that the layout does not matter."""
        parts = self.config.policy.mini_batches
        slots = [pair.slot for pair in round_.pairs]
        return [
            self.batches(round_, [place for place, slot in enumerate(slots) if slot % parts == number])
            for number in range(parts)
        ]

    # -- forward passes ----------------------------------------------------------------------------------------------

    def score(self, models: list[torch.nn.Module], round_: Round) -> ScoredRound:
        """Old log-probs, entropies and embeddings of a round, from one forward pass."""
        cache = VisionCache(round_, self.config.model.train_vision, self.state.device)
        step = PolicyStep(self.config.policy, self.config.rollout.temperature, cache)
        parts = self.parts(round_)
        tokens, rollouts, hidden = round_.num_tokens, len(round_.completions), models[0].config.hidden_size
        flat = torch.zeros(2 * tokens + rollouts * hidden, device=self.state.device)
        logprobs, entropy = flat[:tokens], flat[tokens : 2 * tokens]
        embeddings = flat[2 * tokens :].view(rollouts, hidden)
        batches = [batch for part in parts for batch in part]
        passed = run_schedule(models, batches, partial(policy_step.score_step, step=step), forward_only=True)
        for places, values, entropies, numbers, rows in passed:
            logprobs[places], entropy[places] = values, entropies
            embeddings[numbers] = rows
        self._from_last_stage(flat)
        step.old_logprobs = logprobs
        step.engine_logprobs = round_.engine_logprobs().to(self.state.device)
        return ScoredRound(round_, parts, step, entropy, embeddings)

    def reference_logprobs(self, models: list[torch.nn.Module], scored: ScoredRound) -> torch.Tensor:
        """fp32 [K] under the weights that `models` have now."""
        logprobs = torch.zeros(scored.round_.num_tokens, device=self.state.device)
        batches = [batch for part in scored.parts for batch in part]
        function = partial(policy_step.score_step, step=scored.step, embeddings=False)
        for places, values, *_ in run_schedule(models, batches, function, forward_only=True):
            logprobs[places] = values
        return self._from_last_stage(logprobs)

    def _from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """`values` as the last pipeline stage has them, on every stage (in place)."""
        if self.state.pp_size > 1:
            dist.broadcast(values, src=self.state.last_stage_rank, group=self.state.groups.pp)
        return values

    # -- rewards -----------------------------------------------------------------------------------------------------

    def reward(self, scored: ScoredRound) -> None:
        """Rewards, advantages and spread of all ranks' rollouts: the same computation on every rank."""
        config, round_ = self.config, scored.round_
        group, gen_emb = round_.num_generations, self.special.gen_emb
        completions = round_.completions
        missing = [completion is None or gen_emb not in completion.token_ids for completion in completions]
        cut_off = [completion is not None and completion.finish_reason == "length" for completion in completions]
        flags = torch.tensor([missing, cut_off]).long()
        facts = torch.stack([round_.lengths, round_.valid.long(), 1 - flags[0], flags[1]], dim=1)
        lengths, valid, embedded, scored.cut_off = self.of_all_ranks(facts.to(self.state.device), round_).unbind(-1)
        targets = torch.tensor([pair.positive.sequence.target_id for pair in round_.pairs])
        targets = self.of_all_ranks(targets.repeat(2).repeat_interleave(group).to(self.state.device), round_)
        responses, scored.datasets = self._texts(round_)
        scored.rollouts = StepRollouts(
            responses=responses,
            lengths=lengths,
            embeddings=self.of_all_ranks(scored.embeddings, round_),
            valid=valid.bool(),
            has_embedding=embedded.bool(),
            target_ids=targets[1, ::group],
        )
        scored.rewards = score_step(
            scored.rollouts,
            config.reward,
            num_generations=group,
            max_completion_length=config.rollout.max_completion_length,
        )
        total, valid = scored.rewards.total, scored.rollouts.valid
        scored.advantages = group_advantages(total, group, valid=valid)
        scored.spread = groups_with_spread(total, group, valid=valid)
        mine = self.of_this_rank(scored.advantages, round_)
        scored.step.advantages = mine[round_.rollout_of_token().to(mine.device)]

    def _texts(self, round_: Round) -> tuple[list[list[str]], list[str]]:
        """Of all ranks: responses [2][N * G], "" for a failed one, without the token that stopped it; data sets [N]."""
        mine = [self.text(completion) for completion in round_.completions]
        places = [(pair.slot, pair.dataset) for pair in round_.pairs]
        parts: list[Any] = [None] * self.state.dp_size
        dist.all_gather_object(parts, (places, mine), group=self.state.groups.dp)
        group, count = round_.num_generations, sum(len(places) for places, _ in parts)
        found, datasets = [[""] * (count * group) for _ in range(2)], [""] * count
        for places, texts in parts:
            for slot, name in places:
                datasets[slot] = name
            for number, text in enumerate(texts):
                side, rest = divmod(number, len(places) * group)
                found[side][places[rest // group][0] * group + rest % group] = text
        return found, datasets

    def text(self, completion: Completion | None) -> str:
        """A response as text, special tokens included, up to and without `<|im_end|>`; "" for a failed one."""
        ids = [] if completion is None else completion.token_ids
        ends = ids and ids[-1] == self.special.im_end
        return self.tokenizer.decode(ids[:-1] if ends else ids, skip_special_tokens=False)

    def of_all_ranks(self, values: torch.Tensor, round_: Round) -> torch.Tensor:
        """[2 * P * G, ...] of this data-parallel rank -> [2, N * G, ...] in the order of global slots."""
        group, count = round_.num_generations, len(round_.pairs)
        whole = values.new_zeros(2, count * self.state.dp_size * group, *values.shape[1:])
        whole[:, self._columns(round_)] = values.view(2, count * group, *values.shape[1:])
        dist.all_reduce(whole, group=self.state.groups.dp)
        return whole

    def of_this_rank(self, whole: torch.Tensor, round_: Round) -> torch.Tensor:
        """The other way: [2, N * G] -> [2 * P * G]."""
        return whole[:, self._columns(round_).to(whole.device)].flatten()

    def _columns(self, round_: Round) -> torch.Tensor:
        slots = torch.tensor([pair.slot for pair in round_.pairs], dtype=torch.int64)
        columns = slots[:, None] * round_.num_generations + torch.arange(round_.num_generations)
        return columns.flatten()

    # -- numbers -----------------------------------------------------------------------------------------------------

    def summary(self, scored: ScoredRound) -> dict[str, float]:
        """What the log says of a step's rollouts; means over all valid ones."""
        rewards, rollouts, valid = scored.rewards, scored.rollouts, scored.rollouts.valid
        count = valid.sum().clamp(min=1)

        def mean(values: torch.Tensor) -> float:
            return float(torch.where(valid, values.float(), 0.0).sum() / count)

        group = scored.round_.num_generations
        std = _group_std(rewards.total, valid, group)
        record = {"reward": mean(rewards.total)} | self._by_dataset(scored)
        record |= {f"reward_{name.replace(':', '.')}": mean(part) for name, part in rewards.components.items()}
        record |= {
            "ranking": mean(rewards.ranking),
            "margin": mean(rewards.margin),
            "reward_std": float(std.mean()),
            "zero_spread_share": float(1.0 - scored.spread.float().mean()),
            "response_length": mean(rollouts.lengths),
            "cut_off_share": mean(scored.cut_off),
            "missing_gen_emb_share": mean(~rollouts.has_embedding),
            "failed_share": float((~valid).float().mean()),
            "generated_tokens": float(rollouts.lengths.sum()),
        }
        return record | {"entropy": self._mean_of_tokens(scored.entropy)} | self.mismatch(scored)

    def _by_dataset(self, scored: ScoredRound) -> dict[str, float]:
        """Mean reward of each data set's pairs; the mean over all moves with what a step drew, too."""
        group, found = scored.round_.num_generations, {}
        for name in dict.fromkeys(scored.datasets):
            chosen = torch.tensor([each == name for each in scored.datasets]).repeat_interleave(group)
            chosen = scored.rollouts.valid & chosen.to(scored.rollouts.valid.device)
            if chosen.any():
                found[f"dataset_reward/{name or 'unnamed'}"] = float(scored.rewards.total[chosen].mean())
        return found

    def mismatch(self, scored: ScoredRound) -> dict[str, float]:
        """How far trainer and engine are apart on the tokens of all ranks."""
        cap = self.config.policy.importance_sampling_cap
        sums, ratios = mismatch_sums(scored.step.old_logprobs, scored.step.engine_logprobs, cap)
        dist.all_reduce(sums, group=self.state.groups.dp)
        summary = mismatch_summary(sums.cpu(), self._gathered(ratios).cpu(), cap)
        return {
            "mismatch_mean": summary["mean_abs"],
            "mismatch_k3": summary["k3"],
            "mismatch_p99": summary["ratio_p99"],
            "mismatch_p99_truncated": summary["ratio_p99_truncated"],
        }

    def _mean_of_tokens(self, values: torch.Tensor) -> float:
        both = torch.tensor([float(values.sum()), values.numel()], dtype=torch.float64, device=values.device)
        dist.all_reduce(both, group=self.state.groups.dp)
        return float(both[0] / both[1].clamp(min=1))

    def _gathered(self, values: torch.Tensor) -> torch.Tensor:
        """[n], of any n on each data-parallel rank, in one."""
        sizes = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(self.state.dp_size)]
        dist.all_gather(sizes, torch.tensor([values.numel()], device=values.device), group=self.state.groups.dp)
        longest = int(max(sizes))
        padded = torch.nn.functional.pad(values, (0, longest - values.numel()))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.state.groups.dp)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def _group_std(rewards: torch.Tensor, valid: torch.Tensor, group: int) -> torch.Tensor:
    """[2, N] unbiased standard deviation of each group's valid rewards; 0 for fewer than two."""
    grouped, valid = rewards.view(2, -1, group), valid.view(2, -1, group)
    count = valid.sum(-1, keepdim=True)
    centred = torch.where(valid, grouped - (grouped * valid).sum(-1, keepdim=True) / count.clamp(min=1), 0.0)
    return (centred.square().sum(-1) / (count.squeeze(-1) - 1).clamp(min=1)).sqrt()
