"""`umer1 plan` and `--dry-run`: one message with every problem, plans of the published models, ranks that are built."""

import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from umer1.checkpoints import layout
from umer1.configuration import field_types, load_config
from umer1.errors import ConfigError, UserError
from umer1.plan import command
from umer1.plan.dry_run import dry_run
from umer1.plan.layout import Layout, stage_layers
from umer1.plan.report import headline
from umer1.plan.shapes import SHAPES
from umer1.training.launch import default_policy_violations

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "configs"


def run_json(capsys, *argv: str) -> dict:
    command.main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("size", ["2b", "7b"])
@pytest.mark.parametrize("world_size", [1, 8, 64])
def test_recipes(stage, size, world_size, capsys):
    """A committed recipe passes --dry-run at its size, line 1 is the plan's, and it recomputes no more than it must."""
    config = CONFIGS / f"qwen2_vl_{size}_{stage}_{world_size}xh100.yaml"
    flags = ["--config", str(config), "--shape", f"qwen2-vl-{size}", "--world-size", str(world_size)]
    plan = dry_run(stage, ["--dry-run", *flags], config)
    assert "built with" in capsys.readouterr().out
    assert config.read_text().splitlines()[0] == f"# {headline(plan)}"
    parallel = plan.setup.parallel
    recomputed = parallel.recompute_num_layers if parallel.recompute_granularity == "full" else 0
    assert (recomputed, parallel.recompute_method) == (plan.least_recomputation, "block" if recomputed else None)
    assert plan.setup.config.data.global_batch_size == (1024 if stage == "sft" else 32)  # the paper's
    assert parallel.overlap_grad_reduce is parallel.overlap_param_gather is (plan.setup.layout.dp > 1)


@pytest.mark.parametrize(
    ("stage", "size", "world_size"), [("sft", "2b", 8), ("sft", "7b", 64), ("grpo", "2b", 1), ("grpo", "7b", 8)]
)
def test_published_recipes(stage, size, world_size, capsys):
    """What the plan says about recipes that fit 80 GB GPUs hangs together."""
    config = CONFIGS / f"qwen2_vl_{size}_{stage}_{world_size}xh100.yaml"
    flags = ["--config", str(config), "--shape", f"qwen2-vl-{size}"]
    plan = run_json(capsys, stage, *flags, "--world-size", str(world_size))
    layout, memory = plan["layout"], plan["memory"]["fullest"]
    assert layout["tensor_parallel"] * layout["data_parallel"] * layout["pipeline_parallel"] == world_size
    assert plan["problems"] == [] and max(stage["peak_bytes"] for stage in memory) < plan["usable_bytes"]
    for stage_memory in memory:
        assert sum(stage_memory["parts"].values()) == stage_memory["peak_bytes"]
    assert plan["flops"]["model"] < plan["flops"]["executed"]
    assert plan["negatives_per_query"] == (1023 if stage == "sft" else None)
    # Decoder cut by TP, bf16 weights with fp32 gradients: between 5 and 7 bytes a parameter and rank before the
    # optimizer; the frozen ViT is whole on each.
    vision = 2 * plan["parameters"]["frozen"]
    each = plan["parameters"]["trained"] / layout["tensor_parallel"]
    states = memory[0]["parts"]["weights"] + memory[0]["parts"]["gradients"] - vision
    assert 5.5 * each < states < 6.5 * each
    assert plan["seconds_per_step"]["all"] > 0 and plan["largest_micro_batch"] > 0


def test_an_offloaded_optimizer_is_in_host_memory(capsys):
    """7B in full on one 80 GB GPU: 12 bytes a trained parameter go, and the host has 16, a gradient's copy included."""
    config = CONFIGS / "qwen2_vl_7b_sft_1xh100.yaml"
    flags = ["sft", "--config", str(config), "--shape", "qwen2-vl-7b", "--world-size", "1"]
    moved = run_json(capsys, *flags)
    with pytest.raises(SystemExit):
        command.main([*flags, "--no-optimizer-cpu-offload", "--json"])
    whole = json.loads(capsys.readouterr().out)
    trained = moved["parameters"]["trained"]
    parts = [plan["memory"]["fullest"][0]["parts"] for plan in (moved, whole)]
    assert parts[0].get("optimizer states", 0) == 0 and parts[1]["optimizer states"] == 12 * trained
    assert (moved["host_bytes"], whole["host_bytes"]) == ({"the optimizer": 16 * trained}, {})
    assert moved["seconds_per_step"]["all"] > whole["seconds_per_step"]["all"]


def test_the_reference_and_a_snapshot_are_in_host_memory(capsys):
    config = CONFIGS / "qwen2_vl_2b_grpo_8xh100.yaml"
    flags = ["grpo", "--config", str(config), "--shape", "qwen2-vl-2b", "--world-size", "8", "--async-save"]
    plan = run_json(capsys, *flags)
    reference, snapshot = plan["host_bytes"].values()
    trained, frozen = plan["parameters"]["trained"], plan["parameters"]["frozen"]
    assert reference == 2 * trained
    share = (14 * trained + 2 * frozen) / 8
    assert share <= snapshot < 1.2 * share, "one rank of eight writes about an eighth"
    assert list(run_json(capsys, *flags, "--beta", "0", "--no-async-save")["host_bytes"]) == []


def test_no_mfu_under_fp8(capsys):
    flags = ["sft", "--shape", "qwen2-vl-2b", "--bf16", "--world-size", "8", "--recompute-granularity", "full"]
    for further, quoted in ([], True), (["--fp8-format", "hybrid"], False):
        command.main([*flags, *further])
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "model TFLOP/s a device" in line]
        assert ("MFU" in line) is quoted


def test_fp8_that_the_planned_device_lacks():
    """The training program would say so there, which is late."""
    flags = ["--shape", "qwen2-vl-2b", "--hf-model", "x", "--fp8-format", "e4m3", "--fp8-recipe"]
    for recipe, device, said in (
        ("mxfp8", "h100", r"needs compute capability 10\.0 and below 12\.0; H100 SXM has 9\.0"),
        ("tensorwise", "A100", r"needs compute capability 8\.9; A100 SXM 80 GB has 8\.0"),
        ("delayed", "cpu", "needs a GPU; hardware=cpu has none"),
    ):
        for stage in command.STAGES:
            with pytest.raises(ConfigError, match=said):
                command.read_plan(stage, [*flags, recipe, "--hardware", device])
        with pytest.raises(ConfigError, match=said):
            dry_run("sft", ["--dry-run", *flags, recipe, "--hardware", device], CONFIGS / "mini_sft.yaml")
    assert command.read_plan("sft", [*flags, "mxfp8", "--hardware", "b200"]).setup.hardware.name == "B200 SXM"


def test_negatives_are_those_of_pairs_that_there_are(capsys):
    """Without cached contrastive: of one micro-batch over all ranks, which a small step does not fill."""
    flags = ["sft", "--shape", "qwen2-vl-2b", "--world-size", "8", "--hardware", "cpu", "--no-cached-contrastive"]
    for pairs, negatives in ((8, 7), (16, 15), (64, 31)):
        plan = run_json(capsys, *flags, "--global-batch-size", str(pairs), "--micro-batch-size", "4")
        assert plan["negatives_per_query"] == negatives


def test_rollouts_that_are_learnt_from_twice_cost_twice(capsys):
    """8 = 2 x (forward + twice it) + the two forwards that score; host memory is gone through at every update."""
    config = str(CONFIGS / "qwen2_vl_7b_grpo_1xh100.yaml")
    flags = ["grpo", "--config", config, "--shape", "qwen2-vl-7b", "--world-size", "1", "--patches-per-side", "0"]
    flags += ["--recompute-granularity", "none", "--recompute-method", "none", "--recompute-num-layers", "none"]
    flags += ["--hardware", "h200"]
    one, two = (run_json(capsys, *flags, *more) for more in ([], ["--inner-epochs", "2"]))
    assert two["flops"]["model"] == pytest.approx(one["flops"]["model"] * 8 / 5)
    extra = one["flops"]["executed"] - one["flops"]["model"]
    assert two["flops"]["executed"] - two["flops"]["model"] == pytest.approx(2 * extra)
    cut = run_json(capsys, *flags, "--mini-batches", "2")
    host = cut["seconds_per_step"]["training"] - one["seconds_per_step"]["training"]
    assert host == pytest.approx(one["parameters"]["trained"] * (4 + 7 * 4 + 2) / 40e9)


def test_engines_that_are_cut_further_than_there_are_kv_heads(capsys):
    """vLLM gives each of four devices one of the two heads."""
    config = str(CONFIGS / "qwen2_vl_2b_grpo_8xh100.yaml")
    flags = ["grpo", "--config", config, "--shape", "qwen2-vl-2b", "--rollout-tensor-parallel-size"]
    each = [run_json(capsys, *flags, str(cut))["rollouts"]["cache_bytes_per_token"] for cut in (1, 2, 4)]
    assert each == [2 * 28 * heads * 128 * 2 for heads in (2, 1, 1)]


def test_an_engine_stands_on_one_node():
    """Ranks 6 to 8 of three on each engine would be of two nodes."""
    flags = ["--shape", "qwen2-vl-2b", "--hf-model", "x", "--world-size", "24", "--rollout-tensor-parallel-size", "3"]
    flags += ["--global-batch-size", "48", "--hardware", "cpu"]
    for check in (command.read_plan, lambda stage, argv: dry_run(stage, ["--dry-run", *argv], None)):
        with pytest.raises(ConfigError, match="=3 must divide the 8 processes of a node"):
            check("grpo", flags)
    for further in (["--gpus-per-node", "6"], ["--rollout-engine", "torch"]):
        command.read_plan("grpo", [*flags, *further])


def test_mini_batches_through_interleaved_stages():
    """Each has micro-batches of its own, of prompts alone where there are fewer rollouts than stages."""
    flags = ["--shape", "qwen2-vl-2b", "--hf-model", "x", "--world-size", "7", "--hardware", "cpu"]
    flags += ["--pipeline-model-parallel-size", "7", "--num-layers-per-virtual-pipeline-stage", "2"]
    flags += ["--global-batch-size", "2", "--mini-batches", "2", "--num-generations", "2", "--micro-batch-size", "8"]
    plan = command.read_plan("grpo", flags)
    assert plan.work.bubble == (7 * 2 + 6) / (7 * 2)  # each mini-batch fills the pipeline anew
    tokens = plan.expected_tokens
    assert len(tokens) == 2 * 7 and tokens[:7] == tokens[7:] == [954] * 4 + [551] * 3


def test_sides_are_no_longer_than_the_sequence(capsys):
    """The embedded defaults have sequences of 512 tokens, and responses of 48."""
    for stage, most in (("sft", 16 * 2 * 512), ("grpo", 64 * 512)):
        flags = [stage, "--config", str(CONFIGS / f"mini_{stage}.yaml"), "--hardware", "cpu", "--world-size", "2"]
        flags += ["--hf-model", str(ROOT / "umer1/assets/mini_base"), "--load", "none"]
        plan = run_json(capsys, *flags)
        assert plan["micro_batch_tokens"]["expected"] <= plan["micro_batch_tokens"]["fullest"] == most
        command.main(flags)
        assert "assumed sides" not in capsys.readouterr().out  # nothing is said of a speed
        command.main([*flags, "--headline"])
        assert capsys.readouterr().out.startswith("2 x CPU: ")


def test_a_run_that_does_not_fit(capsys):
    argv = ["sft", "--shape", "qwen2-vl-7b", "--bf16", "--world-size", "1"]
    with pytest.raises(SystemExit) as ended:
        command.main(argv)
    assert ended.value.code == 1
    assert "PROBLEM: a training step takes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main([*argv, "--hardware", "h100", "--headline"])
    assert capsys.readouterr().out.endswith("not measured. It does not fit.\n")


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
        "--context-parallel-size",
        "2",
        "--recompute-method",
        "block",
        "--profile-ranks",
        "6",
    ]
    with pytest.raises(ConfigError) as raised:
        command.read_plan("sft", [*argv, "--shape", "qwen2-vl-2b", "--data-path", "/not/looked/at.json"])
    text = str(raised.value)
    told = ["--frobnicate", "hardware 'abacus'", "lr=-1.0", "processes, 6", "num_key_value_heads=2"]
    told += ["context_parallel_size=2", "recompute_method=block needs", "profile_ranks=6 must be"]
    for problem in told:
        assert problem in text, problem
    assert "/not/looked/at.json" not in text
    with pytest.raises(ConfigError, match="(?s)cannot be read.*--shape.*sequence_parallel needs"):
        command.read_plan("sft", ["--hf-model", str(tmp_path), "--sequence-parallel"])
    with pytest.raises(ConfigError, match="no model is named; give --shape qwen2-vl-2b or qwen2-vl-7b, or --hf-model"):
        command.read_plan("sft", ["--world-size", "8"])  # not the tiny base, which nobody plans for
    with pytest.raises(UserError, match="use sft or grpo"):
        command.main(["dpo"])


@pytest.mark.parametrize("stage", command.STAGES)
def test_no_number_is_too_odd_for_the_checks(stage):
    """Each number of each section at 0, -1, a half and what is not finite: legal, or told by name."""
    shape = SHAPES["qwen2-vl-2b"]
    for name, (_, wanted) in field_types(command.STAGES[stage]).items():
        if not {int, float} & {wanted, *typing.get_args(wanted)}:
            continue
        for value in ("0", "-1", "0.5", "nan", "inf"):
            flags = [f"--{name.replace('_', '-')}", value]
            try:
                load_config(command.STAGES[stage], flags, further=lambda config: config.layout_violations(shape, 8))
            except ConfigError as error:
                assert name in str(error).replace("-", "_"), (flags, error)
    for name in ("global-batch-size", "seq-length", "world-size") + ("num-generations",) * (stage == "grpo"):
        with pytest.raises(ConfigError, match=rf"{name.replace('-', '_')}=1000000000000000000000000000000\b.*at most"):
            command.read_plan(stage, ["--shape", "qwen2-vl-2b", "--hf-model", "x", f"--{name}", f"1{30 * '0'}"])


def test_a_directory_needs_only_its_config(tmp_path):
    config = json.loads((ROOT / "umer1/assets/mini_base/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = command.read_plan("sft", ["--hf-model", str(tmp_path), "--hardware", "cpu", "--world-size", "2"])
    assert plan.seconds is None and plan.problems() == [] and plan.largest_micro_batch is None


def test_the_model_of_a_run_that_is_gone_on_with(tmp_path):
    """`--load` alone is another model than the embedded default; what holds none is told."""
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        command.read_plan("grpo", ["--load", str(tmp_path), "--hardware", "cpu"])
    aside = layout.new_aside(tmp_path, 4)
    shutil.copytree(ROOT / "umer1/assets/mini_base", aside / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((aside / "hf/config.json").read_text())
    deeper = config.get("text_config", config)
    deeper["num_hidden_layers"] = deeper["max_window_layers"] = deeper["num_hidden_layers"] + 1
    if "layer_types" in deeper:
        deeper["layer_types"].append(deeper["layer_types"][0])
    (aside / "hf/config.json").write_text(json.dumps(config))
    for name in (".metadata", "common.pt", "extra.json", "metadata.json", "rng.json"):
        (aside / name).write_text("not looked at")
    manifest = {"iteration": 4, "optimizer": True, "distributed_optimizer": True, "dtype": "float32"}
    layout.seal(aside, layout.iteration_path(tmp_path, 4), manifest | {"layout": {}, "model": {}, "trained": []}, {})
    for stage in command.STAGES:
        plan = command.read_plan(stage, ["--load", str(tmp_path), "--hardware", "cpu", "--world-size", "2"])
        assert plan.setup.model.num_layers == deeper["num_hidden_layers"]


def test_tensor_parallel_groups_that_cross_nodes_are_told(capsys):
    flags = ["sft", "--shape", "qwen2-vl-7b", "--hardware", "cpu", "--global-batch-size", "10", "--gpus-per-node", "5"]
    flags += ["--tensor-model-parallel-size", "2", "--world-size"]
    for world_size, told in (("4", False), ("10", True), ("20", True)):
        command.main([*flags, world_size])
        assert ("groups of 2 cross nodes of 5" in capsys.readouterr().out) is told


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
        # 6 data-parallel ranks: FP8 weights, which nothing here builds, would be padded apart
        (
            "sft",
            ["--world-size", "24", "--global-batch-size", "24", "--fp8-format", "hybrid", "--fp8-param-gather"],
            1,
        ),
        ("grpo", ["--world-size", "32", "--tensor-model-parallel-size", "4"], 1),
    ],
)
def test_dry_run_builds_each_stage_of_a_cluster(stage, flags, built, capsys):
    config = CONFIGS / f"qwen2_vl_7b_{stage}_64xh100.yaml"
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    dry_run(stage, ["--dry-run", "--config", str(config), "--shape", "qwen2-vl-7b", *flags], config)
    assert {name: os.environ.get(name) for name in before} == before
    said = capsys.readouterr().out
    assert said.count("built with") == built and "No problem was found." in said


def test_dry_run_finds_what_the_program_would(tmp_path):
    flags = ["--dry-run", "--world-size", "64", "--hf-model", str(ROOT / "umer1/assets/mini_base"), "--foo", "1"]
    flags += ["--data-path", str(tmp_path / "absent.json"), "--tensor-model-parallel-size", "3"]
    flags += ["--save", str(ROOT / "setup.py" / "run")]
    with pytest.raises(ConfigError) as raised:
        dry_run("grpo", flags, CONFIGS / "mini_grpo.yaml", default_policy_violations)
    for problem in ("--foo", "absent.json does not exist", "processes, 64", "use 1 or 2", "setup.py is a file"):
        assert problem in str(raised.value), problem
    flags[flags.index("--hf-model") + 1] = str(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="(?s)nothing.*processes, 64"):
        dry_run("grpo", flags, CONFIGS / "mini_grpo.yaml", default_policy_violations)


def test_dry_run_of_a_model_by_name_looks_at_what_is_written(tmp_path):
    (tmp_path / "file").touch()
    flags = [
        "--dry-run",
        "--shape",
        "qwen2-vl-2b",
        "--export-hf",
        str(tmp_path / "file"),
        "--save",
        str(tmp_path / "file"),
    ]
    with pytest.raises(ConfigError, match="(?s)file is a file; the export.*file is a file"):
        dry_run("sft", flags, CONFIGS / "qwen2_vl_2b_sft_8xh100.yaml")


def test_program_ends_with_one_message_and_trains_nothing(tmp_path):
    argv = [sys.executable, "examples/pretrain_sft.py", "--dry-run", "--world-size", "64", "--lr", "0"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and "lr=0.0 must be above 0" in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
