"""examples/grpo.py with real vLLM: trainer and engine compute one model after every update, or the run stops."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from grpo_reference import SIDES, Policy
from grpo_world import Setting, records, rollouts, succeed
from programs import run_in_forks

pytest.importorskip("vllm")

BROKEN = Path(__file__).resolve().parents[1] / "broken_sync.py"
STEPS = 20
LIMIT = 1e-3  # nats a token, fp32
TESTS = BROKEN.parent
# All groups have spread, so that the weights move in every step.
REWARD = ["--rewards", "[{name: 'toy_rewards:letters'}]"]
# One step's learning rate moves log-probs by far more than LIMIT.
LARGE_STEPS = "--lr 2e-3 --lr-decay-style constant --beta 0 --clip-grad 0".split()


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Heads as wide as vLLM wants them; prompts of text, one image, two images and a video."""
    return Setting(tmp_path_factory.mktemp("grpo-vllm"), layers=2, hidden=128)


def flags(setting, *more: str) -> list[str]:
    return setting.flags("--rollout-engine", "vllm", "--max-completion-length", "8", *LARGE_STEPS, *REWARD, *more)


@pytest.mark.parametrize("layout", ["", "--tensor-model-parallel-size 2"])
def test_every_update_arrives(setting, layout, tmp_path):
    save = tmp_path / "run"
    more = [*layout.split(), "--train-iters", str(STEPS), "--save", str(save), "--log-rollouts", str(STEPS)]
    more += ["--parity-threshold", str(LIMIT), "--num-generations", "2"]
    out = succeed(flags(setting, *more), 2 if layout else 1)
    assert "engine               vllm" in out
    found = records(save)
    assert [record["iteration"] for record in found] == list(range(1, STEPS + 1))
    for record in found:
        assert record["failed_share"] == 0 and record["grad_norm"] > 0
        assert record["mismatch_mean"] < LIMIT, record["iteration"]
        assert abs(record["mismatch_p99"] - 1) < 0.01
    lines = rollouts(save, STEPS)
    assert {"video", "image"} <= {kind_of(setting, line) for line in lines}, "no picture was in the last step"
    assert moved(setting, lines) > 50 * LIMIT, "with weights that stay nothing is shown"


def kind_of(setting, line: dict) -> str:
    record, side = json.loads(setting.data.read_text())[line["index"]], ("qry", "pos")[SIDES.index(line["side"])]
    return "video" if record[f"{side}_video"][0] else "image" if record[f"{side}_image"] else "text"


@torch.no_grad()
def moved(setting, lines: list[dict]) -> float:
    """Mean |difference| between the log-probs that were logged and those of the weights of before."""
    policy, pairs, differences = Policy(setting.model), json.loads(setting.data.read_text()), []
    for line in lines:
        side = SIDES.index(line["side"])
        prompt = policy.read(policy.prompt_of(setting.data.parent, pairs[line["index"]], side))
        for completion in line["completions"]:
            before, _ = policy.respond(prompt, completion["token_ids"], 1.0)
            differences.append(np.abs(before.numpy() - np.array(completion["logprobs"])))
    return float(np.concatenate(differences).mean())


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("noise", ["iteration 0", "differ by", "parity_threshold=0.01", "the weights did not arrive"]),
        ("once", ["differ by", "parity_threshold=0.01", "the weights did not arrive"]),
        ("pictures", ["vLLM makes", "tokens of it, the trainer", "both must see the same prompt"]),
    ],
)
def test_a_fault_stops_the_run(setting, fault, words, tmp_path):
    more = ["--train-iters", "6", "--save", str(tmp_path / "run"), "--lr", "2e-2"]
    done = run_in_forks(BROKEN, [fault, *flags(setting, *more)])
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr.count("grpo: error:") == 1 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr[-2000:]
    if fault == "once":
        steps = records(tmp_path / "run")
        assert steps and steps[0]["mismatch_mean"] < LIMIT, "the first update was there"
