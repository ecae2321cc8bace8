"""`umer1 plan` and `--dry-run`: one message with every problem, plans of the published models, ranks that are built."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from umer1.errors import ConfigError, UserError
from umer1.plan import command
from umer1.plan.dry_run import dry_run
from umer1.plan.layout import Layout, stage_layers
from umer1.training.launch import default_policy_violations

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "configs"
GIB = 2**30


def run_json(capsys, *argv: str) -> dict:
    command.main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("size", ["2b", "7b"])
@pytest.mark.parametrize("world_size", [8, 64])
def test_published_recipes(stage, size, world_size, capsys):
    """The committed recipes fit 80 GB GPUs at 8 and 64; what the plan says about them hangs together."""
    flags = ["--config", str(CONFIGS / f"qwen2_vl_{size}_{stage}.yaml"), "--shape", f"qwen2-vl-{size}"]
    if (stage, size, world_size) == ("grpo", "2b", 64):
        flags += ["--global-batch-size", "64"]  # 32 pairs are fewer than its ranks
    plan = run_json(capsys, stage, *flags, "--world-size", str(world_size))
    layout, memory = plan["layout"], plan["memory"]["fullest"]
    assert layout["tensor_parallel"] * layout["data_parallel"] * layout["pipeline_parallel"] == world_size
    assert plan["problems"] == [] and max(stage["peak_bytes"] for stage in memory) < plan["usable_bytes"]
    for stage_memory in memory:
        assert sum(stage_memory["parts"].values()) == stage_memory["peak_bytes"]
    assert plan["flops"]["model"] < plan["flops"]["executed"]
    assert plan["negatives_per_query"] == (1023 if stage == "sft" else None)
    # Weights cut by TP with bf16 gradients in fp32: between 5 and 7 bytes a parameter and rank before the optimizer.
    each = sum(plan["parameters"].values()) / layout["tensor_parallel"]
    states = memory[0]["parts"]["weights"] + memory[0]["parts"]["gradients"]
    assert 4.5 * each < states < 6.5 * each
    assert plan["seconds_per_step"]["all"] > 0 and plan["largest_micro_batch"] > 0


def test_a_run_that_does_not_fit(capsys):
    argv = ["sft", "--shape", "qwen2-vl-7b", "--bf16", "--world-size", "1"]
    with pytest.raises(SystemExit) as ended:
        command.main(argv)
    assert ended.value.code == 1
    assert "PROBLEM: a training step takes" in capsys.readouterr().out


def test_all_problems_at_once(tmp_path):
    argv = [
        "--world-size",
        "6",
        "--hardware",
        "abacus",
        "--lr",
        "-1",
        "--tensor-model-parallel-size",
        "4",
        "--frobnicate",
    ]
    with pytest.raises(ConfigError) as raised:
        command.read_plan("sft", [*argv, "--shape", "qwen2-vl-2b", "--data-path", "/not/looked/at.json"])
    text = str(raised.value)
    for problem in ("--frobnicate", "hardware 'abacus'", "lr=-1.0", "processes, 6", "num_key_value_heads=2"):
        assert problem in text, problem
    assert "/not/looked/at.json" not in text
    with pytest.raises(ConfigError, match="cannot be read.*--shape"):
        command.read_plan("sft", ["--hf-model", str(tmp_path)])
    with pytest.raises(UserError, match="use sft or grpo"):
        command.main(["dpo"])


def test_a_directory_needs_only_its_config(tmp_path):
    config = json.loads((ROOT / "umer1/assets/mini_base/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = command.read_plan("sft", ["--hf-model", str(tmp_path), "--hardware", "cpu", "--world-size", "2"])
    assert plan.seconds is None and plan.problems() == [] and plan.largest_micro_batch is None


def test_places_are_megatrons():
    """TP fastest, then DP, then PP; layers of interleaved stages go round."""
    layout = Layout(world_size=16, tp=2, pp=2, virtual=1)
    places = [layout.place(rank, 8) for rank in range(16)]
    assert [(p.tp, p.dp, p.pp, p.node) for p in places[:3]] == [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0)]
    assert (places[8].pp, places[8].dp, places[8].node) == (1, 0, 1)
    assert all(layout.rank_of(tp=p.tp, dp=p.dp, pp=p.pp) == p.rank for p in places)
    parallel = command.read_plan(
        "sft",
        ["--shape", "qwen2-vl-2b", "--world-size", "4", "--pipeline-model-parallel-size", "2"]
        + ["--num-layers-per-virtual-pipeline-stage", "7", "--hardware", "cpu"],
    ).setup.parallel
    assert stage_layers(parallel, 28, 1) == [range(7, 14), range(21, 28)]


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("sft", ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "7"]),
        ("grpo", ["--mini-batches", "3", "--comparison-pairs", "4"]),
        ("sft", []),
    ],
)
def test_legal_batches_are_the_multiples(stage, flags):
    argv = ["--shape", "qwen2-vl-2b", "--world-size", "8", "--hardware", "cpu", "--hf-model", "x", *flags]
    step = command.read_plan(stage, [*argv, "--global-batch-size", "96"]).batch_step
    legal = []
    for size in range(4, 49, 4):
        try:
            command.read_plan(stage, [*argv, "--global-batch-size", str(size)])
            legal.append(size)
        except ConfigError:
            pass
    assert legal == [size for size in range(4, 49, 4) if size % step == 0]


def test_help_names_every_setting(capsys):
    command.main(["grpo", "--help"])
    text = capsys.readouterr().out
    assert "--world-size" in text and "--num-generations" in text and "--assumed-utilisation" in text


@pytest.mark.parametrize(
    ("stage", "flags", "built"),
    [
        ("sft", ["--pipeline-model-parallel-size", "2", "--world-size", "64"], 2),
        ("grpo", ["--world-size", "32", "--tensor-model-parallel-size", "4"], 1),
    ],
)
def test_dry_run_builds_each_stage_of_a_cluster(stage, flags, built, capsys):
    config = CONFIGS / f"qwen2_vl_7b_{stage}.yaml"
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    dry_run(stage, ["--dry-run", "--config", str(config), "--shape", "qwen2-vl-7b", *flags], config)
    assert {name: os.environ.get(name) for name in before} == before
    said = capsys.readouterr().out
    assert said.count("built with") == built and "No problem was found." in said


def test_dry_run_finds_what_the_program_would(tmp_path):
    flags = ["--dry-run", "--world-size", "64", "--hf-model", str(ROOT / "umer1/assets/mini_base"), "--foo", "1"]
    flags += ["--data-path", str(tmp_path / "absent.json"), "--tensor-model-parallel-size", "3"]
    with pytest.raises(ConfigError) as raised:
        dry_run("grpo", flags, CONFIGS / "mini_grpo.yaml", default_policy_violations)
    for problem in ("--foo", "absent.json does not exist", "processes, 64", "use 1 or 2"):
        assert problem in str(raised.value), problem


def test_program_ends_with_one_message_and_trains_nothing(tmp_path):
    argv = [sys.executable, "examples/pretrain_sft.py", "--dry-run", "--world-size", "64", "--lr", "0"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and "lr=0.0 must be above 0" in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
