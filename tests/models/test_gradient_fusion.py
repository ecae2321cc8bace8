"""Weights' gradients added up by the products themselves, with a stand-in for apex's kernel on the CPU."""

from types import SimpleNamespace

import umer1.megatron_import  # noqa: F401

import pytest
import torch
from data_tools import make_processor, record, record_side, write_picture, write_records
from megatron.core.tensor_parallel import layers
from tiny_qwen2_vl import make_tiny_directory

from umer1 import device
from umer1.data.dataset import PairDataset
from umer1.data.packing import pack
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.losses.contrastive import LossConfig
from umer1.models.backend import for_own_linears
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.megatron_config import decoder_config
from umer1.testing import assert_close
from umer1.training.build import ModelConfig, build_training_model
from umer1.training.config import SFTConfig, machine_violations
from umer1.training.forward_step import SFTStep, Totals
from umer1.training.grad_cache import forward_backward


def test_gradients_are_those_of_autograd(tmp_path, monkeypatch):
    """Two micro-batches, one of them without pictures; the head and the norms go through autograd in both cases."""
    tiny = HFDirectory.open(make_tiny_directory(tmp_path / "tiny", layers=2, vision_depth=1))
    records = [record(index) for index in range(3)]
    records[0]["qry"] = record_side("<image>a query", image=write_picture(tmp_path, "a.png", 56, 84, seed=0))
    dataset = PairDataset(write_records(tmp_path / "a.json", records), None, make_processor())
    batches = [pack([dataset[0], dataset[1]]), pack([dataset[2]])]
    supervised = torch.cat([batch.supervised_sides for batch in batches])
    totals = Totals(3, (int((supervised == 0).sum()), int((supervised == 1).sum())))
    shapes = []

    def stand_in_wgrad_gemm_accum_fp32(x, gradient, main_grad):
        shapes.append(main_grad.shape)
        main_grad.addmm_(gradient.t(), x)

    monkeypatch.setattr(device, "has_apex_gradient_kernel", lambda: True)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=stand_in_wgrad_gemm_accum_fp32)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernel, raising=False)
    found = []
    for fused in (False, True):
        parallel = ParallelConfig(gradient_accumulation_fusion=fused)
        with init_distributed(parallel) as state:
            models = build_training_model(ModelConfig(fp32=True, train_vision=True), parallel, tiny, state)
            assert not models[0].module.output_layer.gradient_accumulation_fusion
            step = SFTStep(LossConfig(), totals, state.groups.dp, train_vision=True)
            forward_backward(models, batches, step, state, several=True)
            found.append({name: parameter.main_grad.clone() for name, parameter in models[0].named_parameters()})
            assert fused == bool(shapes)
    # 4 products in each of 2 decoder layers twice; 4 of the ViT's layer and 2 of the merger once
    assert len(shapes) == 2 * 2 * 4 + 4 + 2
    for name, gradient in found[0].items():
        assert_close(name, found[1][name], gradient, rtol=1e-5)


def test_without_the_kernel_only_transformer_layers_fuse(monkeypatch):
    tiny = HFDirectory.open(ModelConfig().source, weights=False)
    config = decoder_config(tiny.config, ParallelConfig(gradient_accumulation_fusion=True), torch.bfloat16)
    assert config.gradient_accumulation_fusion
    monkeypatch.setattr(device, "has_apex_gradient_kernel", lambda: True)
    assert for_own_linears(config) is config
    monkeypatch.setattr(device, "has_apex_gradient_kernel", lambda: False)
    assert not for_own_linears(config).gradient_accumulation_fusion and config.gradient_accumulation_fusion


@pytest.mark.parametrize(("te", "apex"), [(False, False), (True, False), (False, True)])
def test_machine(monkeypatch, te, apex):
    monkeypatch.setattr(device, "has_te", lambda: te)
    monkeypatch.setattr(device, "has_apex_gradient_kernel", lambda: apex)
    assert machine_violations(SFTConfig()) == []
    for bf16 in (True, False):  # Transformer Engine has no part in fp32
        model, parallel = ModelConfig(bf16=bf16, fp32=not bf16), ParallelConfig(gradient_accumulation_fusion=True)
        found = machine_violations(SFTConfig(model=model, parallel=parallel))
        assert len(found) == (not (te and bf16) and not apex) and all("or with apex" in line for line in found)
