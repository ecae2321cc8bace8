"""The plan's parameters, gradient buffers and optimizer states against megatron's real objects, to the byte."""

import pytest
from plan_world import held, tiny_shape

from umer1.distributed.parallel import ParallelConfig
from umer1.plan.buffers import state_bytes
from umer1.plan.host import snapshot_bytes
from umer1.plan.parameters import stage_parameters
from umer1.plan.shapes import SHAPES
from umer1.testing import run_distributed
from umer1.training.build import ModelConfig

FP32, BF16 = ModelConfig(fp32=True), ModelConfig(bf16=True)
TIED, UNTIED = tiny_shape(), tiny_shape(tied=False)
PIPELINE = {"pipeline_model_parallel_size": 2}
CASES = [
    (TIED, {}, FP32),
    (TIED, {}, BF16),
    (TIED, {"use_distributed_optimizer": False}, BF16),
    (TIED, {"overlap_grad_reduce": True, "overlap_param_gather": True}, BF16),
    (UNTIED, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, BF16),
    (TIED, {"tensor_model_parallel_size": 2}, ModelConfig(fp32=True, train_vision=True)),
    (TIED, PIPELINE | {"decoder_first_pipeline_num_layers": 1}, FP32),
    (UNTIED, PIPELINE | {"num_layers_per_virtual_pipeline_stage": 1}, BF16),
    (TIED, PIPELINE | {"num_layers_per_virtual_pipeline_stage": 1, "overlap_grad_reduce": True}, BF16),
]


@pytest.fixture(scope="module")
def ranks():
    """For each of two ranks what it holds in each case."""
    return run_distributed(held, 2, CASES)


def test_states_are_the_real_ones(ranks):
    for rank, found in enumerate(ranks):
        for (config, layout, model), real in zip(CASES, found, strict=True):
            where = f"{layout} {model.params_dtype}, rank {rank}"
            parallel = ParallelConfig(**layout)
            chunks = stage_parameters(config, parallel, real["stage"], model.train_vision)
            planned = [[(each.name, each.numel, each.trained) for each in chunk] for chunk in chunks]
            assert [
                _global(mine, theirs) for mine, theirs in zip(real["parameters"], planned, strict=True)
            ] == planned, where
            states = state_bytes(
                chunks,
                parallel,
                stage=real["stage"],
                dp=real["dp"],
                itemsize=model.params_dtype.itemsize,
                dp_rank=real["dp_rank"],
            )
            got = (states.parameters, states.gradients, states.main_weights, states.moments)
            names = ("parameter_bytes", "gradient_bytes", "main_bytes", "moment_bytes")
            assert dict(zip(names, got, strict=True)) == {name: real[name] for name in names}, where


def test_snapshots_are_the_real_ones(ranks):
    """Of each stage the data-parallel rank that copies most, to the byte."""
    for number, (config, layout, model) in enumerate(CASES):
        parallel, real = ParallelConfig(**layout), [found[number] for found in ranks]
        for stage in {each["stage"] for each in real}:
            planned = snapshot_bytes(
                stage_parameters(config, parallel, stage, model.train_vision),
                stage=stage,
                dp=real[0]["dp"],
                itemsize=model.params_dtype.itemsize,
                distributed=parallel.use_distributed_optimizer,
            )
            most = max(each["snapshot_bytes"] for each in real if each["stage"] == stage)
            assert planned == most, f"{layout} {model.params_dtype}, stage {stage}"


def _global(real: list[tuple], planned: list[tuple]) -> list[tuple]:
    """Megatron numbers a stage's layers from 0; the plan's names have the numbers of the whole decoder."""
    firsts = [int(name.split(".")[2]) for name, _, _ in planned if name.startswith("decoder.layers.")]
    offset = min(firsts)
    renamed = []
    for name, *rest in real:
        if name.startswith("decoder.layers."):
            parts = name.split(".")
            parts[2] = str(int(parts[2]) + offset)
            name = ".".join(parts)
        renamed.append((name, *rest))
    return renamed


def test_published_sizes():
    """2B: 2,208,985,600 parameters, 7B: 8,291,375,616, as the Hub's model files have them."""
    for name, want in (("qwen2-vl-2b", 2_208_985_600), ("qwen2-vl-7b", 8_291_375_616)):
        (whole,) = stage_parameters(SHAPES[name], ParallelConfig(), 0, train_vision=True)
        assert SHAPES[name].violations() == []
        assert sum(parameter.numel for parameter in whole) == want
