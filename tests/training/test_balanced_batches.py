"""Balanced ranks compute the same global batches as others do, with their work shared out more evenly."""

import numpy as np
import pytest
import torch.distributed as dist
from data_tools import record, write_records
from sft_reference import write_pairs
from tiny_qwen2_vl import make_tiny_directory

from umer1.data.balancing import imbalance
from umer1.data.loader import DataConfig
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.errors import UserError
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.testing import run_distributed
from umer1.training.batches import BatchSource
from umer1.training.config import SFTConfig
from umer1.training.flops import step_flops

RANKS, PAIRS, STEPS = 4, 16, 3


def packed_steps(model: str, data: str) -> dict[bool, list[tuple[list, list[float]]]]:
    """With and without balancing, of each step of this rank: (who its pairs are, cost of each micro-batch)."""
    directory, found = HFDirectory.open(model), {}
    with init_distributed(ParallelConfig()) as state:
        for balance in (True, False):
            settings = DataConfig(data_path=[data], global_batch_size=PAIRS, micro_batch_size=2, balance_batch=balance)
            source = BatchSource(SFTConfig(data=settings), directory, state)
            found[balance] = []
            for _ in range(STEPS):
                batches = source.next()
                assert [batch.num_pairs for batch in batches] == [2, 2]
                pairs = [
                    (int(batch.target_ids[place]), ids.tolist())
                    for batch in batches
                    for place, ids in enumerate(pieces(batch))
                ]
                found[balance].append((pairs, [step_flops([batch], directory.config, False) for batch in batches]))
            dist.barrier()
            source.close()
    return found


def pieces(batch) -> list:
    """Token ids of each pair, both sides; these pairs have no hard negatives."""
    bounds = batch.cu_seqlens.tolist()
    return [batch.input_ids[bounds[2 * place] : bounds[2 * place + 2]] for place in range(batch.num_pairs)]


def other_files(model: str, folder: str) -> str:
    with init_distributed(ParallelConfig()) as state:
        settings = DataConfig(data_path=[f"{folder}/{state.rank}/pairs.json"], global_batch_size=4)
        with pytest.raises(UserError) as caught:
            BatchSource(SFTConfig(data=settings), HFDirectory.open(model), state)
    return str(caught.value)


def test_ranks_that_read_other_files_are_refused(tmp_path):
    """A copy on one machine that is not whole: each rank would have an order of its own."""
    model = make_tiny_directory(tmp_path / "model", layers=1, vision_depth=1)
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_records(tmp_path / str(rank) / "pairs.json", [record(index) for index in range(8 - rank)])
    first, second = run_distributed(other_files, 2, str(model), str(tmp_path))
    assert first == second and "rank 1 on " in first and "1/pairs.json than rank 0" in first


def test_the_same_global_batches_more_evenly(tmp_path):
    model = make_tiny_directory(tmp_path / "model", layers=1, vision_depth=1)
    data = write_pairs(tmp_path / "data", count=40)
    ranks = run_distributed(packed_steps, RANKS, str(model), str(data))
    gains = []
    for step in range(STEPS):
        on, off = (
            (
                sorted(pair for rank in ranks for pair in rank[balance][step][0]),
                imbalance(np.array([sum(rank[balance][step][1]) for rank in ranks])),
                np.mean([imbalance(np.array(rank[balance][step][1])) for rank in ranks]),
            )
            for balance in (True, False)
        )
        assert len(on[0]) == PAIRS and on[0] == off[0]
        assert on[1] <= off[1]
        gains.append((off[1] - on[1], off[2] - on[2]))
    assert min(gain for gain, _ in gains) >= 0 and np.mean(gains, 0).min() > 0.01
