"""examples/grpo.py on fixed rollouts, exported, against docs/method.md, 5 in plain transformers, in every layout.

The rollouts hold well-formed responses of several lengths, malformed ones, cut-off ones, some with sampled vision pads
and failed ones; prompts of text, one image, two images and a video.
"""

import json
from pathlib import Path

import pytest
import torch
from grpo_reference import SIDES, Settings, train, write_fixed_rollouts, write_rl_pairs
from grpo_world import succeed
from programs import ROOT
from safetensors.torch import load_file
from test_sft_parity import assert_same_weights
from tiny_qwen2_vl import make_tiny_directory

PAIRS, GROUP, LR = 8, 3, 1e-3
LAYOUTS = {
    "dp1-packed": (1, "--micro-batch-size 48"),
    "dp1-one-a-batch": (1, "--micro-batch-size 1"),
    "dp2": (2, "--micro-batch-size 5"),
    "dp2-plain-optimizer-budget": (
        2,
        "--no-use-distributed-optimizer --no-balance-batch --micro-batch-size 9 --max-tokens-per-micro-batch 600",
    ),
    "dp2-overlap": (2, "--overlap-grad-reduce --overlap-param-gather --micro-batch-size 8"),
    "dp4": (4, "--micro-batch-size 4"),
    "tp2": (2, "--tensor-model-parallel-size 2 --micro-batch-size 12"),
    "tp2-sp-padded": (2, "--tensor-model-parallel-size 2 --sequence-parallel --micro-batch-size 7"),
    "pp2": (2, "--pipeline-model-parallel-size 2 --micro-batch-size 12"),
    "pp2-one-a-batch": (2, "--pipeline-model-parallel-size 2 --micro-batch-size 1"),
    "pp2-vpp": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --micro-batch-size 6"),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 6"),
}
OPTIONS = {
    "constant-cap": (
        "--loss-normalisation constant --epsilon-high 0.28 --importance-sampling-cap 1.02 --inner-epochs 3",
        {"loss_normalisation": "constant", "epsilon_high": 0.28, "importance_cap": 1.02, "inner_epochs": 3},
    ),
    "mini-batches": (
        "--mini-batches 2 --inner-epochs 2 --beta 0.5 --epsilon 0.02 --comparison-pairs 4",
        {"inner_epochs": 2, "beta": 0.5, "epsilon": 0.02, "comparison_pairs": 4},
    ),
    "temperature-no-kl": (
        "--temperature 0.7 --beta 0 --inner-epochs 2",
        {"temperature": 0.7, "beta": 0.0, "inner_epochs": 2},
    ),
    "weights-vision": (
        "--rewards [{name:format,weight:0.5},{name:ranking,weight:2}] --train-vision",
        {"weights": {"format": 0.5, "ranking": 2.0}, "train_vision": True},
    ),
}


def run_grpo(model: Path, data: Path, rollouts: Path, out: Path, processes: int, flags: str, steps: int = 1):
    """The program with the replaying engine; the exported tensors."""
    arguments = [str(rollouts), "--hf-model", str(model), "--data-path", str(data), "--fp32"]
    arguments += f"--global-batch-size {PAIRS} --num-generations {GROUP} --train-iters {steps} --lr {LR}".split()
    arguments += "--lr-decay-style constant --seq-length 512 --max-completion-length 64".split()
    arguments += ["--parity-threshold", "100", "--log-rollouts", "1", "--log-rollouts-prompts", str(PAIRS)]
    arguments += ["--save", str(out / "save"), "--export-hf", str(out / "hf")]
    arguments += [flag.replace(":", ": ") for flag in flags.split()]
    succeed(arguments, processes, program=ROOT / "tests" / "replay_engine.py")
    return load_file(out / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(directory, data, fixed rollouts)"""
    root = tmp_path_factory.mktemp("grpo")
    model = make_tiny_directory(root / "model", layers=4)
    data = write_rl_pairs(root / "data", PAIRS)
    rollouts = write_fixed_rollouts(model, data, root / "fixed.jsonl", num_generations=GROUP)
    return model, data, rollouts


@pytest.fixture(scope="module")
def truth(case):
    """log of a run, settings -> (step, weights after it); the default one is made once, for no log differs in it."""
    model, data, _ = case
    made = {}

    def find(log: Path, **options):
        key = repr((sorted(options.items()), log.read_text() if "mini_batches" in options else order(log)))
        if key not in made:
            settings = Settings(lr=LR, max_completion_length=64, **options)
            (step,), weights = train(model, data, [log], settings)
            made[key] = step, weights
        return made[key]

    start = train(model, data, [], Settings(lr=LR))[1]
    return find, start


def order(log: Path) -> list:
    """Which record stands in which slot: the order of the data does not depend on the layout."""
    return [(line["slot"], line["index"], line["side"]) for line in map(json.loads, log.read_text().splitlines())]


def check_scores(log: Path, step) -> None:
    """Rewards, advantages and log-probs of the file against the reference's."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for number, side in enumerate(SIDES):
        completions = [
            completion
            for line in sorted((line for line in lines if line["side"] == side), key=lambda line: line["slot"])
            for completion in line["completions"]
        ]
        for row, completion in enumerate(completions):
            if completion["status"] == "failed":
                assert completion["advantage"] is None and step.old_logprobs[number][row] is None
                continue
            for name, value in completion["rewards"].items():
                assert value == pytest.approx(float(step.rewards[name][number, row]), abs=2e-5), (name, side, row)
            assert completion["total"] == pytest.approx(float(step.total[number, row]), abs=2e-5)
            assert completion["advantage"] == pytest.approx(float(step.advantages[number, row]), abs=2e-3)
            old = torch.tensor(completion["old_logprobs"], dtype=torch.float64)
            torch.testing.assert_close(old, step.old_logprobs[number][row], rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case, truth, layout, tmp_path):
    """Two inner epochs: the second one has ratios that differ from 1."""
    model, data, rollouts = case
    find, start = truth
    processes, flags = LAYOUTS[layout]
    got = run_grpo(model, data, rollouts, tmp_path, processes, flags + " --inner-epochs 2")
    log = tmp_path / "save" / "rollouts" / "iter_0000001.jsonl"
    step, want = find(log, inner_epochs=2)
    check_scores(log, step)
    assert_same_weights(got, want, start)


@pytest.mark.parametrize("option", OPTIONS)
def test_options(case, truth, option, tmp_path):
    model, data, rollouts = case
    find, start = truth
    flags, settings = OPTIONS[option]
    if "--mini-batches 2" in flags:
        settings = {**settings, "mini_batches": [[0, 2, 4, 6], [1, 3, 5, 7]]}
    got = run_grpo(model, data, rollouts, tmp_path, 2, f"--micro-batch-size 7 {flags}")
    log = tmp_path / "save" / "rollouts" / "iter_0000001.jsonl"
    step, want = find(log, **settings)
    assert_same_weights(got, want, start)
