"""GRPO with the torch engine: killed and stopped at any moment, it goes on and ends as if undisturbed."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from grpo_reference import write_rl_pairs
from grpo_runs import Run, metrics, slow
from safetensors.torch import load_file
from sft_reference import write_pairs
from test_kill_and_resume import assert_close, assert_identical, weights
from test_kill_and_resume import finish as sft_finish
from test_kill_and_resume import start as sft_start
from tiny_qwen2_vl import make_tiny_directory

STEPS = ("--train-iters", "16")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo-resume")
    return make_tiny_directory(folder / "model", layers=2), write_rl_pairs(folder / "data", count=12)


@pytest.fixture(scope="module")
def undisturbed(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo-undisturbed")
    Run(setting, folder, *STEPS).finish()
    return folder


def resume(setting, folder: Path, *flags: str, **settings) -> str:
    run = Run(setting, folder, *STEPS, *flags, **settings)
    output = run.finish()
    assert "resumed at iteration" in output
    return output


def assert_same_record(got: Path, want: Path) -> None:
    """The same steps with the same numbers, each once."""
    names = ("iteration", "reward", "kl", "loss", "entropy", "grad_norm")
    rows = [[{name: line.get(name) for name in names} for line in metrics(folder)] for folder in (got, want)]
    assert rows[0] == rows[1]


def test_killed_at_random_moments(setting, undisturbed, tmp_path):
    """While the reference or a checkpoint is written, in mid-rollout, and anywhere; drawn anew in every run."""
    seed = random.randrange(2**32)
    print(f"delays drawn with seed {seed}")
    rng, place, kills = random.Random(seed), tmp_path / "run", 0
    for kind in ("reference", "save", "rollout", "any", "save"):
        had = len(list(place.glob("iter_*")))
        run = Run(setting, tmp_path, *STEPS, **slow(tmp_path, "0.02" if kind == "rollout" else "0"))
        if kind == "reference":
            reached = run.wait_until(lambda: list(place.glob(".tmp-reference*")), pause=0)
        elif kind == "save":
            reached = run.wait_until(lambda: len(list(place.glob("iter_*"))) > had)  # noqa: B023
            reached = reached and run.wait_until(lambda: list(place.glob(".tmp-iter*")), pause=0)
        else:
            reached = run.wait_until(lambda: list(tmp_path.glob("generate-0-2")))
        time.sleep(rng.uniform(0, {"rollout": 0.15, "any": 0.3}.get(kind, 0.02)))
        if not reached or run.ended():
            break
        run.kill()
        run.assert_no_orphans()
        kills += 1
    assert kills >= 4, f"the run ended before it could be disturbed; make it longer\n{run.output[-3000:]}"
    resume(setting, tmp_path)
    assert_identical(tmp_path, undisturbed)
    assert_same_record(tmp_path, undisturbed)
    assert not [entry.name for entry in place.iterdir() if entry.name.startswith(".")]


def test_one_rank_killed(setting, undisturbed, tmp_path):
    """In mid-rollout, while the other one waits for it: the launcher ends, and the same command goes on."""
    run = Run(setting, tmp_path, *STEPS, "--num-workers", "1", processes=2, **slow(tmp_path, "0,0.1"))
    assert run.wait_until(lambda: list(tmp_path.glob("generate-1-4"))), run.output[-4000:]
    os.kill(run.ranks()[1], signal.SIGKILL)
    run.finish(status=1, seconds=60)
    run.assert_no_orphans()
    resume(setting, tmp_path, processes=2)
    assert_close(tmp_path, undisturbed)


def test_a_signal_to_one_rank(setting, undisturbed, tmp_path):
    """That waits while the other one generates: both leave at once.  The rest by a copy of the model over two ranks."""
    run = Run(setting, tmp_path, *STEPS, processes=2, **slow(tmp_path, "0,0.2"))
    assert run.wait_until(lambda: list(tmp_path.glob("generate-1-4"))), run.output[-4000:]
    os.kill(run.ranks()[0], signal.SIGTERM)
    output = run.finish(seconds=60)
    assert "stopped by SIGTERM during the rollouts of iteration 4" in output
    assert (tmp_path / "run" / "iter_0000003").is_dir()
    run.assert_no_orphans()
    resume(setting, tmp_path, "--tensor-model-parallel-size", "2", processes=2)
    assert_close(tmp_path, undisturbed)


def test_signals_anywhere(setting, undisturbed, tmp_path):
    """In mid-rollout, in a held-out evaluation, between two steps: nothing is lost, of the evaluation neither."""
    flags = (*STEPS, "--eval-data-path", str(setting[1]), "--eval-interval", "4", "--save-interval", "1000")

    def stop(number: signal.Signals, call: int) -> str:
        """Send the signal, to workers of the data loader as well, in the n-th call of the engine."""
        run = Run(setting, tmp_path, *flags, "--num-workers", "2", **slow(tmp_path, "0.05"))
        assert run.wait_until(lambda: (tmp_path / f"generate-0-{call}").exists()), run.output[-4000:]
        os.killpg(run.process.pid, number)
        output = run.finish(seconds=60)
        run.assert_no_orphans()
        return output

    # an evaluation makes three calls, a step one
    assert "stopped by SIGUSR1 during the rollouts of iteration 2" in stop(signal.SIGUSR1, 5)
    output = stop(signal.SIGTERM, 5)
    assert "resumed at iteration 1 " in output
    assert "stopped by SIGTERM during the held-out evaluation after iteration 4" in output
    run = Run(setting, tmp_path, *flags)
    run.wait_for("iteration        6/")
    run.process.send_signal(signal.SIGTERM)
    output = run.finish(seconds=60)
    assert "resumed at iteration 4 " in output and "stopped by SIGTERM" in output
    run = Run(setting, tmp_path, *flags)
    assert "resumed at iteration" in run.finish()
    assert_identical(tmp_path, undisturbed)
    records = metrics(tmp_path)
    assert [line["iteration"] for line in records if "reward" in line] == list(range(1, 17))
    assert [line["iteration"] for line in records if "eval_gen_hit1" in line] == [0, 4, 8, 12, 16]


def copy_at_12(undisturbed: Path, folder: Path) -> Path:
    """The undisturbed run as it stood after twelve steps."""
    shutil.copytree(undisturbed / "run", folder / "run")
    for later in ("iter_0000014", "iter_0000016"):
        shutil.rmtree(folder / "run" / later)
    return folder / "run"


def test_no_reference_no_training(setting, undisturbed, tmp_path):
    shutil.rmtree(copy_at_12(undisturbed, tmp_path) / "reference")
    output = Run(setting, tmp_path, *STEPS).finish(status=2)
    assert "the run cannot go on without its reference model" in output and "iteration       13/" not in output


def test_load_continues_a_grpo_run(setting, undisturbed, tmp_path):
    """Iteration, optimizer, data and reference go into the new --save, which then needs the old place no more."""
    old = copy_at_12(undisturbed, tmp_path / "old")
    place = tmp_path / "new"
    load = ("--load", str(old / "iter_0000012"), "--hf-model", None)
    run = Run(setting, place, *STEPS, *load, **slow(place, "0.05"))
    assert run.wait_until(lambda: (place / "generate-0-4").exists()), run.output[-4000:]
    run.kill()
    assert (place / "run" / "iter_0000014").is_dir()
    shutil.rmtree(tmp_path / "old")
    resume(setting, place)
    assert_identical(place, undisturbed)
    assert [line["kl"] for line in metrics(place)] == [line["kl"] for line in metrics(undisturbed)[12:]]


def test_load_takes_the_weights_of_an_sft_run(setting, tmp_path):
    model, _ = setting
    sft = sft_start((model, write_pairs(tmp_path / "pairs", count=8)), tmp_path / "sft", "--train-iters", "5")
    sft_finish(sft)
    output = Run(setting, tmp_path, "--train-iters", "1", "--load", str(tmp_path / "sft/run"), "--hf-model", None)
    assert "optimizer, schedule and iteration start anew" in output.finish()
    (record,) = metrics(tmp_path)
    assert record["iteration"] == 1 and record["kl"] == 0
    frozen, trained = (load_file(path / "model.safetensors") for path in (tmp_path / "run/reference", tmp_path / "hf"))
    before = weights(tmp_path / "sft")
    assert all(torch.equal(frozen[name], before[name]) for name in before)
    assert any(not torch.equal(trained[name], before[name]) for name in before)


def test_dynamic_sampling(setting, tmp_path):
    """Several rounds of data in a step: a signal in one of them puts the data back to where the step began."""
    flags = ("--train-iters", "6", "--dynamic-sampling", "", "--rewards", "[{name: 'toy_rewards:an_e'}]")
    want, place = tmp_path / "want", tmp_path / "got"
    Run(setting, want, *flags).finish()
    rounds = [line["rounds"] for line in metrics(want)]
    assert max(rounds) > 1, rounds
    step = next(number for number, count in enumerate(rounds) if count > 1)
    run = Run(setting, place, *flags, **slow(place, "0.05"))
    second = place / f"generate-0-{sum(rounds[:step]) + 2}"
    assert run.wait_until(second.exists), run.output[-4000:]
    run.process.send_signal(signal.SIGTERM)
    assert f"stopped by SIGTERM during the rollouts of iteration {step + 1}" in run.finish(seconds=60)
    assert "resumed at iteration" in Run(setting, place, *flags).finish()
    assert_identical(place, want)
    assert_same_record(place, want)


def test_a_rank_whose_rollouts_all_time_out(setting, tmp_path):
    """They are left out, not scored 0, and the other rank's are learnt from."""
    flags = ("--train-iters", "2", "--rollout-timeout-seconds", "1", "--log-rollouts-prompts", "4")
    Run(setting, tmp_path, *flags, processes=2, **slow(tmp_path, "0,0.4")).finish()
    records = metrics(tmp_path)
    assert [line["failed_share"] for line in records] == [0.5, 0.5]
    assert all(line["grad_norm"] > 0 for line in records)
    completions = [
        completion
        for line in (tmp_path / "run/rollouts/iter_0000001.jsonl").read_text().splitlines()
        for completion in json.loads(line)["completions"]
    ]
    failed = [completion for completion in completions if completion["status"] == "failed"]
    assert len(failed) == len(completions) / 2
    assert all(completion["total"] is None and completion["advantage"] is None for completion in failed)


def test_all_rollouts_time_out(setting, tmp_path):
    flags = ("--train-iters", "2", "--rollout-timeout-seconds", "0.3", "--seed", "2")
    Run(setting, tmp_path, *flags, **slow(tmp_path, "0.2")).finish()
    assert [line["failed_share"] for line in metrics(tmp_path)] == [1.0, 1.0]
