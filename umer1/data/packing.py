"""Many sequences in one row of tokens, and which pairs go together.

Both sides of a pair (and its hard negatives) stay in one micro-batch.  A budget in tokens bounds the decoder's memory,
one in patches the ViT's.
"""

from dataclasses import replace

import numpy as np
import torch

from umer1.data.balancing import spread
from umer1.data.processor import IGNORE
from umer1.data.schema import EncodedPair, PackedBatch, Sequence

_PADDING_TOKEN = 0  # any row of the table: nothing attends to the padding segment and nothing of it is supervised


def sequences_of(pair: EncodedPair) -> list[Sequence]:
    """Query, positive, negatives."""
    return [pair.query, pair.positive, *pair.negatives]


def pair_cost(pair: EncodedPair) -> tuple[int, int]:
    """(tokens, patches) of all sides."""
    sides = sequences_of(pair)
    return sum(len(side) for side in sides), sum(len(side.pixel_values) for side in sides)


def plan_micro_batches(
    lengths: list[int],
    patches: list[int],
    micro_batch_size: int,
    max_tokens: int | None = None,
    max_patches: int | None = None,
    *,
    multiple_of: int = 1,
    costs: list[float] | None = None,
) -> list[list[int]]:
    """Places of the pairs in each micro-batch: consecutive ones, as many as the limits allow.

    costs: of each pair; then no longer consecutive ones, but such that all micro-batches cost about the same, and there
    are as few of them as can be found, never more than consecutive ones give.

    lengths, patches: per pair, all sides together.  A pair that exceeds a budget alone is a micro-batch of its own.
    multiple_of: split the heaviest micro-batches until their number is a multiple (megatron's interleaved schedule);
    as far as there are pairs to split.
    """
    plan: list[list[int]] = []
    tokens = vision = 0
    for place, (length, patch_count) in enumerate(zip(lengths, patches, strict=True)):
        fits = (
            plan
            and len(plan[-1]) < micro_batch_size
            and (max_tokens is None or tokens + length <= max_tokens)
            and (max_patches is None or vision + patch_count <= max_patches)
        )
        if fits:
            plan[-1].append(place)
        else:
            plan.append([place])
            tokens = vision = 0
        tokens += length
        vision += patch_count
    while len(plan) % multiple_of and len(plan) < len(lengths):
        heaviest = max(
            (i for i in range(len(plan)) if len(plan[i]) > 1), key=lambda i: sum(lengths[p] for p in plan[i])
        )
        places = plan[heaviest]
        plan[heaviest : heaviest + 1] = [places[: len(places) // 2], places[len(places) // 2 :]]
    if costs is None or len(plan) == 1:
        return plan

    def fit(places: list[int]) -> bool:
        return len(places) == 1 or (
            len(places) <= micro_batch_size
            and (max_tokens is None or sum(lengths[place] for place in places) <= max_tokens)
            and (max_patches is None or sum(patches[place] for place in places) <= max_patches)
        )

    fewest = -(-len(lengths) // micro_batch_size)
    for count in range(-(-fewest // multiple_of) * multiple_of, len(plan), multiple_of):
        if (found := spread(costs, count, fit)) is not None:
            return found
    found = spread(costs, len(plan), fit)
    return plan if found is None or _most(found, costs) > _most(plan, costs) else found


def _most(plan: list[list[int]], costs: list[float]) -> float:
    return max(sum(costs[place] for place in places) for places in plan)


def pack(pairs: list[EncodedPair], pad_to_multiple: int = 1) -> PackedBatch:
    """One micro-batch.  With `pad_to_multiple` the token count is rounded up by a padding segment at the end.

    The padding segment holds token 0 at position 0 and is not supervised.
    """
    sequences = [side for pair in pairs for side in sequences_of(pair)]
    lengths = np.array([len(side) for side in sequences], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    real = int(lengths.sum())
    padding = -real % pad_to_multiple
    bounds = np.concatenate([starts, [real], [real + padding]] if padding else [starts, [real]])
    queries, positives, negatives = _places(pairs)
    flat = queries + positives + negatives
    disc = np.array([side.disc_index for side in sequences]) + starts
    gen = np.array([side.gen_index for side in sequences])
    gen = np.where(gen >= 0, gen + starts, -1)
    targets = [sequences[place].target_id for place in positives + negatives]
    rows, labels, sides = _supervised(sequences, starts, queries, positives)
    input_ids = [side.input_ids for side in sequences]
    position_ids = [side.position_ids for side in sequences]
    if padding:
        input_ids.append(torch.full((padding,), _PADDING_TOKEN, dtype=torch.int64))
        position_ids.append(torch.zeros(3, padding, dtype=torch.int64))
    return PackedBatch(
        input_ids=torch.cat(input_ids),
        position_ids=torch.cat(position_ids, dim=1),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(max(lengths.max(), padding)),
        pixel_values=torch.cat([side.pixel_values for side in sequences]),
        grid_thw=torch.cat([side.grid_thw for side in sequences]),
        disc_rows=torch.from_numpy(disc[flat]),
        gen_rows=torch.from_numpy(gen[flat]),
        num_pairs=len(pairs),
        num_negatives=len(negatives),
        target_ids=torch.tensor(targets, dtype=torch.int64),
        supervised_rows=rows,
        supervised_labels=labels,
        supervised_sides=sides,
        num_real_tokens=real,
    )


def cut_after_disc(pair: EncodedPair, vision_tokens: tuple[int, ...]) -> EncodedPair:
    """The pair without what follows each side's `<disc_emb>`: attention is causal, so its state stays the same.

    For L_disc alone.  vision_tokens: ids of the image and video pads; a side with some of them behind `<disc_emb>` is
    left whole, as its pixels belong to them.
    """
    pads = torch.tensor(vision_tokens)

    def cut(side: Sequence) -> Sequence:
        end = side.disc_index + 1
        if torch.isin(side.input_ids[end:], pads).any():
            return side
        return replace(
            side,
            input_ids=side.input_ids[:end],
            labels=torch.full((end,), IGNORE, dtype=torch.int64),
            position_ids=side.position_ids[:, :end],
            gen_index=-1,
            prompt_length=end,
        )

    return replace(
        pair, query=cut(pair.query), positive=cut(pair.positive), negatives=tuple(cut(side) for side in pair.negatives)
    )


def _places(pairs: list[EncodedPair]) -> tuple[list[int], list[int], list[int]]:
    """Places of the queries, the positives and the negatives in the order of the tokens."""
    queries, positives, negatives, place = [], [], [], 0
    for pair in pairs:
        queries.append(place)
        positives.append(place + 1)
        negatives += range(place + 2, place + 2 + len(pair.negatives))
        place += 2 + len(pair.negatives)
    return queries, positives, negatives


def _supervised(sequences, starts, queries, positives) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, labels, sides) int64 [R] for the cross-entropy; hard negatives are not trained to speak."""
    rows, labels, sides = [], [], []
    for side, places in enumerate((queries, positives)):
        for place in places:
            values = sequences[place].labels.numpy()
            kept = np.flatnonzero(values != IGNORE)
            rows.append(kept + starts[place])
            labels.append(values[kept])
            sides.append(np.full(len(kept), side, dtype=np.int64))
    return tuple(torch.from_numpy(np.concatenate(part)) for part in (rows, labels, sides))
