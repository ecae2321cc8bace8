"""The order of the data: blocks of one data set, every pair once an epoch, a function of (seed, step) alone."""

import json
import random

import numpy as np
import pytest

from umer1.data.sampler import BlockSampler, shuffled
from umer1.errors import UserError


def make(counts=(200, 90, 37), size=64, block=16, seed=0) -> BlockSampler:
    ids = np.repeat(np.arange(len(counts)), counts)
    ids = ids[shuffled(len(ids), "file order")]
    return BlockSampler(ids, tuple(f"set{i}" for i in range(len(counts))), size, block, seed)


@pytest.mark.parametrize("counts", [(200, 90, 37), (64,), (5, 5, 5), (1, 1, 300), (63, 65)])
@pytest.mark.parametrize("size, block", [(8, 64), (15, 4), (12, 5), (15, 64)])
def test_every_epoch_has_every_pair_and_no_batch_a_pair_twice(counts, size, block):
    sampler = make(counts, size, block)
    total = sum(counts)
    for epoch in range(3):
        batches = [sampler.batch(epoch * len(sampler) + i) for i in range(len(sampler))]
        for batch in batches:
            assert len(batch) == size == len(set(batch.tolist()))
        seen = np.bincount(np.concatenate(batches), minlength=total)
        assert seen.min() == 1 and seen.max() <= 2
        assert (seen == 2).sum() == -total % size


def test_blocks_come_from_one_data_set():
    sampler = make((200, 90, 37), size=64, block=16)
    whole = 200 // 16 + 90 // 16 + 37 // 16
    pure = 0
    for step in range(len(sampler)):
        kinds = sampler.name_ids[sampler.batch(step)].reshape(-1, 16)
        pure += sum(len(set(block.tolist())) == 1 for block in kinds)
    assert pure >= whole
    small = make((200, 90, 37), size=8, block=64)
    mixed = sum(len(set(small.name_ids[small.batch(step)].tolist())) > 1 for step in range(len(small)))
    assert mixed <= -(-(200 % 8 + 90 % 8 + 37 % 8) // 8)


def test_the_order_depends_on_seed_and_epoch_alone():
    one, other = make(seed=3), make(seed=3)
    order = [one.batch(step) for step in range(12)]
    for step in (11, 0, 7, 3):  # any order of asking
        np.testing.assert_array_equal(other.batch(step), order[step])
    assert not np.array_equal(make(seed=4).batch(0), order[0])
    assert not np.array_equal(one.batch(0), one.batch(len(one)))
    # this very order on every machine and with every numpy
    assert shuffled(6, 0, "x").tolist() == [0, 4, 3, 2, 1, 5]


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_ranks_share_out_the_same_global_batch(dp):
    sampler = make()
    shares = [sampler.share(5, rank, dp) for rank in range(dp)]
    np.testing.assert_array_equal(np.concatenate([slots for slots, _ in shares]), np.arange(64))
    np.testing.assert_array_equal(np.concatenate([pairs for _, pairs in shares]), sampler.batch(5))
    shares = [sampler.share(5, rank, dp, spread=True) for rank in range(dp)]
    np.testing.assert_array_equal(np.stack([slots for slots, _ in shares], 1).flatten(), np.arange(64))
    np.testing.assert_array_equal(np.stack([pairs for _, pairs in shares], 1).flatten(), sampler.batch(5))


def test_shuffling_is_even():
    first = np.bincount([shuffled(10, "even", i)[0] for i in range(5000)], minlength=10)
    assert first.min() > 400 and first.max() < 600
    assert sorted(shuffled(1000, 1).tolist()) == list(range(1000)) and shuffled(0, 1).tolist() == []


def test_replacements_are_of_the_same_set_and_not_of_the_batch():
    sampler = make()
    batch = sampler.batch(2)
    for slot, index in enumerate(batch[:20].tolist()):
        tried = [sampler.replacement(2, slot, attempt, index) for attempt in range(1, 9)]
        assert tried == [make().replacement(2, slot, attempt, index) for attempt in range(1, 9)]
        if (sampler.name_ids == sampler.name_ids[index]).sum() > 64 + 8:
            assert len(set(tried)) == 8
        for other in tried:
            assert sampler.name_ids[other] == sampler.name_ids[index] and other not in batch
    tiny = make((8,), size=8)
    assert tiny.replacement(0, 0, 1, 3) in range(8)


def test_replacements_never_double_a_pair():
    """200 seeds, 16 bad samples of 64, of one data set and of several; every second replacement is bad as well."""
    for seed in range(200):
        sampler = make((1000,) if seed % 2 else (400, 350, 250), seed=seed)
        batch = sampler.batch(1).tolist()
        bad = random.Random(seed).sample(range(64), 16)
        for slot in bad:
            batch[slot] = sampler.replacement(1, slot, 1 + slot % 2, batch[slot])
        assert len(set(batch)) == 64, f"seed {seed}"


def test_a_slot_tries_every_pair_of_its_set_once():
    sampler = make((40,), size=32, block=8)
    batch = sampler.batch(0)
    for slot in (0, 9, 31):
        tried = [sampler.replacement(0, slot, attempt, int(batch[slot])) for attempt in range(1, 9)]
        assert sorted(tried) == sorted(set(range(40)) - set(batch.tolist()))


def test_too_few_pairs_is_an_error():
    with pytest.raises(UserError, match="327 pairs, fewer than --global-batch-size 328"):
        make(size=328)


def test_state_goes_through_json_and_refuses_another_order():
    sampler = make()
    sampler.step = 17
    state = json.loads(json.dumps(sampler.state_dict()))
    other = make()
    other.load_state_dict(state)
    assert other.step == 17
    for changed in (make(seed=1), make(size=32), make(block=8), make((200, 90, 38)), make((199, 91, 37))):
        with pytest.raises(UserError, match="cannot be continued"):
            changed.load_state_dict(state)


def test_leftovers_are_told():
    notes = " ".join(make().notes())
    assert "set0 8, set1 10, set2 5" in notes and "57 pairs are seen twice" in notes
    assert make((64, 64), size=32, block=32).notes() == []
