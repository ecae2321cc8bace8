"""What a tensor-parallel peer gets of its source's prompts, and how much is sent for it."""

import pickle

import torch
from grpo_reference import write_rl_pairs
from tiny_qwen2_vl import make_tiny_directory

from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.testing import run_distributed
from umer1.training import prompt_source
from umer1.training.policy_config import GRPOConfig


def _share(model, data, tensor_parallel: int, pipeline_parallel: int):
    config = GRPOConfig()
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor_parallel, pipeline_model_parallel_size=pipeline_parallel
    )
    sizes, send = [], prompt_source.send_to_peers
    prompt_source.send_to_peers = lambda value, state: (sizes.append(len(pickle.dumps(value))), send(value, state))[1]
    with init_distributed(parallel, seed=0) as state:
        config.data.data_path = [str(data)]
        config.data.seq_length, config.rollout.max_completion_length = 512, 16
        pairs = []
        if state.rank == 0:
            dataset = prompt_source.open_prompts(config, HFDirectory.open(model), str(data), None)
            pairs = [dataset[number] for number in range(len(dataset))]
        patches = sum(side.sequence.pixel_values.nbytes for pair in pairs for side in (pair.query, pair.positive))
        got, failure = prompt_source.share_pairs(pairs, None, state)
    assert failure is None
    return got, sizes, patches


def _check(processes: int, model, data, *layout: int, all_have_patches: bool):
    (source, sizes, patches), *others = run_distributed(_share, processes, model, data, *layout)
    assert patches > 100_000 and sizes[0] < patches / 2, "patches travel once, beside the rest"
    for peer, _, _ in others:
        for mine, theirs in zip(peer, source, strict=True):
            for got, want in ((mine.query, theirs.query), (mine.positive, theirs.positive)):
                assert torch.equal(got.sequence.input_ids, want.sequence.input_ids)
                assert torch.equal(got.sequence.position_ids, want.sequence.position_ids)
                assert all((a == b).all() for a, b in zip(got.images, want.images, strict=True))
                if all_have_patches:
                    assert torch.equal(got.sequence.pixel_values, want.sequence.pixel_values)
                else:
                    assert got.sequence.pixel_values.shape == (0, want.sequence.pixel_values.shape[1])


def test_tensor_and_pipeline_parallel_peers(tmp_path):
    model, data = make_tiny_directory(tmp_path / "model"), write_rl_pairs(tmp_path / "data", 8)
    _check(2, model, data, 2, 1, all_have_patches=True)
    _check(2, model, data, 1, 2, all_have_patches=False)
