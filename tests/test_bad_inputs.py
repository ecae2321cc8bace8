"""Bad input ends in one clear message or in a counted sample: never in a traceback, a hang or a silent change.

Configuration and model directory are refused by `read_command_line`, before any process group exists; bad records and
media are counted by the loader; what only the running program can show is run as a program.
"""

import json
import os
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from programs import ROOT, SFT, run_in_forks
from sft_reference import SUFFIX, write_pairs
from tiny_qwen2_vl import make_tiny_directory

from umer1.errors import UserError
from umer1.training.config import SFTConfig
from umer1.training.launch import read_command_line

DEFAULT = ROOT / "examples" / "configs" / "mini_sft.yaml"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return make_tiny_directory(folder / "model", layers=4), write_pairs(folder / "data")


def flags(good, *more: str, model: Path | None = None, data: Path | None = None) -> list[str]:
    model, data = model or good[0], data or good[1]
    base = ["--hf-model", str(model), "--data-path", str(data), "--data-root", str(data.parent)]
    return [*base, "--global-batch-size", "8", "--micro-batch-size", "4", "--train-iters", "2", "--fp32", *more]


# what is wrong: (flags, processes, words that the message must hold)
CONFIGURATIONS = {
    "unknown flag": ("--zzzz 1", 1, ["unknown flag --zzzz", "--help"]),
    "misspelt flag": ("--globl-batch-size 8", 1, ["did you mean --global-batch-size"]),
    "text for a number": ("--lr fast", 1, ["lr='fast'", "number"]),
    "negative lr": ("--lr -1", 1, ["lr=-1.0", "above 0"]),
    "nan lr": ("--lr nan", 1, ["lr=nan"]),
    "zero temperature": ("--contrastive-temperature 0", 1, ["contrastive_temperature=0.0", "above 0"]),
    "unknown schedule": ("--lr-decay-style step", 1, ["step", "cosine, linear or constant"]),
    "warm-up longer than the run": ("--lr-warmup-iters 9", 1, ["lr_warmup_iters=9", "train_iters=2"]),
    "zero steps": ("--train-iters 0", 1, ["train_iters=0"]),
    "fp32 and bf16": ("--bf16", 1, ["fp32 and bf16"]),
    "context parallelism": ("--context-parallel-size 2", 1, ["context_parallel_size=2", "use 1"]),
    "TP not dividing the heads": ("--tensor-model-parallel-size 3", 3, ["num_attention_heads=4", "use 1 or 2"]),
    "TP above the KV heads": ("--tensor-model-parallel-size 4", 4, ["num_key_value_heads=2", "use 1 or 2"]),
    "PP not dividing the layers": ("--pipeline-model-parallel-size 3", 3, ["4 layers", "1 or 2 or 4"]),
    "TP x PP not dividing the processes": ("--tensor-model-parallel-size 2", 3, ["must divide", "3"]),
    "SP without TP": ("--sequence-parallel", 1, ["sequence_parallel", "2 or more"]),
    "batch not dividing over ranks": ("--global-batch-size 9", 2, ["global_batch_size=9", "8 or 10"]),
    "missing data file": ("--data-path nowhere.json", 1, ["nowhere.json", "does not exist"]),
    "empty model": ("--hf-model=", 1, ["hf_model must not be empty"]),
    "export below a file": (f"--export-hf {__file__}/x", 1, ["cannot be written", "not a directory"]),
    **{
        f"{flag} that the system refuses": (f"--{flag} {'x' * 300}", 1, ["xxx cannot be looked at: File name too long"])
        for flag in ("load", "data-path", "data-root", "hf-model", "export-hf")
    },
    "all that the system refuses, beside others": (
        " ".join(f"--{flag} {'x' * 300}" for flag in ("save", "data-path", "data-root", "export-hf")) + " --lr -1",
        1,
        ["5 problems", "save=xxx", "data_path=xxx", "data_root=xxx", "- xxx", "lr=-1.0"],
    ),
    "data root is no directory": ("--data-root nowhere", 1, ["data_root=nowhere"]),
    "uncached with budgets": (
        "--no-cached-contrastive --max-tokens-per-micro-batch 99",
        1,
        ["cached-contrastive", "max_tokens_per_micro_batch"],
    ),
    "all at once": ("--lr -1 --sequence-parallel --clip-grad -2", 1, ["3 problems", "lr=", "sequence_", "clip_grad="]),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration(good, name, monkeypatch):
    more, processes, words = CONFIGURATIONS[name]
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(UserError) as caught:
        read_command_line(SFTConfig, flags(good, *more.split()), DEFAULT)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def lie_about_the_header(path: Path) -> None:
    """A safetensors file whose header claims to be longer than the file."""
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def drop_a_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "mlp.down_proj" in name))
    save_file(tensors, path, metadata={"format": "pt"})


# what is wrong: (how a good directory is spoilt, words that the message must hold)
DIRECTORIES = {
    "no config.json": (lambda d: (d / "config.json").unlink(), ["config.json"]),
    "config.json is not JSON": (lambda d: (d / "config.json").write_text("{"), ["config.json"]),
    "another kind of model": (lambda d: edit_json(d / "config.json", model_type="llama"), ["llama", "qwen2_vl"]),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("[]"), ["tokenizer.json"]),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ["safetensors"]),
    "pickled weights": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        ["safetensors", "bin"],
    ),
    "cut-off weights": (lambda d: truncate(d / "model.safetensors", 5000), ["model.safetensors"]),
    "lying header": (lambda d: lie_about_the_header(d / "model.safetensors"), ["model.safetensors"]),
    "empty directory": (lambda d: [f.unlink() for f in d.iterdir()], ["config.json"]),
    "not a directory": (lambda d: shutil.rmtree(d), ["not a directory"]),
    "heads that do not divide": (
        lambda d: edit_json(
            d / "config.json",
            text_config={**json.loads((d / "config.json").read_text())["text_config"], "num_attention_heads": 5},
        ),
        ["5"],
    ),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_model_directory(good, name, tmp_path):
    spoil, words = DIRECTORIES[name]
    model = tmp_path / "model"
    shutil.copytree(good[0], model)
    spoil(model)
    with pytest.raises(UserError) as caught:
        read_command_line(SFTConfig, flags(good, model=model), DEFAULT)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"


def assert_one_message(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("pretrain_sft: error:") == 1
    for word in words:
        assert word in done.stderr, f"{word!r} not in: {done.stderr[-1500:]}"


# what is wrong with the data file: (its text, words)
FILES = {
    "empty file": ("", ["empty"]),
    "not JSON": ("hello\n", ["train.json"]),
    "an object, not a list": ('{"a": 1}', ["train.json"]),
    "cut-off list": ('[{"dataset_name": "toy", "qry"', ["train.json"]),
}


@pytest.mark.parametrize("name", FILES)
def test_data_file(good, name, tmp_path):
    text, words = FILES[name]
    (tmp_path / "train.json").write_text(text)
    assert_one_message(run_in_forks(SFT, flags(good, data=tmp_path / "train.json")), *words)


def test_weights_that_lack_a_tensor(good, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(good[0], model)
    drop_a_tensor(model / "model.safetensors")
    assert_one_message(run_in_forks(SFT, flags(good, model=model)), "down_proj")


def spoil_records(records: list[dict], folder: Path) -> dict[str, int]:
    """Make the queries of the first records bad, each in a way of its own; cause -> how many."""

    def human(text: str) -> list[dict]:
        turns = records[0]["qry"]["conversations"]
        return [{"from": "human", "value": text}, turns[1]]

    (folder / "cut.png").write_bytes((folder / "media/0.png").read_bytes()[:200])
    (folder / "text.png").write_text("no picture")
    bomb = bytearray((folder / "media/0.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 60000, 60000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    (folder / "bomb.png").write_bytes(bytes(bomb))
    os.symlink("/etc/hostname", folder / "link.png")
    os.mkfifo(folder / "pipe.png")
    picture = f"<image>look\n<disc_emb>\n{SUFFIX}"
    bad = [
        ({"image": "gone.png", "conversations": human(picture)}, "missing_file"),
        ({"image": "cut.png", "conversations": human(picture)}, "corrupt_image"),
        ({"image": "text.png", "conversations": human(picture)}, "corrupt_image"),
        ({"image": "bomb.png", "conversations": human(picture)}, "too_many_pixels"),
        ({"image": "../outside.png", "conversations": human(picture)}, "path_escape"),
        ({"image": "/etc/hostname", "conversations": human(picture)}, "path_escape"),
        ({"image": "link.png", "conversations": human(picture)}, "path_escape"),
        ({"image": "http://example.org/a.png", "conversations": human(picture)}, "path_escape"),
        ({"image": "pipe.png", "conversations": human(picture)}, "missing_file"),
        ({"conversations": human(picture)}, "marker_mismatch"),
        ({"image": "media/0.png", "conversations": human(f"look\n<disc_emb>\n{SUFFIX}")}, "marker_mismatch"),
        ({"conversations": human(f"look\n{SUFFIX}")}, "no_disc_emb"),
        ({"conversations": human(f"<|im_end|>look\n<disc_emb>\n{SUFFIX}")}, "reserved_token"),
        ({"conversations": human(f"{'word ' * 900}\n<disc_emb>\n{SUFFIX}")}, "over_length"),
        ({"conversations": "text"}, "bad_record"),
        (
            {"conversations": [human(f"look\n<disc_emb>\n{SUFFIX}")[0], {"from": "gpt", "value": "no tag"}]},
            "no_gen_emb",
        ),
    ]
    counts: dict[str, int] = {}
    for record, (side, cause) in zip(records, bad, strict=False):
        record["qry"] = side
        counts[cause] = counts.get(cause, 0) + 1
    return counts


def test_bad_records_are_counted_listed_and_replaced(good, tmp_path):
    data = write_pairs(tmp_path / "data", count=32)
    records = json.loads(data.read_text())
    expected = spoil_records(records, data.parent)
    data.write_text(json.dumps(records))
    save = tmp_path / "run"
    more = ["--global-batch-size", "16", "--seq-length", "512", "--save", str(save)]
    done = run_in_forks(SFT, flags(good, *more, "--max-bad-sample-fraction", "1", data=data))
    assert done.returncode == 0, done.stderr[-3000:]
    listed = [json.loads(line) for line in (save / "bad_samples.jsonl").read_text().splitlines()]
    counts: dict[str, int] = {}
    for entry in listed:
        counts[entry["cause"]] = counts.get(entry["cause"], 0) + 1
    assert counts == expected
    assert sorted(entry["index"] for entry in listed) == list(range(sum(expected.values())))
    assert "samples were bad" in done.stdout
    shutil.rmtree(save)
    stopped = run_in_forks(SFT, flags(good, *more, "--max-bad-sample-fraction", "0.01", data=data))
    assert_one_message(stopped, "max-bad-sample-fraction", "bad_samples.jsonl", "path_escape 4")
