"""Which data-parallel rank learns from which rollouts: responses differ in length, prompts in pictures.

A pair goes with all of its responses, after they were sampled and before anything is computed from them, and keeps its
slot: rewards and mini-batches go by slots, so they do not depend on where a pair is.
"""

from dataclasses import replace

import numpy as np
import torch

from umer1.distributed.parallel import ParallelState
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.training.exchange import costs_of_all_ranks, exchange, shared_out
from umer1.training.flops import sequence_flops, training_flops
from umer1.training.policy_batches import Round
from umer1.training.policy_config import GRPOConfig


def pair_costs(round_: Round, config: Qwen2VLConfig, train_vision: bool) -> list[float]:
    """FLOPs of learning once from each pair's rollouts; the ViT sees a prompt once for all of its responses."""
    group, count, costs = round_.num_generations, len(round_.pairs), []
    for place, pair in enumerate(round_.pairs):
        rollouts = [(side * count + place) * group + number for side in range(2) for number in range(group)]
        rollouts = [number for number in rollouts if round_.completions[number] is not None]
        responses = [len(round_.completions[number].token_ids) for number in rollouts]
        prompts = [len(round_.prompt(number).sequence) for number in rollouts]
        grids = torch.cat([pair.query.sequence.grid_thw, pair.positive.sequence.grid_thw])
        lengths = torch.tensor(prompts, dtype=torch.int64) + torch.tensor(responses, dtype=torch.int64)
        costs.append(training_flops(sequence_flops(lengths, grids, sum(responses), config), train_vision))
    return costs


class RolloutBalance:
    """Shares rollouts out over data-parallel ranks.  All ranks of a copy of the model do the same; collective."""

    def __init__(self, config: GRPOConfig, model: Qwen2VLConfig, state: ParallelState):
        self.config, self.model, self.state = config, model, state
        self.mini_batches = config.policy.mini_batches

    def shared_out(self, round_: Round) -> Round:
        """The pairs that this rank shall learn from, with their rollouts; each rank keeps its number in a mini-batch.

        round_: consecutive slots, as they are read; their number is a multiple of mini_batches.
        """
        if not self.config.data.balance_batch or self.state.dp_size == 1:
            return round_
        costs = costs_of_all_ranks(self._costs(round_), self.state.groups.dp, self.state.device)
        owners = np.empty(costs.shape, dtype=np.int64)
        for number in range(self.mini_batches):
            owners[:, number :: self.mini_batches] = shared_out(costs[:, number :: self.mini_batches])
        group, count = round_.num_generations, len(round_.pairs)
        items = []
        for place, pair in enumerate(round_.pairs):
            answers = [round_.completions[first : first + group] for first in (place * group, (count + place) * group)]
            # The pictures were for the engine, which has answered.
            query, positive = (replace(prompt, images=(), videos=()) for prompt in (pair.query, pair.positive))
            items.append((replace(pair, query=query, positive=positive), answers))
        items = exchange(items, owners, self.state.groups.dp, self.state.device)
        completions = [completion for side in range(2) for _, answers in items for completion in answers[side]]
        return Round([pair for pair, _ in items], completions, group)

    def imbalance(self, round_: Round) -> float:
        """Largest over mean modelled cost of the ranks, who wait for each other after each mini-batch."""
        loads = np.zeros(self.mini_batches)
        np.add.at(loads, [pair.slot % self.mini_batches for pair in round_.pairs], self._costs(round_))
        loads = costs_of_all_ranks(loads.tolist(), self.state.groups.dp, self.state.device)
        mean = float(loads.mean(0).sum())
        return float(loads.max(0).sum()) / mean if mean > 0 else 1.0

    def _costs(self, round_: Round) -> list[float]:
        return pair_costs(round_, self.model, self.config.model.train_vision)
