"""Delayed scaling's histories and scales through checkpoints, with stand-ins for Transformer Engine's modules."""

import pytest
import torch
from data_tools import make_processor, record, write_records
from fp8_stand_in import TENSORS, StandInTransformerEngine
from tiny_qwen2_vl import make_tiny_directory

from umer1.data.dataset import PairDataset
from umer1.data.packing import pack
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.losses.contrastive import LossConfig
from umer1.models.fp8 import FP8Config
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.weights import unwrap
from umer1.testing import run_distributed
from umer1.training.build import ModelConfig, build_training_model
from umer1.training.checkpoint import CheckpointConfig, Checkpointer
from umer1.training.forward_step import SFTStep, Totals
from umer1.training.grad_cache import forward_backward
from umer1.training.optimizer import OptimizerConfig, build_optimizer

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_directory(tmp_path_factory.mktemp("fp8") / "tiny", layers=2, vision_depth=1)


def build(tiny, save, layout, length, recipe="delayed"):
    """(parallel configuration, what makes the rank's models, optimizer, scheduler, checkpointer and stand-in)."""
    parallel = ParallelConfig(**layout)
    fp8 = FP8Config(fp8_format="hybrid", fp8_recipe=recipe, fp8_amax_history_len=length)

    def parts(state):
        directory = HFDirectory.open(tiny)
        models = build_training_model(ModelConfig(fp32=True), parallel, directory, state, fp8=fp8)
        engine = StandInTransformerEngine(length, "max")
        decoder = unwrap(models[0]).decoder
        for name, module in decoder.named_modules():
            if name.rsplit(".", 1)[-1] in LINEARS:
                engine.install(module)
        engine.autocast(decoder)
        options = OptimizerConfig(train_iters=10, lr=0.01, lr_warmup_iters=0)
        optimizer, scheduler = build_optimizer(options, models, use_distributed_optimizer=True)
        checkpointer = Checkpointer(CheckpointConfig(save=str(save)), state, directory)
        return models, optimizer, scheduler, checkpointer, engine

    return parallel, parts


def test_a_resumed_run_goes_on_exactly(tiny, tmp_path):
    records = write_records(tmp_path / "a.json", [record(index) for index in range(4)])
    dataset = PairDataset(records, None, make_processor())
    batches = [pack([dataset[2 * part], dataset[2 * part + 1]], 16) for part in range(2)]
    supervised = torch.cat([batch.supervised_sides for batch in batches])
    totals = Totals(4, (int((supervised == 0).sum()), int((supervised == 1).sum())))

    def run(steps, *, save=None, load=None, forget=False):
        parallel, parts = build(tiny, save or load or tmp_path / "none", {}, 3)
        with init_distributed(parallel) as state:
            models, optimizer, scheduler, checkpointer, engine = parts(state)
            if load:
                assert checkpointer.load(models, optimizer, scheduler) == {}
            if forget:
                for module in engine.modules:
                    module.init_fp8_meta_tensors(None)
            losses = []
            for _ in range(steps):
                models[0].zero_grad_buffer()
                step = SFTStep(LossConfig(), totals, state.groups.dp, train_vision=False)
                losses.append(forward_backward(models, batches, step, state, several=True))
                engine.end_backward()
                optimizer.step()
                scheduler.step(1)
            if save:
                checkpointer.save(steps, models, optimizer, scheduler, {})
            return losses, engine.state()

    whole, whole_state = run(3)
    first, _ = run(2, save=tmp_path / "save")
    second, state = run(1, load=tmp_path / "save")
    torch.testing.assert_close(first + second, whole, rtol=0, atol=0)
    torch.testing.assert_close(state, whole_state, rtol=0, atol=0)
    _, forgotten = run(1, load=tmp_path / "save", forget=True)
    assert not all(torch.equal(a, b) for a, b in zip(forgotten, whole_state, strict=True))


def _states(decoder):
    """(layer, module, direction, its state) of this rank's decoder layers."""
    for layer in decoder.layers:
        for name, module in layer.named_modules():
            if hasattr(module, "fp8_meta"):
                for key in TENSORS if module.fp8_meta else ():
                    yield layer.layer_number, name.rsplit(".", 1)[-1], key, module.fp8_meta[key]


def _drawn(layer, name, key, dp_rank, length):
    """(history, scale) of its own for each module and data-parallel rank; row 0 is zero, as between two steps."""
    seed = hash((layer, LINEARS.index(name), list(TENSORS).index(key), dp_rank)) % 2**31
    values = torch.rand(length + 1, TENSORS[key], generator=torch.Generator().manual_seed(seed))
    values[0] = 0
    return values[:-1], values[-1]


def _one_rank(tiny, save, jobs):
    for layout, length, want in jobs:
        parallel, parts = build(tiny, save, layout, length)
        with init_distributed(parallel) as state:
            models, optimizer, scheduler, checkpointer, engine = parts(state)
            decoder = unwrap(models[0]).decoder
            if want == "save":
                for module in engine.modules:
                    module.init_fp8_meta_tensors(None)
                for layer, name, key, found in _states(decoder):
                    history, scale = _drawn(layer, name, key, state.dp_rank, length)
                    found.amax_history.copy_(history)
                    found.scale.copy_(scale)
                checkpointer.save(1, models, optimizer, scheduler, {})
                continue
            checkpointer.load(models, optimizer, scheduler)
            found = list(_states(decoder))
            assert len(found) == 2 * len(engine.modules) == 8 * len(decoder.layers)
            for layer, name, key, got in found:
                drawn = [_drawn(layer, name, key, rank, 3) for rank in range(2)]
                if want == "own":
                    history, scale = drawn[state.dp_rank]
                else:
                    history = torch.maximum(drawn[0][0], drawn[1][0])
                    scale = torch.minimum(drawn[0][1], drawn[1][1])
                if length > 3:
                    history = torch.cat([torch.zeros(length - 2, history.shape[1]), history[1:]])
                elif length < 3:
                    history = torch.cat([torch.zeros(1, history.shape[1]), history[3 - length + 1 :]])
                torch.testing.assert_close((got.amax_history, got.scale), (history, scale), rtol=0, atol=0)


def test_other_layouts_and_lengths(tiny, tmp_path):
    """Ranks have their own values back; at other data-parallel sizes, the largest of all; the newest rows count."""
    jobs = [
        ({}, 3, "save"),
        ({}, 3, "own"),
        ({}, 5, "own"),
        ({"tensor_model_parallel_size": 2}, 2, "all"),
        ({"pipeline_model_parallel_size": 2}, 3, "all"),
    ]
    run_distributed(_one_rank, 2, tiny, tmp_path / "save", jobs, timeout=300)
    _one_rank(tiny, tmp_path / "save", [({}, 1, "all")])


def test_a_run_that_scaled_otherwise_begins_anew(tiny, tmp_path):
    for recipe, loads in (("tensorwise", False), ("delayed", True)):
        parallel, parts = build(tiny, tmp_path / "save", {}, 2, recipe)
        with init_distributed(parallel) as state:
            models, optimizer, scheduler, checkpointer, engine = parts(state)
            if loads:
                checkpointer.load(models, optimizer, scheduler)
                assert all(set(tensor.flatten().tolist()) in ({0.0}, {1.0}) for tensor in engine.state())
            else:
                checkpointer.save(1, models, optimizer, scheduler, {})
