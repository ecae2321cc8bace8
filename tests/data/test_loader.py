"""Steps are the same at any number of ranks and workers, after a resume, and with bad samples among the data."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
from data_tools import make_processor, record, record_side, write_picture, write_records

from umer1.data.bad_samples import BadRecord, BadSampleCounts, BadSampleLog
from umer1.data.dataset import PairDataset
from umer1.data.loader import DataConfig, Loader, StepMaker
from umer1.data.packing import sequences_of
from umer1.data.sampler import BlockSampler
from umer1.errors import UserError

BAD = {3: "missing_file", 11: "no_gen_emb", 17: "marker_mismatch", 30: "corrupt_image", 31: "bad_record"}


@pytest.fixture
def data(tmp_path):
    picture = write_picture(tmp_path, "a.png", 28, 28)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    records = [record(index, ["one", "two"][index % 2]) for index in range(48)]
    for index in range(0, 48, 5):
        records[index]["qry"] = record_side(f"<image>query {index}", image=picture)
    records[3]["pos"] = record_side("<image>x", image="none.png")
    records[11]["qry"] = record_side("x", "<think>a</think><answer>b")
    records[17]["qry"] = record_side("<image>x")
    records[30]["qry"] = record_side("<image>x", image="broken.png")
    records[31]["pos"] = {"conversations": "?"}
    return write_records(tmp_path / "pairs.jsonl", records, lines=True)


def make_loader(path, *, rank=0, size=1, log=None, workers=0, **changes) -> Loader:
    config = DataConfig(global_batch_size=8, num_workers=workers, **changes)
    dataset = PairDataset(path, None, make_processor())
    sampler = BlockSampler(dataset.name_ids, dataset.names, 8, 4, seed=1)
    return Loader(StepMaker(dataset, sampler, config, dp_rank=rank, dp_size=size), log)


def content(*steps) -> list:
    """Every value of the pairs of the ranks' steps, in the order of the global batch."""
    found = []
    for step in steps:
        assert [pair.slot for pair in step.pairs] == step.slots.tolist()
        assert [pair.index for pair in step.pairs] == step.indices.tolist()
        for pair in step.pairs:
            values = [pair.slot, pair.index, pair.dataset]
            for side in sequences_of(pair):
                for name in side.__slots__:
                    value = getattr(side, name)
                    if torch.is_tensor(value):
                        value = (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
                    values.append((name, value))
            found.append(values)
    found.sort(key=lambda values: values[0])
    assert [values[0] for values in found] == list(range(8))
    return found


def count(loaders: list[Loader]) -> None:
    delta = sum(loader.counts.take_delta() for loader in loaders)
    for loader in loaders:
        loader.counts.add(delta)


def test_ranks_and_workers_do_not_matter(data, tmp_path):
    alone = make_loader(data)
    pair = [make_loader(data, rank=rank, size=2) for rank in range(2)]
    worked = make_loader(data, workers=2)
    try:
        for _ in range(9):
            one = alone.next()
            many = [loader.next() for loader in pair]
            ahead = worked.next()
            assert content(one) == content(*many) == content(ahead)
            np.testing.assert_array_equal(one.indices, np.stack([step.indices for step in many], 1).flatten())
            count([alone])
            count(pair)
            count([worked])
            assert alone.counts.state_dict() == pair[1].counts.state_dict() == worked.counts.state_dict()
    finally:
        worked.close()
    assert not multiprocessing.active_children()
    assert alone.counts.bad > 0


def test_bad_samples_are_replaced_counted_and_listed_once(data, tmp_path):
    log = tmp_path / "run" / "bad_samples.jsonl"
    loaders = [make_loader(data, rank=rank, size=2, log=log) for rank in range(2)]
    used = []
    for _ in range(24):  # four epochs
        steps = [loader.next() for loader in loaders]
        used += [index for step in steps for index in step.indices.tolist()]
        assert sum(len(step.pairs) for step in steps) == 8
        count(loaders)
    assert not set(used) & set(BAD) and set(used) == set(range(48)) - set(BAD)
    listed = [json.loads(line) for line in log.read_text().splitlines()]
    assert {item["index"]: item["cause"] for item in listed} == BAD and len(listed) == len(BAD)
    assert all(item["dataset"] == ["one", "two"][item["index"] % 2] and item["detail"] for item in listed)
    counts = loaders[0].counts
    assert counts.by_dataset()["one"].keys() == {"corrupt_image"}
    assert counts.by_dataset()["two"].keys() == {"missing_file", "no_gen_emb", "marker_mismatch", "bad_record"}
    assert counts.seen == 24 * 8 + counts.bad
    assert "corrupt_image" in counts.report()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resume_goes_on_with_the_same_steps_and_counts(data, tmp_path, workers):
    log = tmp_path / "bad_samples.jsonl"
    whole = make_loader(data, log=tmp_path / "whole.jsonl")
    first = make_loader(data, log=log, workers=workers)
    for _ in range(4):
        assert content(whole.next()) == content(first.next())
    count([first])
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    later = [make_loader(data, rank=rank, size=2, log=log, workers=workers) for rank in range(2)]
    for loader in later:
        loader.load_state_dict(state)
    for _ in range(8):
        assert content(whole.next()) == content(*(loader.next() for loader in later))
        count(later)
    count([whole])
    assert whole.counts.state_dict() == later[0].counts.state_dict() == later[1].counts.state_dict()
    for loader in later:
        loader.close()
    assert sorted(log.read_text().splitlines()) == sorted((tmp_path / "whole.jsonl").read_text().splitlines())


def test_a_line_that_names_no_data_set_is_replaced_by_a_pair_of_another(tmp_path):
    """It has nobody of its own to take its place, and must not end a run of a million good ones."""
    lines = [record(i) for i in range(23)] + ["\x00 no JSON"]
    loader = make_loader(write_records(tmp_path / "a.jsonl", lines, lines=True))
    steps = [loader.next() for _ in range(6)]
    assert not any(step.failure for step in steps)
    bad = [entry for step in steps for entry in step.bad]
    assert bad and {(entry.index, entry.dataset, entry.cause) for entry in bad} == {(23, "", "bad_record")}
    for step in steps:
        assert len(set(step.indices.tolist())) == len(step.indices) and 23 not in step.indices


def test_a_data_set_without_usable_pairs_stops_every_rank(tmp_path):
    records = [record(i) for i in range(16)]
    for item in records:
        item["qry"] = record_side("<image>x", image="none.png")
    path = write_records(tmp_path / "a.json", records)
    loaders = [make_loader(path, rank=rank, size=2, max_bad_sample_fraction=1.0) for rank in range(2)]
    steps = [loader.next() for loader in loaders]
    assert all(step.pairs == [] and step.failure for step in steps)
    count(loaders)
    for loader in loaders:
        with pytest.raises(UserError, match="no usable pair.*missing_file.*--data-root"):
            loader.counts.check(1.0, "bad_samples.jsonl")


def test_the_share_of_bad_samples():
    counts = BadSampleCounts(("a", ""))
    bad = [BadRecord(1, "a", "corrupt_image", "x"), BadRecord(2, "", "bad_record", "y")]
    counts.note(40, bad)
    counts.check(0.0)  # noted, but not yet added up over ranks
    counts.add(counts.take_delta())
    assert counts.bad == 2 and counts.seen == 40
    counts.check(0.05)
    with pytest.raises(UserError, match=r"2 of 40 samples were bad \(a: corrupt_image 1; \(unnamed\): bad_record 1\)"):
        counts.check(0.01, "x.jsonl")
    with pytest.raises(UserError, match="max-bad-sample-fraction 0"):
        counts.check(0.0)
    counts.note(1000, [])
    counts.add(counts.take_delta())
    counts.check(0.01)
    other = BadSampleCounts(("b",))
    other.load_state_dict(json.loads(json.dumps(counts.state_dict())))
    assert other.bad == 2 and other.by_dataset() == counts.by_dataset() and other.seen == 1040


def test_the_log_survives_a_line_cut_off_by_a_kill(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    path.write_text('{"index": 4, "dataset": "a", "cause": "bad_record", "detail": "x"}\n{"index": 5, "data')
    records = [BadRecord(index, "a", "bad_record", "x\ny") for index in (4, 5, 6, 6)]
    BadSampleLog(path).append(records)
    BadSampleLog(path).append(records)
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and [json.loads(lines[i])["index"] for i in (0, 2, 3)] == [4, 5, 6]


def test_violations_come_all_at_once(tmp_path):
    assert DataConfig().violations() == [] and DataConfig(global_batch_size=12).violations(4) == []
    config = DataConfig(
        data_path=[str(tmp_path / "none.json")],
        data_root=str(tmp_path / "none"),
        global_batch_size=10,
        micro_batch_size=0,
        seq_length=-1,
        num_workers=-1,
        max_bad_sample_fraction=1.5,
        min_pixels=10,
        max_pixels=5,
    )
    text = "\n".join(config.violations(4))
    words = ["none.json does not exist", "is not a directory", "micro_batch_size=0", "seq_length=-1", "num_workers=-1"]
    words += [
        "max_bad_sample_fraction=1.5",
        "min_pixels=10 is above max_pixels=5",
        "4 data-parallel ranks; use 8 or 12",
    ]
    assert all(word in text for word in words)
    assert len(config.violations(4)) == len(words)
