"""FP8 in the plan: tensors of one layer counted by hand, the ends in bf16, and both stages' totals."""

import pytest
import torch

from umer1.distributed.parallel import ParallelConfig
from umer1.models.fp8 import FP8Config
from umer1.plan.activations import decoder_layer
from umer1.plan.fp8 import weight_bytes
from umer1.plan.grpo_memory import grpo_memory
from umer1.plan.hardware import find_hardware
from umer1.plan.parameters import stage_parameters
from umer1.plan.setup import Setup
from umer1.plan.sft_memory import sft_memory
from umer1.plan.shapes import SHAPES
from umer1.plan.workload import PolicyWork, Side, imagine
from umer1.training.build import ModelConfig
from umer1.training.config import SFTConfig
from umer1.training.policy_config import GRPOConfig

MODEL = SHAPES["qwen2-vl-2b"]
H, Q, K, F, LAYERS = 1536, 1536, 256, 8960, 28
MATRICES = H * (Q + 2 * K) + Q * H + 2 * F * H + F * H


@pytest.mark.parametrize(
    ("recipe", "of_weight", "of_input"),
    [("tensorwise", 1, 1), ("delayed", 1, 1), ("blockwise", 1 + 4 / 16384, 1 + 4 / 128), ("mxfp8", 33 / 32, 33 / 32)],
)
def test_a_layer_by_hand(recipe, of_weight, of_input):
    fp8, tokens = FP8Config(fp8_format="hybrid", fp8_recipe=recipe), 640
    chunks = stage_parameters(MODEL, ParallelConfig(), 0, False)
    assert weight_bytes(fp8, chunks, LAYERS) == pytest.approx(LAYERS * MATRICES * 2 * of_weight, rel=1e-9)
    fp8.fp8_param_gather = True  # one of both copies is the weight itself
    assert weight_bytes(fp8, chunks, LAYERS) == pytest.approx(LAYERS * MATRICES * (2 * of_weight - 1), abs=1)
    bounds = torch.tensor([0, 400, tokens], dtype=torch.int32)
    layer = decoder_layer(MODEL, ParallelConfig(), bounds, itemsize=2, kernel="te", fp8=fp8)
    # both norms' outputs and the MLP's product in FP8 instead of bf16; the attention's output also in FP8
    assert layer.fp8_change == pytest.approx(tokens * ((of_input - 2) * (2 * H + F) + of_input * Q), abs=1)
    assert FP8Config(fp8_recipe=recipe).fp8_format is None
    plain = decoder_layer(MODEL, ParallelConfig(), bounds, itemsize=2, kernel="te", fp8=FP8Config())
    assert plain.fp8_change == 0 and plain.saved == layer.saved


def test_tensor_and_sequence_parallel_ranks_have_their_part():
    fp8, tokens = FP8Config(fp8_format="e4m3"), 640
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    layer = decoder_layer(MODEL, parallel, bounds, itemsize=2, kernel="te", fp8=fp8)
    assert layer.fp8_change == tokens // 2 * (Q - 2 * H - F)
    assert weight_bytes(fp8, stage_parameters(MODEL, parallel, 0, False), LAYERS) == LAYERS * MATRICES


def _peaks(stage, fp8, recompute):
    config = {"sft": SFTConfig, "grpo": GRPOConfig}[stage](
        model=ModelConfig(bf16=True), fp8=fp8, parallel=ParallelConfig(**recompute)
    )
    setup = Setup(model=MODEL, config=config, world_size=1, hardware=find_hardware("h100"))
    batch = imagine(MODEL, [Side(text=200, response=100, patches=256)] * 4, pad_to_multiple=16)
    if stage == "sft":
        return sft_memory(setup, 0, [batch, batch]), len(batch.input_ids)
    works = [PolicyWork(batch=batch, new=batch)]
    return grpo_memory(setup, 0, works), len(batch.input_ids)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_step_takes_the_copies_and_keeps_less(stage):
    plain, tokens = _peaks(stage, FP8Config(), {})
    fp8, _ = _peaks(stage, FP8Config(fp8_format="hybrid"), {})
    ends = FP8Config(fp8_format="hybrid", first_last_layers_bf16=True, num_layers_at_end_in_bf16=2)
    partly, _ = _peaks(stage, ends, {})
    each = tokens * (Q - 2 * H - F)
    assert "FP8 weights" not in plain.parts
    for line, layers in ((fp8, LAYERS), (partly, LAYERS - 3)):
        assert line.parts["FP8 weights"] == 2 * layers * MATRICES
        assert line.parts["activations"] - plain.parts["activations"] == layers * each
        assert line.peak - plain.peak == layers * (2 * MATRICES + each)


@pytest.mark.parametrize(
    ("recompute", "kept"),
    [
        ({"recompute_granularity": "selective"}, LAYERS),
        ({"recompute_granularity": "full"}, 0),
        ({"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 20}, 8),
    ],
)
def test_recomputed_layers_keep_their_input_in_bf16(recompute, kept):
    plain, tokens = _peaks("sft", FP8Config(), recompute)
    fp8, _ = _peaks("sft", FP8Config(fp8_format="hybrid"), recompute)
    assert fp8.parts["activations"] - plain.parts["activations"] == kept * tokens * (Q - 2 * H - F)
