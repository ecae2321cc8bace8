"""GRPO's contract with megatron's schedule: forward passes that score rollouts, and the one that learns from them.

As in forward_step.py every term is divided by its own count before backward, and gradients are SUMMED over ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from umer1.data.schema import Sequence
from umer1.losses.grpo import importance_weights, token_losses, token_statistics
from umer1.models.embedding import read_embedding
from umer1.models.qwen2_vl.frames import VisionFeatures
from umer1.models.qwen2_vl.weights import unwrap
from umer1.ops.linear_cross_entropy import linear_logprobs
from umer1.training.policy_batches import PolicyBatch, Round
from umer1.training.policy_config import PolicyConfig


@dataclass(slots=True)
class VisionCache:
    """Features of each prompt's pictures; with a frozen ViT they are made once for all rollouts and passes."""

    round_: Round
    train_vision: bool
    device: torch.device
    kept: dict[int, VisionFeatures] = field(default_factory=dict)  # by prompt number

    def features(self, core: torch.nn.Module, prompts: list[int]) -> VisionFeatures:
        """Of the prompts in order, repeats included."""
        found = self.kept if not self.train_vision else {}
        missing = [number for number in dict.fromkeys(prompts) if number not in found]
        if missing:
            if not self.train_vision:  # a micro-batch has few prompts: ranks that divide them take the next ones too
                missing += self._unseen(missing)[: (core.vision.num_ranks - 1) * len(missing)]
            sequences = [self._sequence(number) for number in missing]
            pixels = torch.cat([sequence.pixel_values for sequence in sequences]).to(self.device)
            grids = torch.cat([sequence.grid_thw for sequence in sequences]).to(self.device)
            made = core.vision_forward(pixels, grids)
            counts = [int(sequence.grid_thw[:, 0].sum()) for sequence in sequences]
            found.update(zip(missing, made.split(counts), strict=True))
        return VisionFeatures.join([found[number] for number in prompts])

    def _sequence(self, number: int) -> Sequence:
        return self.round_.prompt(number * self.round_.num_generations).sequence

    def _unseen(self, but: list[int]) -> list[int]:
        """Prompts with pictures that have no features yet, in order."""
        numbers = [number for number in range(2 * len(self.round_.pairs)) if number not in self.kept]
        return [number for number in numbers if number not in but and len(self._sequence(number).grid_thw)]


@dataclass(slots=True)
class PolicyStep:
    """What the micro-batches of one round share.  K flat tokens, R = 2 * P * G rollouts; see policy_batches.py."""

    config: PolicyConfig
    temperature: float
    vision: VisionCache
    old_logprobs: torch.Tensor | None = None  # fp32 [K]
    ref_logprobs: torch.Tensor | None = None  # fp32 [K]; None without a KL term
    engine_logprobs: torch.Tensor | None = None  # fp32 [K]
    advantages: torch.Tensor | None = None  # fp32 [K], of each token's response
    weights: torch.Tensor | None = None  # fp64 [K]: what each token counts in the loss


def run_policy(batch: PolicyBatch, model: torch.nn.Module, step: PolicyStep) -> torch.Tensor:
    """One forward of one (virtual) stage."""
    core = unwrap(model)
    vision: dict[str, Any] = {"vision_rows": batch.vision_rows}
    if core.pre_process and batch.vision_prompts:
        vision["vision_features"] = step.vision.features(core, batch.vision_prompts)
    return model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, **vision)


def _logprobs(hidden: torch.Tensor, batch: PolicyBatch, core: torch.nn.Module, step: PolicyStep, entropy: bool):
    """(log-probs, entropy) at the temperature of sampling over the real vocabulary, nothing banned, as the engine's."""
    rows = hidden.index_select(0, batch.rows)
    return core.through_head(linear_logprobs, rows, batch.labels, temperature=step.temperature, entropy=entropy)


def score_step(iterator: Iterator[PolicyBatch], model: torch.nn.Module, step: PolicyStep, embeddings: bool = True):
    """Forward alone: (tokens, log-probs, entropies, rollouts, embeddings) of the micro-batch, on the last stage.

    embeddings False: log-probs alone, for the reference.
    """
    batch = next(iterator)
    hidden = run_policy(batch, model, step)

    def collect(hidden: torch.Tensor, non_loss_data: bool = True):
        logprobs, entropy = _logprobs(hidden, batch, unwrap(model), step, entropy=embeddings)
        rows = read_embedding(hidden, batch.gen_rows) if embeddings else None
        return batch.tokens, logprobs, entropy, batch.rollouts, rows

    return hidden, collect


def update_step(iterator: Iterator[PolicyBatch], model: torch.nn.Module, step: PolicyStep):
    """The pass with gradients."""
    batch = next(iterator)
    hidden = run_policy(batch, model, step)
    return hidden, partial(policy_loss, batch=batch, model=model, step=step)


def policy_loss(hidden: torch.Tensor, *, batch: PolicyBatch, model: torch.nn.Module, step: PolicyStep):
    """This micro-batch's share of the global loss, in the form megatron's schedule takes.

    hidden: [T, H].  Returns (scalar to run backward from, a token count megatron does not use, numbers): numbers is
    fp32 [1 + 5], the share of the loss and `token_statistics`, which add up over micro-batches and ranks.
    """
    core, config, chosen = unwrap(model), step.config, batch.tokens
    logprobs, _ = _logprobs(hidden, batch, core, step, entropy=False)
    old, advantages = step.old_logprobs[chosen], step.advantages[chosen]
    ref = None if step.ref_logprobs is None else step.ref_logprobs[chosen]
    cap = config.importance_sampling_cap
    losses = token_losses(
        logprobs,
        old,
        ref,
        advantages,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        beta=config.beta,
        importance=None if cap is None else importance_weights(old, step.engine_logprobs[chosen], cap),
    )
    scalar = (losses * step.weights[chosen].to(losses.dtype)).sum()
    statistics = token_statistics(
        logprobs, old, ref, advantages, epsilon=config.epsilon, epsilon_high=config.epsilon_high
    )
    numbers = torch.cat([scalar.detach().float().view(1), statistics])
    return scalar, torch.zeros((), dtype=torch.int, device=hidden.device), numbers
