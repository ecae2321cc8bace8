"""Held-out retrieval in gen mode while GRPO runs: greedy responses of both sides, hit@1 within each data set."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from umer1.data.bad_samples import BadSample
from umer1.data.schema import PromptPair
from umer1.distributed.parallel import ParallelState
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.rl.scoring import StepRollouts, score_step
from umer1.rl.types import Completion, Request
from umer1.training.batches import raise_together, unlike_first
from umer1.training.policy_batches import Round
from umer1.training.policy_config import GRPOConfig
from umer1.training.prompt_source import open_prompts, share_pairs
from umer1.training.scoring import Scorer


class Heldout:
    """Pairs of --eval-data-path; each data-parallel rank takes every dp_size-th of them."""

    def __init__(self, config: GRPOConfig, directory: HFDirectory, state: ParallelState):
        self.config, self.state = config, state
        self.is_source = state.tp_rank == 0 and state.pp_rank == 0
        self.dataset, failure = None, None
        self.bad: list[str] = []  # why pairs of this rank cannot be used
        if self.is_source:
            try:
                self.dataset = open_prompts(
                    config, directory, config.heldout.eval_data_path, config.heldout.eval_data_root
                )
            except Exception as error:
                failure = str(error)
        raise_together(failure)
        raise_together(unlike_first(self.dataset.contents, state) if self.is_source else None)

    def chunks(self):
        """This rank's pairs, as many at once as in a training step; the same number of chunks on all ranks."""
        size = self.config.data.global_batch_size // self.state.dp_size
        count = torch.tensor([len(self.dataset) if self.is_source else 0], device=self.state.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        per_rank = -(-int(count) // self.state.dp_size)
        for start in range(0, per_rank, size):
            places = range(start, min(start + size, per_rank))
            numbers = [place * self.state.dp_size + self.state.dp_rank for place in places]
            pairs, bad = self._read([number for number in numbers if number < int(count)])
            pairs, bad = share_pairs(pairs, bad, self.state)
            yield pairs, bad or 0

    def _read(self, indices: list[int]) -> tuple[list[PromptPair], int]:
        pairs, bad = [], 0
        for index in indices if self.is_source else []:
            try:
                pairs.append(self.dataset[index])
            except BadSample as error:
                bad += 1
                self.bad.append(f"record {index}: {error.cause}: {error.detail}")
        return pairs, bad


def requests_of(pairs: list[PromptPair], prefix: str) -> list[Request]:
    """One request a prompt: all queries, then all positives.  Keys name what is sampled, whatever rank samples it."""
    return [
        Request(f"{prefix}/{pair.slot if pair.slot >= 0 else pair.index}/{side}", prompt)
        for side in range(2)
        for pair, prompt in ((pair, pair.positive if side else pair.query) for pair in pairs)
    ]


def evaluate(heldout: Heldout, scorer: Scorer, models: list[torch.nn.Module], answer: Any) -> dict[str, float]:
    """The record of one evaluation, on every rank.  answer: requests -> greedy completions, one each.

    hit@1: the positive with the largest cosine, among the distinct positives of the query's data set, is the query's
    own (or an equal one).  A response without <gen_emb> is a miss; such a positive is nobody's answer.
    UserError on all ranks when no pair can be used at all.
    """
    rows: list[dict[str, Any]] = []
    unreadable = 0
    for pairs, bad in heldout.chunks():
        unreadable += bad
        completions: list[Completion | None] = [given[0] for given in answer(requests_of(pairs, "eval"))]
        if not pairs:
            continue
        round_ = Round(pairs, completions, 1)
        embeddings = scorer.score(models, round_).embeddings.cpu()
        for place, pair in enumerate(pairs):
            sides = (place, len(pairs) + place)
            rows.append(
                {
                    "index": pair.index,
                    "dataset": pair.dataset,
                    "target": pair.positive.sequence.target_id,
                    "embeddings": [embeddings[number].numpy() for number in sides],
                    "usable": [_has(completions[number], scorer.special.gen_emb) for number in sides],
                    "completions": [completions[number] for number in sides],
                    "texts": [scorer.text(completions[number]) for number in sides],
                }
            )
    parts: list[Any] = [None] * heldout.state.dp_size
    dist.all_gather_object(parts, (rows, unreadable), group=heldout.state.groups.dp)
    everything = sorted((row for part, _ in parts for row in part), key=lambda row: row["index"])
    path = heldout.config.heldout.eval_data_path
    why = heldout.bad[0] if heldout.bad else "the file is empty"
    raise_together(None if everything else f"eval_data_path={path}: no pair of it can be used; {why}")
    record = summary(everything, sum(bad for _, bad in parts))
    return {"eval_reward": heldout_reward(everything, heldout.config), **record}


def heldout_reward(rows: list[dict[str, Any]], config: GRPOConfig) -> float:
    """Mean reward of the responses, each data set's pairs compared with each other.

    A step's reward depends on which pairs the step drew; here they are the same every time.
    """
    total, count = 0.0, 0
    for name in dict.fromkeys(row["dataset"] for row in rows):
        members = [row for row in rows if row["dataset"] == name]
        given = [[row["completions"][side] for row in members] for side in range(2)]
        valid = torch.tensor([[completion is not None for completion in side] for side in given])
        rollouts = StepRollouts(
            responses=[[row["texts"][side] for row in members] for side in range(2)],
            lengths=torch.tensor([[len(one.token_ids) if one else 0 for one in side] for side in given]),
            embeddings=torch.from_numpy(np.array([[row["embeddings"][side] for row in members] for side in range(2)])),
            valid=valid,
            has_embedding=torch.tensor([[row["usable"][side] for row in members] for side in range(2)]),
            target_ids=torch.tensor([row["target"] for row in members]),
        )
        rewards = score_step(
            rollouts,
            replace(config.reward, comparison_pairs=len(members)),
            num_generations=1,
            max_completion_length=config.rollout.max_completion_length,
        )
        total += float(rewards.total.sum())
        count += int(valid.sum())
    return total / max(count, 1)


def _has(completion: Completion | None, token: int) -> bool:
    return completion is not None and token in completion.token_ids


def summary(rows: list[dict[str, Any]], unreadable: int) -> dict[str, float]:
    """hit@1 over all queries, mean margin between own and other positives, lengths, and what was missing."""
    hits, margins = [], []
    for name in dict.fromkeys(row["dataset"] for row in rows):
        members = [row for row in rows if row["dataset"] == name]
        pool = {row["target"]: row["embeddings"][1] for row in reversed(members) if row["usable"][1]}
        targets = list(pool)
        stacked = torch.tensor([pool[target].tolist() for target in targets])
        for row in members:
            hits.append(0.0)
            if not row["usable"][0] or not targets:
                continue
            similarity = stacked @ torch.from_numpy(row["embeddings"][0])
            own = torch.tensor([target == row["target"] for target in targets])
            hits[-1] = float(own[similarity.argmax()])
            if own.any() and not own.all():
                margins.append(float(similarity[own].mean() - similarity[~own].mean()))
    lengths = [len(given.token_ids) for row in rows for given in row["completions"] if given is not None]
    missing = [not usable for row in rows for usable in row["usable"]]
    return {
        "eval_gen_hit1": _mean(hits),
        "eval_gen_margin": _mean(margins),
        "eval_response_length": _mean(lengths),
        "eval_missing_gen_emb_share": _mean(missing),
        "eval_queries": len(rows),
        "eval_unreadable": unreadable,
    }


def _mean(values: list) -> float:
    return sum(values) / len(values) if values else 0.0
