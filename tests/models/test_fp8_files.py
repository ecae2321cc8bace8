"""FP8 weights through checkpoints and exports, with a stand-in for Transformer Engine's (fp8_weight_stand_in.py).

Real are the model, megatron's DDP with its two buffers, its DistributedOptimizer, and all that saves, loads and
exports.  Two processes do all runs once; tests look at what they brought back.
"""

import json

import umer1.megatron_import  # noqa: F401

import pytest
import torch
from data_tools import make_processor, record, write_records
from fp8_weight_stand_in import StandInFP8Tensor, install
from megatron.core import dist_checkpointing
from tiny_qwen2_vl import make_tiny_directory

from umer1.checkpoints import sharded_state
from umer1.checkpoints.layout import read_manifest
from umer1.checkpoints.source import load_model_weights, open_model
from umer1.data.dataset import PairDataset
from umer1.data.loader import DataConfig
from umer1.data.packing import pack
from umer1.distributed.fp8_weights import distributed_parts, is_fp8
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.losses.contrastive import LossConfig
from umer1.models.fp8 import FP8Config
from umer1.models.qwen2_vl.directory import HFDirectory
from umer1.models.qwen2_vl.model import build_model
from umer1.models.qwen2_vl.weights import export_hf, stream_hf, unwrap
from umer1.plan.buffers import state_bytes
from umer1.plan.fp8 import multiplies_in_fp8
from umer1.plan.parameters import stage_parameters
from umer1.testing import run_distributed
from umer1.training import trainer as trainers
from umer1.training.build import ModelConfig, build_training_model
from umer1.training.checkpoint import CheckpointConfig, Checkpointer
from umer1.training.config import SFTConfig
from umer1.training.forward_step import SFTStep, Totals
from umer1.training.grad_cache import forward_backward
from umer1.training.optimizer import OptimizerConfig, build_optimizer, step_if_finite
from umer1.training.sft import SFTTrainer
from umer1.training.trainer import Trainer
from umer1.training.watch import Watch

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
MATRICES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


class Run:
    """One rank of a run on four pairs, two a data-parallel rank, each a micro-batch."""

    def __init__(self, path, batches, state, parallel, stand_in, *, recipe="tensorwise", fp8=True, **checkpoint):
        self.state, self.stand_in = state, stand_in
        self.directory = HFDirectory.open(path)
        gather = FP8Config(fp8_format="hybrid", fp8_recipe=recipe, fp8_amax_history_len=2, fp8_param_gather=True)
        self.models = build_training_model(
            ModelConfig(bf16=True), parallel, self.directory, state, fp8=gather if fp8 else FP8Config()
        )
        options = OptimizerConfig(train_iters=10, lr=0.01, lr_warmup_iters=0)
        self.optimizer, self.scheduler = build_optimizer(options, self.models, use_distributed_optimizer=True)
        self.checkpointer = Checkpointer(CheckpointConfig(**checkpoint), state, self.directory)
        sides = torch.cat([batch.supervised_sides for batch in batches])
        self.totals = Totals(4, (int((sides == 0).sum()), int((sides == 1).sum())))
        self.batches = [each.to(state.device) for each in batches[2 * state.dp_rank : 2 * state.dp_rank + 2]]

    def step(self):
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        step = SFTStep(LossConfig(), self.totals, self.state.groups.dp, train_vision=False)
        numbers = forward_backward(self.models, self.batches, step, self.state, several=True)
        if self.stand_in.engine:
            self.stand_in.engine.end_backward()
        moved, norm = step_if_finite(self.optimizer, 1.0, True)
        assert moved
        self.scheduler.step(1)
        return [*numbers.tolist(), norm]

    def save(self, iteration):
        with Trainer.settled(self):
            self.checkpointer.save(iteration, self.models, self.optimizer, self.scheduler, {"iteration": iteration})
        self.checkpointer.wait()

    def load(self):
        return self.checkpointer.load(self.models, self.optimizer, self.scheduler)

    def now(self):
        """What this rank holds: bytes, scales and transposed copies, other weights, main weights and moments."""
        found = {}
        for name, weight in unwrap(self.models[0]).named_parameters():
            if isinstance(weight, StandInFP8Tensor):
                parts = {"bytes": weight._data, "scale": weight._scale_inv, "transposed": weight._transpose}
            else:
                parts = {"value": weight.detach().dequantize() if is_fp8(weight) else weight.detach()}
            found |= {f"{name} {part}": tensor.clone() for part, tensor in parts.items()}
        for part in distributed_parts(self.optimizer):
            for weight, (group, index) in part.model_param_group_index_map.items():
                name = part._param_name(weight)
                main = part.optimizer.param_groups[group]["params"][index]
                states = part._get_main_param_and_optimizer_states(weight) if part.optimizer.state[main] else {}
                found |= {f"{name} {key}": value.detach().clone() for key, value in ({"param": main} | states).items()}
        if self.stand_in.engine:
            found |= {f"scaling {number}": each for number, each in enumerate(self.stand_in.engine.state())}
        return found

    def sizes(self):
        """Bytes of weights, gradients, main weights and moments; this data-parallel rank."""
        (model,) = self.models
        assert [buffer.param_dtype for buffer in model.buffers] in (
            [torch.bfloat16, torch.uint8],
            [torch.uint8, torch.bfloat16],
        )
        frozen = [weight.nbytes for weight in model.parameters() if not weight.requires_grad]
        states = [
            part._get_main_param_and_optimizer_states(weight)
            for part in distributed_parts(self.optimizer)
            for weight in part.model_param_group_index_map
        ]
        return (
            sum(buffer.param_data.nbytes for buffer in model.buffers) + sum(frozen),
            sum(buffer.grad_data.nbytes for buffer in model.buffers),
            sum(each["param"].nbytes for each in states),
            sum(each[key].nbytes for each in states for key in ("exp_avg", "exp_avg_sq")),
            self.state.dp_rank,
        )


def program(path, records, folder, train_iters):
    """SFT as examples/pretrain_sft.py runs it, after its look at the machine."""
    config = SFTConfig(
        model=ModelConfig(bf16=True, hf_model=str(path), export_hf=f"{folder}/exported"),
        fp8=FP8Config(fp8_format="hybrid", fp8_param_gather=True),
        parallel=ParallelConfig(**OVERLAP),
        data=DataConfig(data_path=[str(records)], global_batch_size=4, micro_batch_size=1),
        optimizer=OptimizerConfig(train_iters=train_iters, lr=0.01),
        checkpoint=CheckpointConfig(save=f"{folder}/program", save_interval=1),
    )
    assert config.violations() == []
    with (
        init_distributed(config.parallel) as state,
        Watch.of(config, state, SFTTrainer.own_phases) as watch,
    ):
        SFTTrainer(config, HFDirectory.open(path), state, watch).fit()


def no_cast(*arguments):
    """In place of cast_main_weights, to show what it is for."""


def all_runs(path, records, batches, folder):
    """On each of two ranks: name -> what was found."""
    monkeypatch = pytest.MonkeyPatch()
    stand_in = install(monkeypatch)
    found = {}

    def run(job, layout=None, **options):
        parallel = ParallelConfig(**(layout or {}))
        with init_distributed(parallel) as state:
            each = Run(path, batches, state, parallel, stand_in, **options)
            result = job(each)
            each.checkpointer.close()
            return result

    def saves(each):
        losses = [each.step(), each.step()]
        each.save(2)
        before = each.now()
        return {"before": before, "losses": [*losses, each.step()], "after": each.now()}

    def resumes(each, then=lambda each: None):
        assert each.load() == {"iteration": 2}
        before = each.now()
        then(each)
        return {"before": before, "losses": [each.step()], "after": each.now()}

    def loads(each):
        each.load()
        return each.now()

    def loads_and_saves(where):
        def job(each):
            each.load()
            each.checkpointer.config.save = f"{folder}/{where}"
            each.save(2)

        return job

    def undisturbed(each):
        return {"losses": [each.step() for _ in range(3)], "after": each.now(), "sizes": each.sizes()}

    def refuses_to_stream(each):
        for stream in (export_hf, stream_hf) if each.state.dp_rank == 0 else (stream_hf,):
            with pytest.raises(ValueError, match="8 weights in FP8"):
                next(stream(each.models, each.state))

    save = dict(save=f"{folder}/fp8")
    found["whole"] = run(saves, **save)
    found["resumed"] = run(lambda each: resumes(each, refuses_to_stream), **save)
    for train_iters in (2, 3):
        program(path, records, folder, train_iters)
    run(lambda each: [each.step(), each.step(), each.save(2)], save=f"{folder}/async", async_save=True)
    for name, layout in {"tp2": TP2, "pp2": PP2}.items():
        run(loads_and_saves(name), layout, **save)
    run(loads_and_saves("in bf16"), fp8=False, **save)
    run(saves, fp8=False, save=f"{folder}/bf16")
    run(loads_and_saves("from bf16"), save=f"{folder}/bf16")
    found["from bf16"] = run(loads, save=f"{folder}/from bf16")
    found["weights alone"] = run(loads, load=f"{folder}/fp8", finetune=True)
    found["delayed"] = run(saves, recipe="delayed", save=f"{folder}/delayed")
    found["delayed, resumed"] = run(resumes, recipe="delayed", save=f"{folder}/delayed")
    found["overlapped"] = run(saves, OVERLAP, save=f"{folder}/overlap")
    found["overlapped, resumed"] = run(resumes, OVERLAP, save=f"{folder}/overlap")
    found["overlapped, undisturbed"] = run(undisturbed, OVERLAP)
    with monkeypatch.context() as broken:
        broken.setattr(trainers, "finish_gather", no_cast)
        found["overlapped, gather unfinished"] = run(saves, OVERLAP, save=f"{folder}/unfinished")
    with monkeypatch.context() as broken:
        broken.setattr(sharded_state, "cast_main_weights", no_cast)
        found["not cast"] = run(loads, **save)
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_directory(tmp_path_factory.mktemp("fp8") / "tiny", layers=2, vision_depth=1)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """(what each rank found, the folder of the checkpoints)"""
    folder = tmp_path_factory.mktemp("runs")
    records = write_records(folder / "a.json", [record(index) for index in range(4)])
    dataset = PairDataset(records, None, make_processor())
    batches = [pack([dataset[index]], 16) for index in range(4)]
    return run_distributed(all_runs, 2, tiny, records, batches, str(folder), timeout=400), folder


def _assert_same(got, want, *, keys=lambda name: True):
    names = {name for name in want if keys(name)}
    assert names and {name for name in got if keys(name)} == names
    for name in names:
        assert torch.equal(got[name], want[name]), name


def _differing(got, want):
    return {name.split()[-1] for name in want if not torch.equal(got[name], want[name])}


def is_main(name):
    return name.endswith((" param", " exp_avg", " exp_avg_sq"))


def tensors(folder):
    """Every tensor of a checkpoint, whole."""
    with init_distributed(ParallelConfig()):
        found = dist_checkpointing.load_plain_tensors(str(folder / "iter_0000002"))
    return {name: each for name, each in found.items() if isinstance(each, torch.Tensor)}


@pytest.mark.parametrize(
    "names", [("whole", "resumed"), ("delayed", "delayed, resumed"), ("overlapped", "overlapped, resumed")]
)
def test_a_resumed_run_goes_on_exactly(runs, names):
    """Losses, bytes, scales, transposed copies, fp32 states; with delayed scaling, histories."""
    for rank in runs[0]:
        whole, resumed = (rank[name] for name in names)
        assert resumed["losses"] == whole["losses"][2:]
        for moment in ("before", "after"):
            _assert_same(resumed[moment], whole[moment])
        assert whole["losses"][1] != whole["losses"][2]
        assert _differing(whole["before"], whole["after"]) >= {"bytes", "scale", "param", "exp_avg"}


def test_ranks_have_the_same_weights_and_other_states(runs):
    first, second = (rank["whole"]["after"] for rank in runs[0])
    _assert_same(first, second, keys=lambda name: name.endswith((" bytes", " scale", " transposed", " value")))
    assert {name for name in first if is_main(name)} != {name for name in second if is_main(name)}


def test_the_cast_is_needed(runs):
    """Without it a loaded run has the bytes of the weights that it started from."""
    for rank in runs[0]:
        assert _differing(rank["not cast"], rank["whole"]["before"]) == {"bytes", "scale", "transposed"}


def test_a_file_has_main_weights_and_their_roundings(runs):
    found = tensors(runs[1] / "fp8")
    matrices = [f"decoder.layers.{part}.weight" for part in MATRICES]
    assert {found[name].dtype for name in matrices} == {torch.bfloat16}
    for name, main in found.items():
        if name.startswith("optimizer.state.param."):
            weight = found[name.removeprefix("optimizer.state.param.")]
            assert weight.dtype == torch.bfloat16 and torch.equal(weight, main.bfloat16()), name
    for name in matrices:
        assert not torch.equal(found[name], found[f"optimizer.state.param.{name}"])
        assert len(found[name].unique()) > 256  # FP8 has no more values


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_other_layouts_have_the_same_main_weights(runs, layout):
    """What they save of what they loaded is what they loaded."""
    _assert_same(tensors(runs[1] / layout), tensors(runs[1] / "fp8"))


@pytest.mark.parametrize(("saved", "elsewhere"), [("fp8", "in bf16"), ("bf16", "from bf16")])
def test_a_checkpoint_crosses_between_fp8_and_bf16_weights(runs, saved, elsewhere):
    _assert_same(tensors(runs[1] / elsewhere), tensors(runs[1] / saved))
    assert _differing(tensors(runs[1] / "fp8"), tensors(runs[1] / "bf16"))


def test_an_asynchronous_save_writes_the_same_bytes(runs):
    first, second = (read_manifest(runs[1] / name / "iter_0000002") for name in ("fp8", "async"))
    assert first == second and len(first["files"]) > 8


def test_exports_are_main_weights_rounded(runs, tiny):
    """Of the program, which went on from its own checkpoint and exported at its end."""
    assert [json.loads(line)["iteration"] for line in open(runs[1] / "program" / "metrics.jsonl")] == [1, 2, 3]
    source = HFDirectory.open(tiny)
    with init_distributed(ParallelConfig()) as state:

        def of(path):
            models = build_model(source.config, ParallelConfig(), state, params_dtype=torch.bfloat16)
            load_model_weights(models, path, open_model(path), state)
            return {name: tensor.clone() for name, tensor in export_hf(models, state)}

        _assert_same(of(runs[1] / "exported"), of(runs[1] / "program"))
        assert _differing(of(runs[1] / "exported"), of(tiny))


def test_weights_alone(runs):
    """--finetune: main weights start from what the file has, and not from what FP8 made of it."""
    for rank in runs[0]:
        rounded = {n: t.bfloat16().float() for n, t in rank["whole"]["before"].items() if n.endswith(" param")}
        _assert_same(rank["weights alone"], rounded, keys=lambda n: n.endswith(" param"))
        _assert_same(rank["weights alone"], rank["whole"]["before"], keys=lambda n: n.endswith((" bytes", " scale")))


def test_a_save_between_overlapped_steps_changes_nothing(runs):
    """Backward's copies of the weights are as new as the weights; they are not if the gather is left unfinished."""
    for rank in runs[0]:
        whole, undisturbed = rank["overlapped"], rank["overlapped, undisturbed"]
        assert whole["losses"] == undisturbed["losses"]
        _assert_same(whole["after"], undisturbed["after"], keys=is_main)
        unfinished = rank["overlapped, gather unfinished"]
        assert unfinished["losses"][:2] == whole["losses"][:2] and unfinished["losses"][2] != whole["losses"][2]


def test_the_plan_counts_both_buffers(runs, tiny):
    model, parallel = HFDirectory.open(tiny).config, ParallelConfig(**OVERLAP)
    fp8 = FP8Config(fp8_format="hybrid", fp8_param_gather=True)
    chunks = stage_parameters(model, parallel, 0, False)
    for rank in runs[0]:
        *sizes, dp_rank = rank["overlapped, undisturbed"]["sizes"]
        states = state_bytes(
            chunks,
            parallel,
            stage=0,
            dp=2,
            itemsize=2,
            dp_rank=dp_rank,
            in_fp8=lambda parameter: multiplies_in_fp8(fp8, parameter, model.num_layers),
        )
        assert sizes == [states.parameters, states.gradients, states.main_weights, states.moments]
