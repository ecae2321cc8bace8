"""Rollouts as the trainer sees them: teacher-forced sequences, packed into micro-batches that keep their places.

A round of a data-parallel rank is P pairs with G responses on either side.  Rollout number (side * P + pair) * G +
generation; the tokens of all responses, in that order, are the flat tokens [K] that log-probs are kept in.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from umer1.data.packing import plan_micro_batches
from umer1.data.schema import Movable, Prompt, PromptPair, Sequence
from umer1.models.embedding import last_index
from umer1.models.qwen2_vl.positions import next_position
from umer1.rl.types import Completion

_PADDING_TOKEN = 0  # any row of the table: nothing attends to the padding segment


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Token ids that mean something here."""

    im_end: int
    gen_emb: int
    vision_pads: tuple[int, int]  # image, video


@dataclass(slots=True)
class Round:
    """Rollouts of P pairs on this data-parallel rank; the same on all ranks of a copy of the model."""

    pairs: list[PromptPair]
    completions: list[Completion | None]  # [2 * P * G]; None where the rollout failed
    num_generations: int
    starts: np.ndarray = field(init=False)  # int64 [2 * P * G + 1]: where each response starts in the flat tokens

    def __post_init__(self):
        lengths = [0 if completion is None else len(completion.token_ids) for completion in self.completions]
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    @property
    def num_tokens(self) -> int:
        """K"""
        return int(self.starts[-1])

    @property
    def lengths(self) -> torch.Tensor:
        """int64 [2 * P * G], tokens of each response."""
        return torch.from_numpy(np.diff(self.starts))

    @property
    def valid(self) -> torch.Tensor:
        """bool [2 * P * G]: the rollout did not fail."""
        return torch.tensor([completion is not None for completion in self.completions], dtype=torch.bool)

    def pair_of(self, rollout: int) -> int:
        """0 to P - 1: the place in `pairs`."""
        return rollout // self.num_generations % len(self.pairs)

    def side_of(self, rollout: int) -> int:
        """0 for the query's, 1 for the positive's."""
        return rollout // (self.num_generations * len(self.pairs))

    def prompt_number(self, rollout: int) -> int:
        """0 to 2P - 1: rollouts of one prompt have one number."""
        return rollout // self.num_generations

    def prompt(self, rollout: int) -> Prompt:
        """What the rollout answers."""
        pair = self.pairs[self.pair_of(rollout)]
        return pair.positive if self.side_of(rollout) else pair.query

    def engine_logprobs(self) -> torch.Tensor:
        """fp32 [K], as the engine gave them."""
        parts = [completion.logprobs for completion in self.completions if completion is not None]
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0)

    def rollout_of_token(self) -> torch.Tensor:
        """int64 [K]: which rollout each flat token is of."""
        return torch.arange(len(self.completions)).repeat_interleave(self.lengths)


@dataclass(slots=True)
class PolicyBatch(Movable):
    """A micro-batch of S rollouts in T token slots (a padding segment, if any, comes last); R response tokens."""

    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [3, T]
    cu_seqlens: torch.Tensor  # int32 [segments + 1]
    max_seqlen: int
    vision_rows: torch.Tensor  # int64 [n]: rows that take vision features
    vision_prompts: list[int]  # numbers of the prompts whose features they take, in order, repeated as rollouts are
    rows: torch.Tensor  # int64 [R]: rows whose logits choose a response token
    labels: torch.Tensor  # int64 [R]: that token
    tokens: torch.Tensor  # int64 [R]: its place in the round's flat tokens
    rollouts: list[int]  # [S], numbers in the round
    gen_rows: torch.Tensor  # int64 [S]: row of the response's last <gen_emb>; of its last token when there is none


def teacher_forced(prompt: Sequence, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids [L], position_ids [3, L]) of a prompt and its response."""
    first = next_position(prompt.position_ids)
    added = torch.arange(first, first + len(token_ids)).expand(3, -1)
    ids = torch.cat([prompt.input_ids, torch.tensor(token_ids, dtype=torch.int64)])
    return ids, torch.cat([prompt.position_ids, added], dim=1)


def plan(
    round_: Round,
    pairs: list[int],
    *,
    micro_batch_size: int,
    max_tokens: int | None,
    max_patches: int | None,
    multiple_of: int,
) -> list[list[int]]:
    """Rollouts of `pairs` in micro-batches, rollouts of one prompt together as far as the budgets let them.

    max_patches counts a prompt's patches once for each of its rollouts: the merger runs on each.
    """
    count, group = len(round_.pairs), round_.num_generations
    rollouts = [
        (side * count + pair) * group + generation
        for side in range(2)
        for pair in pairs
        for generation in range(group)
        if round_.completions[(side * count + pair) * group + generation] is not None
    ]
    lengths = [len(round_.prompt(r).sequence) + len(round_.completions[r].token_ids) for r in rollouts]
    patches = [int(round_.prompt(r).sequence.grid_thw.prod(-1).sum()) for r in rollouts]
    places = plan_micro_batches(lengths, patches, micro_batch_size, max_tokens, max_patches, multiple_of=multiple_of)
    return [[rollouts[place] for place in batch] for batch in places]


def pack_rollouts(round_: Round, rollouts: list[int], special: SpecialIds, pad_to_multiple: int = 1) -> PolicyBatch:
    """One micro-batch.  No rollouts: the first prompt alone, which nothing is learnt from (a rank must take part)."""
    chosen = [(r, round_.prompt(r).sequence, round_.completions[r].token_ids) for r in rollouts]
    if not chosen:
        chosen = [(0, round_.pairs[0].query.sequence, [])]
    ids, positions, bounds, vision_rows, vision_prompts, rows, tokens, gen_rows = [], [], [0], [], [], [], [], []
    pads = torch.tensor(special.vision_pads)
    for rollout, prompt, response in chosen:
        start, length = bounds[-1], len(prompt)
        sequence_ids, sequence_positions = teacher_forced(prompt, response)
        ids.append(sequence_ids)
        positions.append(sequence_positions)
        bounds.append(start + len(sequence_ids))
        if len(prompt.grid_thw):
            vision_rows.append(torch.isin(prompt.input_ids, pads).nonzero().flatten() + start)
            vision_prompts.append(round_.prompt_number(rollout))
        rows.append(torch.arange(len(response)) + start + length - 1)
        tokens.append(torch.arange(len(response)) + int(round_.starts[rollout]))
        gen = last_index(sequence_ids[length:], special.gen_emb)
        gen_rows.append(start + length + gen if gen >= 0 else bounds[-1] - 1)
    labels = [sequence_ids[len(prompt) :] for sequence_ids, (_, prompt, _) in zip(ids, chosen, strict=True)]
    if padding := -bounds[-1] % pad_to_multiple:
        ids.append(torch.full((padding,), _PADDING_TOKEN))
        positions.append(torch.zeros(3, padding, dtype=torch.int64))
        bounds.append(bounds[-1] + padding)
    return PolicyBatch(
        input_ids=torch.cat(ids),
        position_ids=torch.cat(positions, dim=1),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=int(np.diff(bounds).max()),
        vision_rows=torch.cat([torch.zeros(0, dtype=torch.int64), *vision_rows]),
        vision_prompts=vision_prompts,
        rows=torch.cat(rows),
        labels=torch.cat(labels),
        tokens=torch.cat(tokens),
        rollouts=list(rollouts),
        gen_rows=torch.tensor(gen_rows[: len(rollouts)], dtype=torch.int64),
    )
