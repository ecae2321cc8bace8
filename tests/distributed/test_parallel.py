"""Layout rules and process groups."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist

from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.errors import ConfigError
from umer1.models.qwen2_vl.config import Qwen2VLConfig, VisionConfig
from umer1.testing import run_distributed

# The published 2B: 12 heads, 2 KV heads, 28 layers, 16 ViT heads.
MODEL = Qwen2VLConfig(
    hidden_size=1536,
    num_layers=28,
    num_attention_heads=12,
    num_query_groups=2,
    ffn_hidden_size=8960,
    vocab_size=151936,
    vision=VisionConfig(hidden_size=1536),
)


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        (dict(context_parallel_size=2), 2, "context_parallel_size=2 is not supported; use 1"),
        (dict(tensor_model_parallel_size=0), 1, "tensor_model_parallel_size=0 must be at least 1"),
        (dict(tensor_model_parallel_size=2), 3, "must divide the number of processes, 3; start 2 processes"),
        (dict(tensor_model_parallel_size=4), 4, "=4 does not divide num_key_value_heads=2; use 1 or 2"),
        (
            dict(tensor_model_parallel_size=32, vision_data_parallel=False),
            32,
            "=32 does not divide num_attention_heads=12, num_key_value_heads=2, vision num_heads=16; use 1 or 2",
        ),
        (dict(sequence_parallel=True), 1, "sequence_parallel needs tensor_model_parallel_size of 2 or more"),
        (dict(pipeline_model_parallel_size=3), 3, "does not divide the 28 layers; use 1 or 2 or 4 or 7 or 14 or 28"),
        (dict(decoder_first_pipeline_num_layers=9), 1, "needs pipeline_model_parallel_size of 2 or more"),
        (
            dict(pipeline_model_parallel_size=3, decoder_first_pipeline_num_layers=9),
            3,
            "leave 19 of 28 layers to 2 other stages",
        ),
        (
            dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=5),
            2,
            "must divide the 14 layers of a stage into two or more parts; use 1 or 2 or 7",
        ),
        (dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=14), 2, "two or more parts"),
        (
            dict(
                pipeline_model_parallel_size=2,
                num_layers_per_virtual_pipeline_stage=2,
                decoder_last_pipeline_num_layers=10,
            ),
            2,
            "can't be combined with virtual stages",
        ),
        (dict(recompute_method="block"), 1, "recompute_method=block needs recompute_granularity=full"),
        (
            dict(recompute_granularity="full", recompute_num_layers=4, pipeline_model_parallel_size=2),
            2,
            r"must divide the layers of each stage \(14\).*use 1 or 2 or 7 or 14",
        ),
        (dict(overlap_param_gather=True), 1, "needs use_distributed_optimizer and overlap_grad_reduce"),
        (dict(cuda_graph_impl="local"), 1, "cuda_graph_impl=local is not supported.*use none"),
    ],
)
def test_refused(settings, world_size, message):
    problems = ParallelConfig(**settings).violations(MODEL, world_size)
    assert len(problems) == 1
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(problems)


@pytest.mark.parametrize(
    ("given", "world_size", "gpu", "resolved"),
    [
        ({}, 8, True, (True, True)),
        ({}, 8, False, (False, False)),
        ({"tensor_model_parallel_size": 4}, 4, True, (False, False)),
        ({"use_distributed_optimizer": False}, 8, True, (False, False)),
        ({"overlap_param_gather": False}, 8, True, (True, False)),
        ({"overlap_grad_reduce": False}, 8, True, (False, False)),
        ({"overlap_grad_reduce": True, "overlap_param_gather": True}, 2, False, (True, True)),
    ],
)
def test_what_is_overlapped_by_default(given, world_size, gpu, resolved):
    config = ParallelConfig(**given)
    config.resolve(world_size, gpu=gpu)
    assert (config.overlap_grad_reduce, config.overlap_param_gather) == resolved
    assert config.violations(world_size=world_size) == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=4),
        dict(pipeline_model_parallel_size=3, decoder_first_pipeline_num_layers=8),
        dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=9, decoder_last_pipeline_num_layers=19),
        dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=7),
        dict(recompute_granularity="full", recompute_num_layers=5, recompute_method="block"),
        dict(recompute_granularity="full", recompute_num_layers=7, pipeline_model_parallel_size=2),
    ],
)
def test_legal(settings):
    assert ParallelConfig(**settings).violations(MODEL, 24) == []


def test_virtual_stages_per_rank():
    config = ParallelConfig(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=7)
    assert config.virtual_pipeline_size(28) == 2
    assert ParallelConfig().virtual_pipeline_size(28) is None


def test_a_plain_process_is_a_world_of_one_and_seeded():
    draws = []
    for _ in range(2):
        with init_distributed(ParallelConfig(), seed=7) as state:
            assert (state.world_size, state.tp_size, state.pp_size, state.dp_size) == (1, 1, 1, 1)
            assert state.is_first_stage and state.is_last_stage
            state.barrier()
            draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        assert not dist.is_initialized()
    assert draws[0] == draws[1]


def places() -> tuple:
    with init_distributed(ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)) as state:
        tensor = torch.tensor([2.0**state.rank])
        dist.all_reduce(tensor, group=state.groups.tp)
        place = (state.tp_rank, state.pp_rank, state.dp_size, state.is_last_stage, state.last_stage_rank)
    with pytest.raises(ConfigError, match="must divide the number of processes, 4"):
        with init_distributed(ParallelConfig(tensor_model_parallel_size=3)):
            raise AssertionError("a layout of 3 on 4 processes was let in")
    assert dist.is_initialized()
    return place, tensor.item()


def test_places_and_groups_of_four_processes():
    assert run_distributed(places, 4) == [
        ((0, 0, 1, False, 2), 3.0),
        ((1, 0, 1, False, 3), 3.0),
        ((0, 1, 1, True, 2), 12.0),
        ((1, 1, 1, True, 3), 12.0),
    ]
