"""Every --log-rollouts steps a few prompts with all of their responses, rewards and advantages, in a file."""

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from umer1.files import dispensable
from umer1.rl.record import SIDES, RolloutEntry, ScoredCompletion, write_rollouts
from umer1.training.scoring import ScoredRound

if TYPE_CHECKING:
    from umer1.training.grpo import GRPOTrainer


def log_rollouts(trainer: "GRPOTrainer", scored: ScoredRound) -> None:
    """SAVE/rollouts/iter_*: the responses of the first pairs of the step that has just ended; collective."""
    config, state = trainer.config, trainer.state
    every, save = config.rollout.log_rollouts, config.checkpoint.save
    if not every or not save or not (trainer.iteration == 1 or trainer.iteration % every == 0):
        return
    entries = []
    if trainer.source.is_source:
        for place, pair in enumerate(scored.round_.pairs):
            if pair.slot < config.rollout.log_rollouts_prompts:
                entries += [_entry(trainer, scored, place, side) for side in range(2)]
    parts: list[Any] = [None] * state.world_size
    dist.all_gather_object(parts, entries)
    if state.rank == 0:
        gathered = [entry for part in parts for entry in part]
        gathered.sort(key=lambda entry: (entry.slot, SIDES.index(entry.side)))
        with dispensable(f"rollouts of iteration {trainer.iteration}"):
            write_rollouts(f"{save}/rollouts", gathered)


def _entry(trainer: "GRPOTrainer", scored: ScoredRound, place: int, side: int) -> RolloutEntry:
    round_, pair = scored.round_, scored.round_.pairs[place]
    group = round_.num_generations
    first = (side * len(round_.pairs) + place) * group
    prompt = round_.prompt(first).sequence
    return RolloutEntry(
        iteration=trainer.iteration,
        slot=pair.slot,
        side=SIDES[side],
        dataset=pair.dataset,
        index=pair.index,
        prompt=trainer.directory.tokenizer.decode(prompt.input_ids.tolist(), skip_special_tokens=False),
        prompt_tokens=len(prompt),
        completions=[_completion(trainer, scored, first + g, pair.slot * group + g, side) for g in range(group)],
    )


def _completion(trainer: "GRPOTrainer", scored: ScoredRound, number: int, column: int, side: int) -> ScoredCompletion:
    """Rollout `number` of this rank, `column` of all ranks'."""
    completion = scored.round_.completions[number]
    if completion is None:
        return ScoredCompletion(status="failed")
    tokens = slice(int(scored.round_.starts[number]), int(scored.round_.starts[number + 1]))
    return ScoredCompletion(
        status="ok" if scored.rollouts.has_embedding[side, column] else "missing_gen_emb",
        finish_reason=completion.finish_reason,
        text=trainer.scorer.text(completion),
        token_ids=completion.token_ids,
        logprobs=completion.logprobs.tolist(),
        old_logprobs=scored.step.old_logprobs[tokens].tolist(),
        rewards={name: float(part[side, column]) for name, part in scored.rewards.components.items()}
        | {
            "ranking": float(scored.rewards.ranking[side, column]),
            "margin": float(scored.rewards.margin[side, column]),
        },
        total=float(scored.rewards.total[side, column]),
        advantage=float(scored.advantages[side, column]),
    )
