"""`umer1 convert`, as it is called: both directions, one process and several, and what it refuses."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_qwen2_vl import make_tiny_directory

from umer1 import conversion
from umer1.checkpoints.source import load_model_weights, open_model
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.errors import UserError
from umer1.models.qwen2_vl.model import build_model
from umer1.models.qwen2_vl.weights import export_hf
from umer1.testing import run_distributed

MODEL = {"tied": False, "dtype": torch.bfloat16, "layers": 4, "vocab_rows": 421, "embedding_tokens": True}
FOUR = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]


@pytest.fixture
def tiny(tmp_path):
    return make_tiny_directory(tmp_path / "tiny", **MODEL)


def _assert_same_model(got, want):
    got, want = load_file(got / "model.safetensors"), load_file(want / "model.safetensors")
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor) and got[name].dtype == tensor.dtype, name


def there_and_back(tiny, checkpoint, out, flags):
    conversion.main(["--from-hf", str(tiny), "--to-checkpoint", str(checkpoint), *flags])
    conversion.main(["--from-checkpoint", str(checkpoint / "iter_0000000"), "--to-hf", str(out), *flags])


def test_one_process(tiny, tmp_path, capsys):
    """The parallel sizes may be given without torchrun, and dtype and vocabulary come back as they were."""
    there_and_back(tiny, tmp_path / "run", tmp_path / "out", FOUR)
    _assert_same_model(tmp_path / "out", tiny)
    assert "the checkpoint loads at any layout" in capsys.readouterr().out


def test_four_processes_write_what_one_reads(tiny, tmp_path):
    run_distributed(there_and_back, 4, tiny, tmp_path / "run", tmp_path / "out", FOUR)
    _assert_same_model(tmp_path / "out", tiny)
    conversion.main(["--from-checkpoint", str(tmp_path / "run"), "--to-hf", str(tmp_path / "one")])
    _assert_same_model(tmp_path / "one", tiny)


def test_another_dtype(tiny, tmp_path):
    conversion.main(["--from-hf", str(tiny), "--to-checkpoint", str(tmp_path / "run"), "--dtype", "float32"])
    conversion.main(["--from-checkpoint", str(tmp_path / "run"), "--to-hf", str(tmp_path / "out")])
    got, want = load_file(tmp_path / "out" / "model.safetensors"), load_file(tiny / "model.safetensors")
    assert all(got[name].dtype == torch.float32 and torch.equal(got[name], want[name].float()) for name in want)


def _loaded(path):
    directory = open_model(path)
    with init_distributed(ParallelConfig()) as state:
        models = build_model(directory.config, ParallelConfig(), state, params_dtype=torch.float32)
        load_model_weights(models, path, directory, state)
        return dict(export_hf(models, state)), directory.special


def test_a_model_opens_from_each_of_its_forms(tiny, tmp_path):
    conversion.main(["--from-hf", str(tiny), "--to-checkpoint", str(tmp_path / "run")])
    want, special = _loaded(tiny)
    for path in (tmp_path / "run", tmp_path / "run" / "iter_0000000"):
        got, same = _loaded(path)
        assert same == special
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from-hf", "{tmp}/nowhere", "--to-checkpoint", "{tmp}/x"], "is not a directory"),
        (["--from-hf", "{tmp}", "--to-checkpoint", "{tmp}/x"], "has no config.json and no tokenizer.json"),
        (["--from-checkpoint", "{tmp}/tiny", "--to-hf", "{tmp}/x"], "is no checkpoint and holds none"),
        (["--from-hf", "{tmp}/run", "--to-checkpoint", "{tmp}/x"], "use --from-checkpoint"),
        (["--from-hf", "{tmp}/tiny", "--to-checkpoint", "{tmp}/run"], "holds checkpoints already"),
        (["--from-checkpoint", "{tmp}/run", "--to-hf", "{tmp}/tiny"], "is not empty and is no earlier export"),
        (
            ["--from-hf", "{tmp}/tiny", "--to-checkpoint", "{tmp}/x", "--tensor-model-parallel-size", "3"],
            "tensor_model_parallel_size=3 does not divide",
        ),
    ],
)
def test_refusals(tiny, tmp_path, flags, message):
    (tmp_path / "run" / "iter_0000000").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        conversion.main([flag.format(tmp=tmp_path) for flag in flags])
    assert not (tmp_path / "x").exists()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        conversion.main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "examples:" in said and "loads at any tensor, pipeline and data parallelism" in said
