"""Several data files: the words of --data-path, shares by weight, order and resume."""

import json
import random

import numpy as np
import pytest
from data_tools import make_processor
from sft_reference import write_pairs

from umer1.data.bad_samples import BadSample
from umer1.data.blend import Blend
from umer1.data.data_path import data_files
from umer1.data.dataset import PairDataset
from umer1.data.loader import DataConfig, Loader, StepMaker
from umer1.data.weighted_sampler import WeightedBlockSampler
from umer1.errors import UserError
from umer1.training.batches import make_sampler, open_data


@pytest.fixture
def paths(tmp_path):
    return [str(write_pairs(tmp_path / name, count, seed=count)) for name, count in (("a", 8), ("b", 12))]


def test_words_name_files_and_weights(paths):
    assert [(str(f.path), f.weight) for f in data_files(paths)] == [(paths[0], None), (paths[1], None)]
    found = data_files(["3", paths[0], "1", paths[1]])
    assert [(str(f.path), f.weight) for f in found] == [(paths[0], 0.75), (paths[1], 0.25)]


@pytest.mark.parametrize(
    ("words", "complaints"),
    [
        (["a", "0.5", "b"], ["'a' stands where a weight is expected", "'0.5' stands where a path", "has 3 words"]),
        (
            ["0", "A", "nan", "B", "inf", "none"],
            ["A is 0.0", "B is nan", "none is inf", "data_path=none does not exist"],
        ),
        (["1", "A", "2", "A"], ["names", "more than once"]),
        (["1"], ["has 1 words"]),
    ],
)
def test_wrong_words_are_said_together(paths, words, complaints):
    words = [{"A": paths[0], "B": paths[1]}.get(word, word) for word in words]
    found = " | ".join(DataConfig(data_path=words).violations())
    for complaint in complaints:
        assert complaint.replace("A", paths[0]).replace("B", paths[1]) in found or complaint in found, found


def draw(rng: np.random.Generator):
    """Pairs of a few files and data sets, and a sampler that may refuse them."""
    files = int(rng.integers(2, 5))
    file_ids = np.sort(np.append(rng.integers(files, size=int(rng.integers(0, 4))), np.arange(files))).tolist()
    counts = rng.integers(20, 400, size=len(file_ids))
    name_ids = np.repeat(np.arange(len(file_ids)), counts)
    rng.shuffle(name_ids)
    weights = rng.random(files) + 0.1
    weights /= weights.sum()
    batch, block = int(rng.integers(2, 48)), int(rng.integers(1, 24))
    names = tuple(f"set{place}" for place in range(len(file_ids)))
    labels = [f"file{place}" for place in range(files)]
    make = lambda: WeightedBlockSampler(name_ids, names, file_ids, labels, weights.tolist(), batch, block, 5)  # noqa: E731
    return make, np.array(file_ids)[name_ids], weights


def test_shares_and_passes_on_random_files():
    drawn = 0
    while drawn < 200:
        seed = random.randrange(2**32)
        make, file_of, weights = draw(np.random.default_rng(seed))
        try:
            sampler = make()
        except UserError as error:
            assert "the weight" in str(error), f"seed {seed}"
            continue
        drawn += 1
        steps = 4 * len(sampler)
        batches = np.stack([sampler.batch(step) for step in range(steps)])
        twins = sum(len(set(batch.tolist())) < len(batch) for batch in batches)
        assert twins == 0, f"seed {seed}: a pair stands in a batch twice"
        size, block = sampler.global_batch_size, sampler.block_size
        share = np.bincount(file_of[batches.reshape(-1)], minlength=len(weights)) / batches.size
        # right to a block an epoch, and one file's last block may be cut off at the epoch's end
        np.testing.assert_allclose(share, weights, atol=2 * block / (len(sampler) * size), err_msg=f"seed {seed}")
        for file in range(len(weights)):
            pairs = np.flatnonzero(file_of == file)
            for number in range(3):
                once = sampler._pass(file, number)
                assert (np.unique(once) == pairs).all(), f"seed {seed}, file {file}: a pass leaves pairs out"
                assert once.size < len(pairs) + block, f"seed {seed}, file {file}"
        again = make()
        place = int(np.random.default_rng(seed).integers(steps))
        assert (again.batch(place) == batches[place]).all(), f"seed {seed}: the order depends on what was drawn before"


def test_blocks_are_of_one_file(paths):
    names = tuple("ab")
    sampler = WeightedBlockSampler(np.repeat([0, 1], 640), names, [0, 1], ["a", "b"], [0.5, 0.5], 128, 64, 1)
    for step in range(20):
        blocks = np.repeat([0, 1], 640)[sampler.batch(step)].reshape(2, 64)
        assert set(blocks.mean(1).tolist()) == {0.0, 1.0}


def test_a_file_that_cannot_fill_its_share_is_refused(paths):
    data = DataConfig(data_path=["0.9", paths[0], "0.1", paths[1]], global_batch_size=16, data_block_size=2)
    dataset = open_data(PairDataset, data, make_processor())
    with pytest.raises(UserError, match="takes up to 1[456] pairs into one batch, but it has only 8"):
        make_sampler(data, dataset, 1)


def test_without_weights_every_pair_comes_once_an_epoch(paths):
    data = DataConfig(data_path=paths, global_batch_size=4)
    dataset = open_data(PairDataset, data, make_processor())
    sampler = make_sampler(data, dataset, 1)
    seen = np.concatenate([sampler.batch(step) for step in range(5)])
    assert sorted(seen.tolist()) == list(range(20))
    assert dataset.names == ("toy (train.json) [0]", "toy (train.json) [1]")


def test_pairs_and_their_faults_name_their_file(paths):
    records = json.loads(open(paths[1]).read())
    records[3] = {"dataset_name": "toy"}
    with open(paths[1], "w") as file:
        json.dump(records, file)
    files = [PairDataset(path, None, make_processor()) for path in paths]
    blend = Blend(files)
    assert len(blend) == 20 and blend[9].index == 9
    assert blend[9].query.input_ids.tolist() == files[1][1].query.input_ids.tolist()
    with pytest.raises(BadSample, match="b/train.json, record 3: "):
        blend[11]
    data = DataConfig(data_path=["0.5", paths[0], "0.5", paths[1]], global_batch_size=4, data_block_size=2)
    loader = Loader(StepMaker(blend, make_sampler(data, blend, 1), data))
    steps = [loader.next() for _ in range(12)]
    bad = [record for step in steps for record in step.bad]
    assert {record.index for record in bad} == {11}
    for step in steps:
        for index, wanted in zip(step.indices, loader.sampler.batch(step.step), strict=True):
            assert index == wanted or (wanted == 11 and index >= 8), "the replacement is of the same file"


def test_a_resume_sees_changed_weights_and_contents(paths):
    def sampler(*words: str):
        data = DataConfig(data_path=list(words), global_batch_size=4, data_block_size=2)
        return make_sampler(data, open_data(PairDataset, data, make_processor()), 1)

    state = json.loads(json.dumps(sampler("1", paths[0], "1", paths[1]).state_dict()))
    sampler("2", paths[0], "2", paths[1]).load_state_dict(state)
    with pytest.raises(UserError, match="weights was"):
        sampler("1", paths[0], "3", paths[1]).load_state_dict(state)
    text = open(paths[1]).read()
    with open(paths[1], "w") as file:
        file.write(text.replace("circle", "square"))  # the same lengths everywhere
    with pytest.raises(UserError, match="b/train.json does not hold what it held"):
        sampler("1", paths[0], "1", paths[1]).load_state_dict(state)
    old = {key: value for key, value in state.items() if key != "contents"}
    sampler("1", paths[0], "1", paths[1]).load_state_dict(old)
