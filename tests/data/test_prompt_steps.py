"""Steps of RL prompts: the same at any number of ranks and workers, after a resume, and with bad samples among them."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_tools import make_processor, write_picture, write_records

from umer1.data.loader import DataConfig, Loader, PromptStepMaker
from umer1.data.rl_dataset import PromptDataset
from umer1.data.sampler import BlockSampler
from umer1.errors import UserError

BAD = {3: "missing_file", 11: "over_length", 17: "marker_mismatch", 31: "bad_record"}
SIZE, STEPS = 8, 7


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rl")
    records = []
    for index in range(40):
        record = {
            "dataset_name": ["one", "two"][index % 2],
            "qry_text": f"query {index}",
            "pos_text": f"target {index}",
        }
        if index % 3 == 0:
            record["qry_image"] = write_picture(root, f"{index}.png", 40 + index, 56, seed=index)
        if index % 7 == 0:
            record["pos_video"] = [write_picture(root, f"{index}-{i}.png", seed=index + i) for i in range(3)]
        records.append(record)
    records[3]["qry_image"] = "none.png"
    records[11]["pos_text"] = "words " * 200
    records[17]["qry_text"] = "<image>x"
    records[31]["pos_text"] = 3
    return write_records(root / "rl.json", records)


def make_loader(path, *, rank=0, size=1, log=None, workers=0, **changes) -> Loader:
    config = DataConfig(global_batch_size=SIZE, num_workers=workers, **changes)
    dataset = PromptDataset(path, None, make_processor(400))
    sampler = BlockSampler(dataset.name_ids, dataset.names, SIZE, 4, seed=1)
    return Loader(PromptStepMaker(dataset, sampler, config, dp_rank=rank, dp_size=size), log)


def content(step) -> list:
    """Every value of a step's pairs, comparable."""
    values = []
    for pair in step.pairs:
        values.append((pair.slot, pair.index, pair.dataset))
        for prompt in (pair.query, pair.positive):
            sequence = prompt.sequence
            for name in sequence.__slots__:
                value = getattr(sequence, name)
                if torch.is_tensor(value):
                    value = (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
                values.append((name, value))
            values += [
                (picture.dtype, picture.shape, picture.tobytes()) for picture in (*prompt.images, *prompt.videos)
            ]
    return values


def count(loaders: list[Loader]) -> None:
    delta = sum(loader.counts.take_delta() for loader in loaders)
    for loader in loaders:
        loader.counts.add(delta)


def test_ranks_and_workers_do_not_matter(data, tmp_path):
    log = tmp_path / "bad_samples.jsonl"
    alone, worked = make_loader(data, log=log), make_loader(data, workers=2)
    halves = [make_loader(data, rank=rank, size=2) for rank in range(2)]
    quarters = [make_loader(data, rank=rank, size=4, workers=1) for rank in range(4)]
    used = set()
    try:
        for _ in range(STEPS):
            one = alone.next()
            assert one.failure is None
            assert [pair.slot for pair in one.pairs] == one.slots.tolist() == list(range(SIZE))
            assert [pair.index for pair in one.pairs] == one.indices.tolist()
            used |= set(one.indices.tolist())
            want = content(one)
            assert content(worked.next()) == want
            for several in (halves, quarters):
                steps = [loader.next() for loader in several]
                assert [value for step in steps for value in content(step)] == want
                np.testing.assert_array_equal(np.concatenate([step.slots for step in steps]), one.slots)
                count(several)
            count([alone])
            count([worked])
            states = [loader.counts.state_dict() for loader in (alone, worked, halves[1], quarters[3])]
            assert all(state == states[0] for state in states)
    finally:
        for loader in (worked, *quarters):
            loader.close()
    assert not multiprocessing.active_children()
    assert used == set(range(40)) - set(BAD)
    listed = [json.loads(line) for line in log.read_text().splitlines()]
    assert {item["index"]: item["cause"] for item in listed} == BAD and len(listed) == len(BAD)


def test_a_worker_sends_few_file_descriptors(data):
    """One for the pixels of a step, however many prompts have some."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    loader = make_loader(data, workers=1)
    try:
        loader.next()
        before = len(os.listdir("/proc/self/fd"))
        kept = [loader.next() for _ in range(5)]
        assert len(os.listdir("/proc/self/fd")) - before <= 2 * len(kept)
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resume_goes_on_with_the_same_pairs_and_counts(data, workers):
    whole, first = make_loader(data), make_loader(data, workers=workers)
    for _ in range(3):
        assert content(whole.next()) == content(first.next())
    count([first])
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    later = [make_loader(data, rank=rank, size=2, workers=workers) for rank in range(2)]
    for loader in later:
        loader.load_state_dict(state)
    for _ in range(4):
        assert content(whole.next()) == [value for loader in later for value in content(loader.next())]
        count(later)
    count([whole])
    assert whole.state_dict() == later[0].state_dict() == later[1].state_dict()
    for loader in later:
        loader.close()


def test_a_step_that_cannot_be_filled_has_no_pairs(tmp_path):
    records = [{"dataset": "a", "qry_text": "q", "qry_image": "none.png", "pos_text": "p"} for _ in range(SIZE)]
    loader = make_loader(write_records(tmp_path / "rl.json", records))
    step = loader.next()
    assert step.pairs == [] and "data set 'a' gave no usable pair" in step.failure
    count([loader])
    with pytest.raises(UserError, match="missing_file"):
        loader.counts.check(1.0)
