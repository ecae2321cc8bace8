"""Which pairs dynamic sampling keeps, and what goes with them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from umer1.data.schema import Prompt, PromptPair
from umer1.rl.types import Completion
from umer1.training.dynamic_sampling import merge_rounds
from umer1.training.policy_batches import Round
from umer1.training.policy_step import PolicyStep, VisionCache
from umer1.training.scoring import ScoredRound

GROUP, PAIRS = 3, 6  # of the whole batch


def make_round(number: int, slots: list[int], spread: torch.Tensor) -> ScoredRound:
    """A rank's share of a round: token ids and numbers say where they are from."""
    rng = np.random.default_rng(number)
    lengths = rng.integers(1, 5, (2, PAIRS, GROUP))
    failed = rng.random((2, PAIRS, GROUP)) < 0.2
    completions, values = [], []
    for side in range(2):
        for slot in slots:
            for g in range(GROUP):
                name = ((number * 10 + slot) * 10 + side) * 10 + g
                ids = [name] * int(lengths[side, slot, g])
                gone = bool(failed[side, slot, g])
                completions.append(None if gone else Completion(ids, np.zeros(len(ids), np.float32), "stop"))
                values += [] if gone else [float(name)] * len(ids)
    pairs = [PromptPair(Prompt(None), Prompt(None), index=100 * number + slot, slot=slot) for slot in slots]
    round_ = Round(pairs, completions, GROUP)
    flat = torch.tensor(values)
    cache = VisionCache(round_, False, torch.device("cpu"))
    step = PolicyStep(None, 1.0, cache, flat, None, flat + 0.25, flat + 0.5)
    return ScoredRound(round_, [], step, flat, torch.zeros(len(completions), 4), spread=spread)


def merge(rounds: list[ScoredRound]) -> ScoredRound:
    data = SimpleNamespace(global_batch_size=PAIRS)
    return merge_rounds(rounds, SimpleNamespace(config=SimpleNamespace(data=data), parts=lambda merged: [merged]))


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_pairs_with_spread_are_kept_with_all_that_is_theirs(ranks):
    rng = np.random.default_rng(0)
    for case in range(50):
        share = rng.choice([0.1, 0.3, 0.7])
        spreads = [torch.from_numpy(rng.random((2, PAIRS)) < share) for _ in range(3)]
        useful = [(n, slot) for n in range(3) for slot in range(PAIRS) if spreads[n][0, slot] or spreads[n][1, slot]]
        kept, found = useful[:PAIRS], {}
        for rank in range(ranks):
            slots = list(range(rank * PAIRS // ranks, (rank + 1) * PAIRS // ranks))
            rounds = [make_round(n, slots, spreads[n]) for n in range(3)]
            merged = merge(rounds)
            if not kept:
                assert merged is rounds[0]
                continue
            round_ = merged.round_
            assert merged.parts == [round_] and merged.step.vision.round_ is round_ and len(round_.pairs) >= 1
            for pair_number, pair in enumerate(round_.pairs):
                mine = [
                    round_.completions[(side * len(round_.pairs) + pair_number) * GROUP + g]
                    for side in range(2)
                    for g in range(GROUP)
                ]
                if any(mine):
                    found[divmod(pair.index, 100)] = pair.slot
            for number, completion in enumerate(round_.completions):
                tokens = slice(int(round_.starts[number]), int(round_.starts[number + 1]))
                if completion is None:
                    continue
                name, pair = completion.token_ids[0], round_.pairs[round_.pair_of(number)]
                assert name // 100 == pair.index // 100 * 10 + pair.index % 100
                assert name // 10 % 10 == round_.side_of(number)
                step = merged.step
                for values, added in ((step.old_logprobs, 0), (step.engine_logprobs, 0.25), (step.advantages, 0.5)):
                    assert values[tokens].tolist() == [name + added] * len(completion.token_ids)
            assert len(merged.step.old_logprobs) == round_.num_tokens
        wanted = {key: place for place, key in enumerate(kept)}
        # A pair of which all rollouts failed shows nothing of itself here.
        assert found.items() <= wanted.items(), case
        assert len(found) >= len(wanted) - 1
