"""Delayed scaling's histories beside cached contrastive's first pass, and FP8 weights: with stand-ins, on a CPU."""

from contextlib import nullcontext
from dataclasses import replace

import umer1.megatron_import  # noqa: F401

import pytest
import torch
from data_tools import make_processor, record, write_records
from fp8_stand_in import StandInTransformerEngine
from megatron.core import tensor_parallel
from tiny_qwen2_vl import make_tiny_directory

from umer1 import device
from umer1.data.dataset import PairDataset
from umer1.data.packing import pack
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.losses.contrastive import LossConfig
from umer1.models import fp8 as fp8_module
from umer1.models.fp8 import FP8Config, fill
from umer1.models.fp8_amax import amax_kept
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.weights import unwrap
from umer1.training import schedule
from umer1.training.build import ModelConfig, build_training_model
from umer1.training.checkpoint import CheckpointConfig
from umer1.training.config import SFTConfig
from umer1.training.forward_step import SFTStep, Totals
from umer1.training.grad_cache import forward_backward
from umer1.training.optimizer import OptimizerConfig, build_optimizer

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return HFDirectory.open(make_tiny_directory(tmp_path_factory.mktemp("fp8") / "tiny", layers=2, vision_depth=1))


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    path = write_records(tmp_path_factory.mktemp("data") / "a.json", [record(index) for index in range(4)])
    dataset = PairDataset(path, None, make_processor())
    return [pack([dataset[2 * part], dataset[2 * part + 1]], 16) for part in range(2)]


def train(tiny, batches, monkeypatch, *, first_pass, recompute, algorithm="max", steps=2):
    """(histories and scales after each step, losses, gradients, the stand-in) of SFT steps on stand-in modules."""
    engine = StandInTransformerEngine(history_length=3, algorithm=algorithm)
    parallel = ParallelConfig(recompute_granularity="full" if recompute else None)
    monkeypatch.setattr(tensor_parallel, "checkpoint", engine.checkpoint(tensor_parallel.checkpoint))
    monkeypatch.setattr(schedule, "amax_kept", lambda models: first_pass(engine, models))
    with init_distributed(parallel) as state:
        models = build_training_model(ModelConfig(fp32=True), parallel, tiny, state)
        decoder = unwrap(models[0]).decoder
        for name, module in decoder.named_modules():
            if name.rsplit(".", 1)[-1] in LINEARS:
                engine.install(module)
        engine.autocast(decoder)
        supervised = torch.cat([batch.supervised_sides for batch in batches])
        totals = Totals(4, (int((supervised == 0).sum()), int((supervised == 1).sum())))
        states, losses = [], []
        for _ in range(steps):
            models[0].zero_grad_buffer()
            step = SFTStep(LossConfig(), totals, state.groups.dp, train_vision=False)
            losses.append(forward_backward(models, batches, step, state, several=True))
            engine.end_backward()
            states.append(engine.state())
            with torch.no_grad():  # so that the next step's values differ
                for parameter in models[0].parameters():
                    if parameter.requires_grad:
                        parameter -= 0.5 * parameter.main_grad
        gradients = [p.main_grad.clone() for p in models[0].parameters() if p.requires_grad]
    return states, torch.stack(losses), gradients, engine


def blind(engine, models):
    """The reference: modules that see nothing of the first pass."""

    class Blind:
        def __enter__(self):
            engine.blind = True

        def __exit__(self, *error):
            engine.blind = False

    return Blind()


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_first_pass_leaves_histories_alone(tiny, batches, recompute, algorithm):
    def run(first_pass):
        with pytest.MonkeyPatch.context() as patch:
            return train(tiny, batches, patch, first_pass=first_pass, recompute=recompute, algorithm=algorithm)

    states, losses, gradients, engine = run(lambda engine, models: amax_kept(models))
    wanted_states, wanted_losses, wanted_gradients, _ = run(blind)
    assert any(float(tensor.abs().max()) not in (0.0, 1.0) for tensor in states[-1])
    torch.testing.assert_close(states, wanted_states, rtol=0, atol=0)
    torch.testing.assert_close(losses, wanted_losses, rtol=0, atol=0)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=0, atol=0)
    assert all(not module.aside and module.training for module in engine.modules)
    # The stand-in does feel a first pass that nothing guards: with other scales, and with copies that nobody takes.
    unguarded_states, _, _, unguarded = run(lambda engine, models: nullcontext())
    same = [torch.equal(a, b) for a, b in zip(unguarded_states[0], wanted_states[0], strict=True)]
    assert not all(same)
    assert bool(unguarded.modules[0].aside) == recompute


def test_a_failed_pass_leaves_modules_in_training():
    linear = torch.nn.Linear(2, 2)
    linear.fp8_meta = {}
    with pytest.raises(RuntimeError), amax_kept([linear]):
        assert not linear.training
        raise RuntimeError("out of memory")
    assert linear.training


def test_delayed_and_param_gather_reach_megatron(tiny):
    fp8 = FP8Config(
        fp8_format="hybrid",
        fp8_recipe="delayed",
        fp8_amax_history_len=16,
        fp8_amax_compute_algo="max",
        fp8_param_gather=True,
    )
    assert replace(fp8, fp8_param_gather=False).violations() == []
    with init_distributed(ParallelConfig()) as state:
        models = build_training_model(
            ModelConfig(bf16=True), ParallelConfig(), tiny, state, weights_follow=True, fp8=fp8
        )
        for config in (models[0].module.config, models[0].module.decoder.layers[0].mlp.linear_fc1.config):
            assert (config.fp8_recipe, config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (
                "delayed",
                16,
                "max",
            )
            assert config.fp8_param and config.tp_only_amax_red
        assert models[0].ddp_config.fp8_param_gather
        assert not any(
            getattr(getattr(module, "config", None), "fp8_param", False) for module in models[0].module.vision.modules()
        )
        optimizer, _ = build_optimizer(OptimizerConfig(), models, use_distributed_optimizer=True)
        assert optimizer.config.fp8_recipe == "delayed"
    with init_distributed(ParallelConfig()) as state:
        models = build_training_model(
            ModelConfig(bf16=True), ParallelConfig(), tiny, state, weights_follow=True, fp8=FP8Config()
        )
        assert not models[0].ddp_config.fp8_param_gather
        assert build_optimizer(OptimizerConfig(), models, use_distributed_optimizer=True)[0].config.fp8_recipe is None


def test_refusals_between_sections(tmp_path):
    delayed = FP8Config(fp8_format="e4m3", fp8_recipe="delayed")
    assert SFTConfig(fp8=delayed, checkpoint=CheckpointConfig(save=str(tmp_path))).violations() == []
    gather = FP8Config(fp8_format="hybrid", fp8_param_gather=True)
    assert SFTConfig(fp8=gather).violations() == []
    config = SFTConfig(
        model=ModelConfig(export_hf="out"),
        fp8=gather,
        checkpoint=CheckpointConfig(save=str(tmp_path / "save"), load=str(tmp_path)),
    )
    assert config.violations() == []
    config.parallel.use_distributed_optimizer = False
    config.optimizer.optimizer_cpu_offload = True
    offload, distributed, _ = config.violations()
    assert "optimizer_cpu_offload" in offload and "needs use_distributed_optimizer" in distributed
    for length, algorithm, legal in ((1, "max", True), (2, "most_recent", True), (2, "max", False)):
        options = dict(fp8_recipe="delayed", fp8_amax_history_len=length, fp8_amax_compute_algo=algorithm)
        assert FP8Config(fp8_format="hybrid", **options).violations() == []
        found = FP8Config(fp8_format="hybrid", fp8_param_gather=True, **options).violations()
        assert len(found) == (not legal) and all("needs fp8_amax_compute_algo=most_recent" in each for each in found)
    wrong = FP8Config(
        fp8_format="hybrid",
        fp8_recipe="delayed",
        fp8_amax_history_len=0,
        fp8_amax_compute_algo="mean",
        first_last_layers_bf16=True,
    )
    assert [problem.split("=")[0] for problem in wrong.violations()] == [
        "fp8_amax_compute_algo",
        "fp8_amax_history_len",
        "fp8_recipe",
    ]
    assert "mxfp8" in FP8Config(fp8_format="e4m3", fp8_recipe="mxfp8", fp8_param_gather=True).violations()[0]
    assert FP8Config(fp8_param_gather=True).violations() == ["fp8_param_gather means nothing without fp8_format"]


def test_old_transformer_engine(monkeypatch):
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(device, "has_te", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(fp8_module, "get_te_version", lambda: "2.1.0")
    monkeypatch.setattr(fp8_module, "is_te_min_version", lambda least: least <= "2.1.0")
    config = FP8Config(fp8_format="hybrid", fp8_recipe="delayed")
    assert config.machine_violations() == []
    config.fp8_param_gather = True
    (problem,) = config.machine_violations()
    assert "with fp8_param_gather needs transformer_engine 2.2.0" in problem
    (problem,) = FP8Config(fp8_format="hybrid", fp8_recipe="blockwise").machine_violations()
    assert "2.3.0" in problem and "2.1.0" in problem


def test_fp8_weight_starts_the_optimizer_from_unrounded_values():
    """Transformer Engine keeps a weight's initial values, here zeros, and the optimizer would start from them."""
    weight, values = torch.zeros(2, 3), torch.randn(2, 3)
    kept = torch.zeros(2, 3)
    weight.get_high_precision_init_val = lambda: kept
    fill(weight, values)
    assert torch.equal(weight, values) and torch.equal(kept, values)
    plain = torch.zeros(2, 3)
    fill(plain, values)
    assert torch.equal(plain, values)
