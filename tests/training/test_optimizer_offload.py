"""AdamW in host memory moves the weights as megatron's own optimizer does, clipped by the same norm, in any layout."""

import pytest
import torch
from tiny_qwen2_vl import make_tiny_directory

from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.testing import assert_close, run_distributed
from umer1.training.build import ModelConfig, build_training_model
from umer1.training.config import SFTConfig
from umer1.training.optimizer import OptimizerConfig, build_optimizer, step_if_finite

LAYOUTS = [{}, {"tensor_model_parallel_size": 2}, {"overlap_grad_reduce": True, "overlap_param_gather": True}]


def trained(path, layout, *, offload):
    """Three steps on gradients that are the same either way: (norms, main weights, model's weights)."""
    parallel = ParallelConfig(**layout)
    with init_distributed(parallel, seed=1) as state:
        models = build_training_model(ModelConfig(bf16=True), parallel, HFDirectory.open(path), state)
        config = OptimizerConfig(train_iters=9, lr=0.01, weight_decay=0.1, optimizer_cpu_offload=offload)
        optimizer, scheduler = build_optimizer(config, models, use_distributed_optimizer=True)
        generator, norms = torch.Generator().manual_seed(5), []
        for _ in range(3):
            models[0].zero_grad_buffer()
            optimizer.zero_grad()
            for parameter in models[0].parameters():
                if parameter.requires_grad:
                    parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
            moved, norm = step_if_finite(optimizer, 1.0, True)
            assert moved
            scheduler.step(1)
            norms.append(norm)
        if parallel.overlap_param_gather:
            models[0].disable_forward_pre_hook(param_sync=True)
        mains = [main.detach().clone() for group in optimizer.param_groups for main in group["params"]]
        return norms, mains, [parameter.detach().clone() for parameter in models[0].parameters()]


def compare(path):
    for layout in LAYOUTS:
        plain, host = (trained(path, layout, offload=offload) for offload in (False, True))
        assert plain[0] == host[0], layout
        for number, (want, got) in enumerate(zip(plain[1], host[1], strict=True)):
            assert_close(f"main weight {number} of {layout}", got, want, rtol=1e-6)
        for want, got in zip(plain[2], host[2], strict=True):
            assert_close(f"weight of {layout}", got.float(), want.float(), rtol=1e-3)


def test_same_steps_as_on_the_device(tmp_path):
    run_distributed(compare, 2, make_tiny_directory(tmp_path / "tiny"))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"fp32": True}, "use bf16"),
        ("parallel", {"use_distributed_optimizer": False}, "needs use_distributed_optimizer"),
        ("loss", {"learnable_temperature": True}, "does not go with learnable_temperature"),
    ],
)
def test_refused(section, values, message):
    config = SFTConfig()
    config.optimizer.optimizer_cpu_offload = True
    for name, value in values.items():
        setattr(getattr(config, section), name, value)
    assert [message in problem for problem in config.violations()] == [True]
