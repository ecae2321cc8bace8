"""Resume is exact: after further AdamW steps the same weights as without interruption, in the same and other layouts.

Gradients are a polynomial of each weight and the step, the same whatever the layout, so that all differences are the
checkpoint's.  AdamW's moments and step counts matter: three further steps are compared, bit for bit.
"""

import pytest
import torch
from tiny_qwen2_vl import make_tiny_directory

from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.weights import export_hf
from umer1.testing import run_distributed
from umer1.training.build import ModelConfig, build_training_model
from umer1.training.checkpoint import CheckpointConfig, Checkpointer
from umer1.training.optimizer import OptimizerConfig, build_optimizer

BEFORE, AFTER = 2, 3
ADAM = {"train_iters": 50, "lr": 0.01, "lr_warmup_iters": 3, "weight_decay": 0.1, "clip_grad": 0.0}


def train(models, optimizer, scheduler, first, steps):
    for step in range(first, first + steps):
        for model in models:
            model.zero_grad_buffer()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    weight = parameter.detach().float()
                    parameter.main_grad.copy_(0.5 * weight + 0.01 * (step + 1) - 0.1 * weight * weight)
        optimizer.step()
        scheduler.step(1)


def run(path, save, layout, *, fp32=True, saves=False, resumes=False, **options):
    """One rank of one run: BEFORE steps (or what was saved of them), then AFTER steps; rank 0 returns the weights."""
    directory = HFDirectory.open(path)
    parallel = ParallelConfig(**layout)
    with init_distributed(parallel) as state:
        model = ModelConfig(fp32=fp32, bf16=not fp32, train_vision=options.get("train_vision", False))
        learnt = 0.02 if options.get("learnable") else None
        models = build_training_model(model, parallel, directory, state, learnt_temperature=learnt)
        optimizer, scheduler = build_optimizer(
            OptimizerConfig(**ADAM, optimizer_cpu_offload=options.get("offload", False)),
            models,
            use_distributed_optimizer=parallel.use_distributed_optimizer,
        )
        checkpointer = Checkpointer(CheckpointConfig(save=str(save)), state, directory)
        if resumes:
            with torch.no_grad():
                for parameter in models[0].parameters():
                    parameter.fill_(0.25)  # nothing of what was there before the load may stay
            found = checkpointer.load(models, optimizer, scheduler)
            assert found == {"iteration": BEFORE, "note": [1, 2.5, "x"]}
            assert scheduler.num_steps == BEFORE
        else:
            train(models, optimizer, scheduler, 0, BEFORE)
        if saves:
            extra = {"iteration": BEFORE, "note": [1, 2.5, "x"]}
            checkpointer.save(BEFORE, models, optimizer, scheduler, extra)
        train(models, optimizer, scheduler, BEFORE, AFTER)
        scale = getattr(models[-1].module, "log_scale", None)
        weights = {name: tensor.clone() for name, tensor in export_hf(models, state)}
        if scale is not None:  # on the last stage
            weights["log_scale"] = scale.detach().clone()
        return weights


def runs(jobs):
    return [run(*positional, **options) for positional, options in jobs]


def _start(world_size, jobs):
    """Per job the weights of all ranks together."""
    ranks = [runs(jobs)] if world_size == 1 else run_distributed(runs, world_size, jobs, timeout=400)
    return [
        {name: tensor for rank in reversed(same) for name, tensor in rank.items()} for same in zip(*ranks, strict=False)
    ]


def _assert_same(name, got, want):
    assert sorted(got) == sorted(want)
    for key, tensor in want.items():
        worst = (got[key].float() - tensor.float()).abs().max()
        assert torch.equal(got[key], tensor), f"{name}: {key} is off by {worst}"


TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
PLAIN = {"use_distributed_optimizer": False}
LAYOUTS = {
    1: {"one process": {}},
    2: {
        "tp2 sp": {**TP2, "sequence_parallel": True},
        "tp2, ViT cut": {**TP2, "vision_data_parallel": False},
        "pp2": PP2,
        "dp2": {},
    },
    4: {"tp2 pp2 interleaved": {**TP2, **VPP}, "dp4": {}, "tp2 dp2": TP2},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An odd vocabulary that tensor parallelism pads, so that padding rows come and go between layouts."""
    return make_tiny_directory(tmp_path_factory.mktemp("layouts") / "tiny", layers=4, vocab_rows=421)


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """(weights of the run that was not interrupted, the checkpoint that one process saved of it)"""
    save = tmp_path_factory.mktemp("one")
    return run(tiny, save, {}, saves=True), save


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_resume_at_any_layout(tiny, undisturbed, tmp_path, world_size):
    want, one = undisturbed
    jobs = []
    for index, layout in enumerate(LAYOUTS[world_size].values()):
        save = tmp_path / str(index)
        jobs += [
            ((tiny, one, layout), {"resumes": True}),
            ((tiny, save, layout), {"saves": True}),
            ((tiny, save, layout), {"resumes": True}),
        ]
    results = _start(world_size, jobs)
    for index, name in enumerate(LAYOUTS[world_size]):
        there, straight, back = results[3 * index : 3 * index + 3]
        _assert_same(f"{name}, uninterrupted", straight, want)
        _assert_same(f"{name}, resumed from one process", there, want)
        _assert_same(f"{name}, resumed from its own", back, want)
        _assert_same(f"one process, resumed from {name}", run(tiny, tmp_path / str(index), {}, resumes=True), want)


@pytest.mark.parametrize(
    "options",
    [
        {"fp32": False},
        {"fp32": False, "learnable": True, "train_vision": True},
        {"fp32": False, "offload": True},
        {"layout": PLAIN},
        {"layout": PLAIN, "fp32": False},
    ],
    ids=[
        "bf16",
        "bf16 with fp32 temperature and ViT",
        "bf16, offloaded",
        "fp32 optimizer of every rank",
        "bf16 optimizer of every rank",
    ],
)
def test_resume_of_every_optimizer(tiny, tmp_path, options):
    layout = options.pop("layout", {})
    jobs = [
        ((tiny, tmp_path, layout), {"saves": True, **options}),
        ((tiny, tmp_path, layout), {"resumes": True, **options}),
    ]
    first = runs(jobs[:1])[0]
    _assert_same("same layout", runs(jobs[1:])[0], first)
    _assert_same("pp2", _start(2, [((tiny, tmp_path, {**layout, **PP2}), {"resumes": True, **options})])[0], first)
