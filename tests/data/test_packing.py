"""Packed rows point at the right tokens, and plans keep their budgets."""

import numpy as np
import pytest
import torch
from data_tools import make_processor, record, record_side, tiny_hf, write_picture, write_records

from umer1.data.dataset import PairDataset
from umer1.data.packing import cut_after_disc, pack, pair_cost, plan_micro_batches, sequences_of
from umer1.data.schema import EncodedPair, Sequence


@pytest.fixture
def pairs(tmp_path):
    names = [write_picture(tmp_path, f"{i}.png", 56 + 28 * i, 56, seed=i) for i in range(4)]
    records = []
    for index in range(4):
        item = record(index)
        item["qry"] = record_side(f"<image>query {index} {'long ' * index}", image=names[index])
        item["neg"] = [record_side(f"negative {index} {n}") for n in range(index % 3)]
        records.append(item)
    dataset = PairDataset(write_records(tmp_path / "a.json", records), None, make_processor())
    return [dataset[index] for index in range(4)]


@pytest.mark.parametrize("multiple", [1, 2, 8, 1000])
def test_rows_point_at_their_tokens(pairs, multiple):
    special = tiny_hf().special
    batch = pack(pairs, multiple)
    flat = [side for pair in pairs for side in sequences_of(pair)]
    real = sum(len(side) for side in flat)
    assert batch.num_real_tokens == real and len(batch.input_ids) == -(-real // multiple) * multiple
    bounds = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(batch.input_ids)
    assert len(bounds) == len(flat) + 1 + (len(batch.input_ids) > real)
    assert batch.max_seqlen == int(np.diff(bounds).max())
    for place, side in enumerate(flat):
        piece = slice(bounds[place], bounds[place + 1])
        assert torch.equal(batch.input_ids[piece], side.input_ids)
        assert torch.equal(batch.position_ids[:, piece], side.position_ids)
    assert (batch.position_ids[:, real:] == 0).all()
    assert (batch.num_pairs, batch.num_negatives) == (4, 3)
    ordered = [p.query for p in pairs] + [p.positive for p in pairs] + [n for p in pairs for n in p.negatives]
    starts = {id(side): bounds[place] for place, side in enumerate(flat)}
    assert batch.disc_rows.tolist() == [starts[id(side)] + side.disc_index for side in ordered]
    assert (batch.input_ids[batch.disc_rows] == special.disc_emb).all()
    assert (batch.input_ids[batch.gen_rows] == special.gen_emb).all()
    assert batch.target_ids.tolist() == [side.target_id for side in ordered[4:]]
    assert torch.equal(batch.grid_thw, torch.cat([side.grid_thw for side in flat]))
    assert torch.equal(batch.pixel_values, torch.cat([side.pixel_values for side in flat]))


def test_supervised_rows_predict_the_next_token_of_queries_and_positives(pairs):
    batch = pack(pairs, 8)
    assert torch.equal(batch.supervised_labels, batch.input_ids[batch.supervised_rows + 1])
    for side, chosen in ((0, [pair.query for pair in pairs]), (1, [pair.positive for pair in pairs])):
        want = torch.cat([item.labels[item.labels != -100] for item in chosen])
        assert torch.equal(batch.supervised_labels[batch.supervised_sides == side], want)
    ends = batch.input_ids[batch.supervised_rows + 1] == tiny_hf().special.im_end
    assert int(ends.sum()) == 8


def test_text_only_batches_have_no_pixels(tmp_path):
    path = write_records(tmp_path / "a.json", [record()])
    batch = pack([PairDataset(path, None, make_processor())[0]])
    assert batch.pixel_values.shape == (0, 3 * 2 * 14 * 14) and batch.grid_thw.shape == (0, 3)


def test_plans():
    assert plan_micro_batches([5] * 5, [0] * 5, 2) == [[0, 1], [2, 3], [4]]
    assert plan_micro_batches([5, 5, 9, 1, 1], [0] * 5, 9, max_tokens=10) == [[0, 1], [2, 3], [4]]
    assert plan_micro_batches([1] * 4, [3, 8, 2, 2], 9, max_patches=7) == [[0], [1], [2, 3]]
    assert plan_micro_batches([50, 5, 5], [0] * 3, 9, max_tokens=10) == [[0], [1, 2]]
    assert plan_micro_batches([], [], 4) == []
    assert plan_micro_batches([1, 1, 9, 9], [0] * 4, 2, multiple_of=3) == [[0, 1], [2], [3]]
    assert plan_micro_batches([1, 1], [0] * 2, 2, multiple_of=4) == [[0], [1]]


def test_plans_keep_order_and_budgets():
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 30))
        lengths, patches = rng.integers(1, 40, count).tolist(), rng.integers(0, 40, count).tolist()
        size, tokens, vision, multiple = (int(rng.integers(1, high)) for high in (9, 100, 100, 5))
        plan = plan_micro_batches(lengths, patches, size, tokens, vision, multiple_of=multiple)
        assert [place for places in plan for place in places] == list(range(count))
        assert len(plan) % multiple == 0 or len(plan) == count
        for places in plan:
            assert len(places) <= size
            if len(places) > 1:
                assert sum(lengths[i] for i in places) <= tokens and sum(patches[i] for i in places) <= vision


def test_cost_counts_all_sides(pairs):
    tokens, patches = pair_cost(pairs[2])
    assert tokens == sum(len(side) for side in sequences_of(pairs[2])) and len(sequences_of(pairs[2])) == 4
    assert patches == len(pairs[2].query.pixel_values)


def test_cut_after_disc_keeps_vision_that_stands_behind():
    """L_disc alone needs nothing behind <disc_emb>, unless an image stands there whose pixels are packed."""
    pad, disc = 7, 5

    def side(ids: list[int]) -> Sequence:
        count = len(ids)
        return Sequence(
            input_ids=torch.tensor(ids),
            labels=torch.arange(count),
            position_ids=torch.arange(count).expand(3, count),
            pixel_values=torch.zeros(4 * ids.count(pad), 12),
            grid_thw=torch.tensor([[1, 2, 2]] * ids.count(pad)).reshape(-1, 3),
            disc_index=ids.index(disc),
            gen_index=count - 1,
            prompt_length=count - 2,
        )

    before, behind = side([1, pad, 2, disc, 3, 4]), side([1, disc, 2, pad, 3])
    pair = cut_after_disc(EncodedPair(query=before, positive=behind, negatives=(before,)), (pad, 8))
    assert pair.query.input_ids.tolist() == [1, pad, 2, disc] and pair.query.position_ids.shape == (3, 4)
    assert (pair.query.gen_index, pair.query.labels.tolist()) == (-1, [-100] * 4)
    assert pair.positive.input_ids.tolist() == [1, disc, 2, pad, 3]
    assert len(pair.negatives[0]) == 4 and len(pack([pair]).input_ids) == 13
