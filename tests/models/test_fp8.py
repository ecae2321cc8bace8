"""FP8's settings, refusals and padding, as far as they go without a GPU; no product is made in FP8 here."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from data_tools import make_processor, record, record_side, write_picture, write_records
from tiny_qwen2_vl import make_tiny_directory

from umer1 import device
from umer1.data.dataset import PairDataset
from umer1.data.packing import pack
from umer1.data.schema import Prompt, PromptPair, Sequence
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.losses.contrastive import LossConfig
from umer1.models import fp8 as fp8_module
from umer1.models.fp8 import FP8Config
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.megatron_config import decoder_config
from umer1.rl.types import Completion
from umer1.training.build import ModelConfig, build_training_model
from umer1.training.config import SFTConfig
from umer1.training.forward_step import SFTStep, Totals
from umer1.training.grad_cache import forward_backward
from umer1.training.policy_batches import Round, SpecialIds
from umer1.training.policy_config import GRPOConfig
from umer1.training.scoring import Scorer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return HFDirectory.open(make_tiny_directory(tmp_path_factory.mktemp("fp8") / "tiny", layers=2, vision_depth=1))


def test_settings_reach_the_decoder_alone(tiny):
    fp8 = FP8Config(fp8_format="hybrid", first_last_layers_bf16=True, num_layers_at_end_in_bf16=2)
    with init_distributed(ParallelConfig()) as state:
        (model,) = build_training_model(
            ModelConfig(bf16=True), ParallelConfig(), tiny, state, weights_follow=True, fp8=fp8
        )
        core = model.module
        for config in (core.config, core.decoder.config, core.decoder.layers[0].mlp.linear_fc1.config):
            assert (config.fp8, config.fp8_recipe) == ("hybrid", "tensorwise")
            assert config.first_last_layers_bf16
            assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 2)
        assert all(
            module.config.fp8 is None for module in core.vision.modules() if getattr(module, "config", None) is not None
        )
    assert decoder_config(tiny.config, ParallelConfig(), torch.bfloat16, FP8Config()).fp8 is None


def test_every_violation_at_once(tiny):
    config = SFTConfig(
        model=ModelConfig(fp32=True),
        fp8=FP8Config(fp8_format="e5m2", fp8_recipe="slow", num_layers_at_start_in_bf16=-1),
    )
    text = "\n".join(config.violations())
    for part in ("fp8_format='e5m2'", "fp8_recipe='slow'", "num_layers_at_start_in_bf16=-1", "fp32 are both set"):
        assert part in text
    assert "without fp8_format" in FP8Config(first_last_layers_bf16=True).violations()[0]
    assert FP8Config().violations() == FP8Config().machine_violations() == []
    deep = SFTConfig(
        fp8=FP8Config(fp8_format="hybrid", first_last_layers_bf16=True, num_layers_at_end_in_bf16=3),
    )
    assert any("num_layers_at_end_in_bf16=3 must be at most 2" in p for p in deep.layout_violations(tiny.config, 1))


def test_widths_that_no_fp8_product_takes():
    """28 heads of 24 over four ranks: 7 heads are 168 wide, no multiple of 16."""
    model = HFDirectory.open(ModelConfig().source, weights=False).config
    model = replace(model, hidden_size=672, ffn_hidden_size=192, num_attention_heads=28, num_query_groups=4)
    fp8 = FP8Config(fp8_format="hybrid")
    assert fp8.model_violations(model, 1, 1) == []
    (heads, together) = fp8.model_violations(model, 4, 1)
    assert "the attention's heads has 168 on each of tensor_model_parallel_size=4" in heads and "216" in together
    fp8.fp8_recipe = "mxfp8"
    assert any("multiples of 32; the FFN has 48" in problem for problem in fp8.model_violations(model, 4, 1))
    assert FP8Config().model_violations(model, 4, 1) == []


@pytest.mark.parametrize("recipe, least", [("tensorwise", (8, 9)), ("blockwise", (9, 0)), ("mxfp8", (10, 0))])
def test_machine(monkeypatch, recipe, least):
    config = FP8Config(fp8_format="hybrid", fp8_recipe=recipe)
    assert config.violations() == []
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    assert config.machine_violations() == ["fp8_format needs a CUDA device; this process has none"]
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(device, "has_te", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    package, chip = config.machine_violations()
    assert "transformer_engine" in package and f"{least[0]}.{least[1]}" in chip
    monkeypatch.setattr(device, "has_te", lambda: True)
    monkeypatch.setattr(fp8_module, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: least)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert config.machine_violations() == []
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    told = [f"fp8_recipe={recipe} needs CUDA 12.9 or above; torch has 12.8"] if recipe == "blockwise" else []
    assert config.machine_violations() == told
    assert len(config.device_violations("a card", (12, 0))) == (recipe == "mxfp8")
    assert FP8Config(fp8_format="hybrid", fp8_recipe="int8").machine_violations() == []  # told by `violations`


def test_token_multiples():
    multiples = {recipe: FP8Config(fp8_format="e4m3", fp8_recipe=recipe) for recipe in ("tensorwise", "mxfp8")}
    assert multiples["tensorwise"].token_multiple(1) == 16
    assert multiples["mxfp8"].token_multiple(4) == 128
    assert FP8Config().token_multiple(4) == 4


def test_grpo_has_the_same_rules_and_none_of_the_fp8_weights():
    fp8 = FP8Config(fp8_format="hybrid", fp8_param_gather=True)
    found = "\n".join(GRPOConfig(model=ModelConfig(fp32=True), fp8=fp8).violations())
    assert "fp8_format and fp32 are both set" in found and "fp8_param_gather is for SFT" in found
    assert GRPOConfig(fp8=FP8Config(fp8_format="hybrid", fp8_recipe="delayed")).violations() == []


def test_rollouts_are_padded_as_the_recipe_needs(tiny):
    """Also the micro-batch of a rank that has no rollouts."""
    config = GRPOConfig(fp8=FP8Config(fp8_format="hybrid"))
    nothing = dict(pixel_values=torch.zeros(0, 1176), grid_thw=torch.zeros(0, 3, dtype=torch.int64), gen_index=-1)
    prompts = []
    for length in (5, 9):
        ids = torch.arange(length) + 10
        places = dict(position_ids=ids.expand(3, -1).clone(), disc_index=length - 1, prompt_length=length)
        prompts.append(Prompt(Sequence(input_ids=ids, labels=torch.full_like(ids, -100), **places, **nothing)))
    answers = [Completion([20] * length, np.zeros(length, np.float32), "stop") for length in (3, 7, 4, 5)]
    round_ = Round([PromptPair(*prompts, index=0, slot=0)], answers, 2)
    with init_distributed(ParallelConfig()) as state:
        scorer = Scorer(config, SpecialIds(1, 2, (3, 4)), None, state)
        (batch,) = scorer.batches(round_, [0])
        (empty,) = scorer.batches(round_, [])
    assert len(batch.input_ids) == 48 and int(batch.cu_seqlens[-2]) == 2 * (5 + 9) + 3 + 7 + 4 + 5
    assert len(empty.input_ids) == 16 and not empty.rollouts
    for each in (batch, empty):
        assert int(each.cu_seqlens[-1]) == len(each.input_ids) == each.position_ids.shape[1]
        assert each.max_seqlen == int(each.cu_seqlens.diff().max())


def test_padding_changes_neither_loss_nor_gradients(tiny, tmp_path):
    records = [record(index) for index in range(3)]
    records[0]["qry"] = record_side("<image>a query", image=write_picture(tmp_path, "a.png", 56, 84, seed=0))
    dataset = PairDataset(write_records(tmp_path / "a.json", records), None, make_processor())
    pairs = [dataset[index] for index in range(3)]
    found = []
    with init_distributed(ParallelConfig()) as state:
        for multiple in (1, 512):
            models = build_training_model(ModelConfig(fp32=True), ParallelConfig(), tiny, state)
            batches = [pack(pairs[:2], multiple), pack(pairs[2:], multiple)]
            assert all(len(batch.input_ids) % multiple == 0 for batch in batches)
            supervised = torch.cat([batch.supervised_sides for batch in batches])
            totals = Totals(3, (int((supervised == 0).sum()), int((supervised == 1).sum())))
            step = SFTStep(LossConfig(), totals, state.groups.dp, train_vision=False)
            numbers = forward_backward(models, batches, step, state, several=True)
            gradients = {name: p.main_grad.clone() for name, p in models[0].named_parameters() if p.requires_grad}
            found.append((numbers, gradients))
    (numbers, gradients), (padded_numbers, padded_gradients) = found
    torch.testing.assert_close(padded_numbers, numbers, rtol=1e-5, atol=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(padded_gradients[name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=name)
