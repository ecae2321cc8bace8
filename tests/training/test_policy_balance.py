"""Pairs that move with their rollouts: the same rollouts in the same slots and mini-batches, shared out more evenly."""

from types import SimpleNamespace

import numpy as np
import torch
from tiny_qwen2_vl import make_tiny_directory

from umer1.data.schema import Prompt, PromptPair, Sequence
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.rl.types import Completion
from umer1.testing import run_distributed
from umer1.training.policy_balance import RolloutBalance, pair_costs
from umer1.training.policy_batches import Round

RANKS, PAIRS, GROUP, MINI_BATCHES = 4, 8, 3, 2


def prompt(rng: np.random.Generator) -> Prompt:
    """Text and at times a picture, which is not looked at; the engine's copy of it, too."""
    grid = torch.tensor([[1, 2 * int(rng.integers(1, 9)), 4]] * int(rng.integers(0, 2)), dtype=torch.int64).reshape(
        -1, 3
    )
    ids = torch.arange(int(rng.integers(5, 30)))
    pixels = torch.from_numpy(rng.random((int(grid.prod(-1).sum()), 6), np.float32))
    side = Sequence(ids, ids, ids.expand(3, -1), pixels, grid, 0, -1, len(ids))
    return Prompt(side, images=(np.zeros((4, 4, 3), np.uint8),))


def make_rounds() -> list[Round]:
    """One a rank; responses of the first ranks are the longest, and some rollouts have failed."""
    rng, rounds = np.random.default_rng(0), []
    for rank in range(RANKS):
        slots = range(rank * PAIRS, (rank + 1) * PAIRS)
        pairs = [PromptPair(prompt(rng), prompt(rng), "toy", 100 + slot, slot) for slot in slots]
        completions = []
        for _ in range(2 * PAIRS * GROUP):
            ids = rng.integers(0, 9, int(rng.integers(1, 400 // (rank + 1)))).tolist()
            failed = rng.random() < 0.1
            completions.append(None if failed else Completion(ids, rng.random(len(ids), np.float32), "stop"))
        rounds.append(Round(pairs, completions, GROUP))
    return rounds


def shared_out(model) -> tuple[Round, float, float]:
    """On one rank: its new round, and the imbalance before and after."""
    group, device = torch.distributed.group.WORLD, torch.device("cpu")
    state = SimpleNamespace(dp_size=RANKS, groups=SimpleNamespace(dp=group), device=device)
    config = SimpleNamespace(
        data=SimpleNamespace(balance_batch=True),
        model=SimpleNamespace(train_vision=False),
        policy=SimpleNamespace(mini_batches=MINI_BATCHES),
    )
    balance, given = RolloutBalance(config, model, state), make_rounds()[torch.distributed.get_rank()]
    before = balance.imbalance(given)
    config.data.balance_batch = False
    assert balance.shared_out(given) is given
    config.data.balance_batch = True
    found = balance.shared_out(given)
    return found, before, balance.imbalance(found)


def by_slot(rounds: list[Round]) -> dict[int, list]:
    """Everything that belongs to a pair."""
    found = {}
    for round_ in rounds:
        for place, pair in enumerate(round_.pairs):
            sides = [(side * len(round_.pairs) + place) * GROUP for side in range(2)]
            answers = [round_.completions[first + number] for first in sides for number in range(GROUP)]
            prompts = [one.sequence for one in (pair.query, pair.positive)]
            found[pair.slot] = [pair.index, pair.dataset]
            found[pair.slot] += [(one.input_ids.tolist(), one.pixel_values.tolist()) for one in prompts]
            found[pair.slot] += [one and (one.token_ids, one.logprobs.tolist(), one.finish_reason) for one in answers]
    return found


def test_the_same_rollouts_more_evenly(tmp_path):
    model = HFDirectory.open(make_tiny_directory(tmp_path, layers=1, vision_depth=1)).config
    given = make_rounds()
    results = run_distributed(shared_out, RANKS, model)
    rounds = [round_ for round_, *_ in results]
    assert by_slot(rounds) == by_slot(given)
    for round_ in rounds:
        slots = [pair.slot for pair in round_.pairs]
        assert slots == sorted(slots)
        assert np.bincount([slot % MINI_BATCHES for slot in slots]).tolist() == [PAIRS // MINI_BATCHES] * MINI_BATCHES
    for numbers, made in ((1, given), (2, rounds)):
        loads = np.zeros((RANKS, MINI_BATCHES))
        for rank, round_ in enumerate(made):
            for pair, cost in zip(round_.pairs, pair_costs(round_, model, False), strict=True):
                loads[rank, pair.slot % MINI_BATCHES] += cost
        want = loads.max(0).sum() / loads.mean(0).sum()
        np.testing.assert_allclose([result[numbers] for result in results], want)
    assert results[0][2] < 1.15 < 1.5 < results[0][1]
