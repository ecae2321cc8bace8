"""FP8 weights of Transformer Engine itself through a checkpoint, on a GPU; what other tests show with a stand-in."""

from types import SimpleNamespace

import pytest
import torch
from data_tools import make_processor, record, write_records
from test_fp8_files import Run
from tiny_qwen2_vl import make_tiny_directory

from umer1.data.dataset import PairDataset
from umer1.data.packing import pack
from umer1.distributed.fp8_weights import distributed_parts
from umer1.distributed.optimizer_checkpoint import rounded_main_weights
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.models.fp8 import FP8Config


def start(path, folder, recipe):
    """What makes this process's run, again and again."""
    dataset = PairDataset(
        write_records(folder / "a.json", [record(index) for index in range(4)]), None, make_processor()
    )
    batches = [pack([dataset[index]], 16) for index in range(4)]

    def run(job):
        parallel = ParallelConfig()
        with init_distributed(parallel) as state:
            nothing = SimpleNamespace(engine=None)
            return job(Run(path, batches, state, parallel, nothing, recipe=recipe, save=str(folder / "save")))

    return run


def saves(each):
    each.step()
    each.step()
    each.save(2)
    rounded = rounded_main_weights(each.optimizer, wanted=True)
    assert len(rounded) == 8
    (part,) = distributed_parts(each.optimizer)
    for weight, value in rounded.items():
        main = part._get_main_param_and_optimizer_states(weight)["param"]  # whole: there is one data-parallel rank
        assert torch.equal(value.flatten(), main.bfloat16().cpu())
        in_fp8 = weight.detach().dequantize().cpu()
        assert not torch.equal(value, in_fp8)
        # 3 bits of mantissa, scaled by a tensor's or a block's largest value
        assert (value.float() - in_fp8.float()).abs().max() <= value.float().abs().max() / 16
    return each.now(), each.step()[:-1]


def resumes(each):
    first = each.now()
    assert each.load() == {"iteration": 2}
    return first, each.now(), each.step()[:-1]


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_a_resumed_run_goes_on_from_the_same_bytes(tmp_path, recipe):
    """Weights, main weights and moments, bit for bit, and the losses of the next step; its backward may add up in
    another order."""
    problems = FP8Config(fp8_format="hybrid", fp8_recipe=recipe, fp8_param_gather=True).machine_violations()
    if problems:
        pytest.skip("; ".join(problems))
    path = make_tiny_directory(tmp_path / "tiny", layers=2, hidden=256, ffn=256, vision_depth=1)
    run = start(path, tmp_path, recipe)
    (saved, losses), (first, loaded, losses_again) = run(saves), run(resumes)
    assert set(loaded) == set(saved) and losses_again == losses
    for name, value in saved.items():
        assert torch.equal(loaded[name], value), name
    assert any(not torch.equal(first[name], value) for name, value in saved.items() if name in first)
