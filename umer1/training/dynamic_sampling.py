"""Dynamic sampling (DAPO, arXiv 2503.14476): train on pairs whose rewards differ, from as many rounds as it takes."""

from dataclasses import replace

import torch

from umer1.training.policy_batches import Round
from umer1.training.policy_step import PolicyStep, VisionCache
from umer1.training.scoring import ScoredRound, Scorer


def merge_rounds(rounds: list[ScoredRound], scorer: Scorer) -> ScoredRound:
    """The first global_batch_size pairs that have spread on a side, of all ranks' rounds in order, as one round.

    Each pair stays on the rank that it was rolled out on, with the advantages it got among its own round's pairs.
    What every rank knows decides, so all choose alike; without any such pair the first round stays as it is.
    """
    wanted = scorer.config.data.global_batch_size
    useful = [(number, slot) for number, one in enumerate(rounds) for slot in one.spread.any(0).nonzero().flatten()]
    # New slots, so that mini-batches share the pairs evenly whatever slots and rounds these are from.
    kept = {(number, int(slot)): place for place, (number, slot) in enumerate(useful[:wanted])}
    if not kept:
        return rounds[0]
    chosen = [
        (one, {place: kept[key] for place, pair in enumerate(one.round_.pairs) if (key := (number, pair.slot)) in kept})
        for number, one in enumerate(rounds)
    ]
    pairs, completions, flats = [], [], {"old": [], "engine": [], "advantages": []}
    for side in range(2):
        for one, places in chosen:
            round_ = one.round_
            group, count = round_.num_generations, len(round_.pairs)
            for place in places:
                first = (side * count + place) * group
                completions += round_.completions[first : first + group]
                tokens = slice(int(round_.starts[first]), int(round_.starts[first + group]))
                flats["old"].append(one.step.old_logprobs[tokens])
                flats["engine"].append(one.step.engine_logprobs[tokens])
                flats["advantages"].append(one.step.advantages[tokens])
            if side == 0:
                pairs += [replace(round_.pairs[place], slot=slot) for place, slot in places.items()]
    first = rounds[0]
    if not pairs:
        # None of the chosen pairs is this rank's: a pair whose rollouts all count nothing keeps it in step.
        pairs = first.round_.pairs[:1]
        completions = [None] * (2 * first.round_.num_generations)
    merged = Round(pairs, completions, first.round_.num_generations)
    cache = VisionCache(merged, first.step.vision.train_vision, first.step.vision.device)
    step = PolicyStep(first.step.config, first.step.temperature, cache)
    empty = first.step.old_logprobs[:0]
    step.old_logprobs, step.engine_logprobs, step.advantages = (
        torch.cat([empty, *flats[name]]) for name in ("old", "engine", "advantages")
    )
    return ScoredRound(merged, scorer.parts(merged), step, empty, first.embeddings[:0])
