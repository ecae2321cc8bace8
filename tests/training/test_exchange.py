"""Pairs on their way between data-parallel ranks, and what they are said to cost."""

import copy

import numpy as np
import pytest
import torch
from data_tools import make_processor, record, record_side, tiny_hf, write_picture, write_records

from umer1.data.dataset import PairDataset
from umer1.data.packing import pack, sequences_of
from umer1.data.schema import Prompt, PromptPair
from umer1.testing import run_distributed
from umer1.training.exchange import costs_of_all_ranks, exchange, shared_out
from umer1.training.flops import pair_flops, step_flops

RANKS, EACH = 4, 3


def make_pairs(root) -> list:
    """Twelve pairs: pictures of several sizes, texts of several lengths, hard negatives; some have no picture."""
    records = []
    for index in range(RANKS * EACH):
        item = record(index)
        if index % 4:
            name = write_picture(root, f"{index}.png", 28 + 28 * index, 56, seed=index)
            item["qry"] = record_side(f"<image>query {'long ' * index}", image=name)
        item["neg"] = [record_side(f"negative {n}") for n in range(index % 3)]
        records.append(item)
    dataset = PairDataset(write_records(root / "pairs.json", records), None, make_processor())
    pairs = [dataset[index] for index in range(len(records))]
    for pair in pairs:
        pair.slot = pair.index
    return pairs


def facts(pair) -> list:
    sides = [pair.query.sequence, pair.positive.sequence] if isinstance(pair, PromptPair) else sequences_of(pair)
    values = [pair.slot, pair.index, pair.dataset]
    for side in sides:
        for name in side.__slots__:
            value = getattr(side, name)
            values.append((str(value.dtype), value.shape, value.numpy().tobytes()) if torch.is_tensor(value) else value)
    return values


def as_prompts(pair) -> PromptPair:
    return PromptPair(Prompt(pair.query), Prompt(pair.positive), pair.dataset, pair.index, pair.slot)


def exchanged(kinds: list[list], owners: np.ndarray, costs: np.ndarray) -> tuple[list, np.ndarray, np.ndarray]:
    """On a rank: of each kind, (facts of a pair, what went along with it) after an exchange; then costs and shares."""
    rank, world, device = torch.distributed.get_rank(), torch.distributed.group.WORLD, torch.device("cpu")
    found = []
    for pairs in kinds:
        items = [(pair, {"with": pair.index}) for pair in pairs[rank * EACH : (rank + 1) * EACH]]
        found.append([(facts(pair), with_it) for pair, with_it in exchange(items, owners, world, device)])
    everything = costs_of_all_ranks(costs[rank].tolist(), world, device)
    return found, everything, shared_out(everything)


def test_every_pair_arrives_whole_and_all_ranks_agree(tmp_path):
    rng = np.random.default_rng(3)
    owners = rng.permutation(np.repeat(np.arange(RANKS), EACH)).reshape(RANKS, EACH)
    owners[1] = 1  # a rank that nothing leaves, and one that all leaves
    owners[0], owners[2] = 2, 0
    pairs, costs = make_pairs(tmp_path), rng.lognormal(0, 1, (RANKS, EACH))
    kinds = [pairs, [as_prompts(pair) for pair in copy.deepcopy(pairs)]]
    want = [[(facts(pair), {"with": pair.index}) for pair in kind] for kind in kinds]
    for rank, (found, everything, agreed) in enumerate(run_distributed(exchanged, RANKS, kinds, owners, costs)):
        mine = np.flatnonzero(owners.flatten() == rank)
        assert found == [[kind[slot] for slot in mine] for kind in want]
        np.testing.assert_array_equal(everything, costs)
        np.testing.assert_array_equal(agreed, shared_out(costs))
        assert (np.bincount(agreed.flatten()) == EACH).all()


@pytest.mark.parametrize("train_vision", [False, True])
def test_costs_of_pairs_add_up_to_the_step(tmp_path, train_vision):
    pairs, config = make_pairs(tmp_path), tiny_hf().config
    costs = [pair_flops(pair, config, train_vision) for pair in pairs]
    assert sum(costs) == pytest.approx(step_flops([pack(pairs)], config, train_vision), rel=1e-12)
    assert costs[11] > costs[8]
