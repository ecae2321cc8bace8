"""The program beyond parity: precision, learnt temperature, non-finite steps, what a run leaves behind."""

import json

import pytest
import torch
from programs import SFT, run_in_forks, run_program
from safetensors.torch import load_file
from sft_reference import write_pairs
from tiny_qwen2_vl import make_tiny_directory

from umer1.testing import assert_close


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return make_tiny_directory(folder / "model", layers=2), write_pairs(folder / "data")


def arguments(good, *more: str) -> list[str]:
    model, data = good
    base = ["--hf-model", str(model), "--data-path", str(data), "--data-root", str(data.parent)]
    base += "--global-batch-size 8 --micro-batch-size 4 --train-iters 4 --lr 1e-3 --lr-warmup-iters 0".split()
    return [*base, *more]


def records(save) -> list[dict]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_a_run_in_bf16_learns_and_leaves_its_record(good, tmp_path):
    save = tmp_path / "run"
    done = run_in_forks(SFT, arguments(good, "--bf16", "--train-iters", "12", "--save", str(save)))
    assert done.returncode == 0, done.stderr[-3000:]
    found = records(save)
    assert [record["iteration"] for record in found] == list(range(1, 13))
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]
    wanted = "disc_loss gen_loss ce_query ce_positive disc_recall gen_recall gen_positive_similarity learning_rate "
    wanted += "tokens_per_second patches_per_second tflops_per_device memory_mib eta_seconds bad_samples padding_share"
    assert set(wanted.split()) <= set(found[0])
    assert "negatives per query  7 " in done.stdout and "iteration        1/      12 | consumed samples:" in done.stdout
    for name in ("config.yaml", "training.png", "tensorboard", "iter_0000012", "latest_checkpointed_iteration.txt"):
        assert (save / name).exists(), name
    again = run_in_forks(SFT, arguments(good, "--bf16", "--train-iters", "13", "--save", str(save)))
    assert "resumed at iteration 12" in again.stdout and len(records(save)) == 13


def test_a_learnt_temperature_is_the_same_in_every_layout(good, tmp_path):
    """The logit scale lives on the last stage alone, and its gradient is counted once."""
    temperatures, weights = {}, {}
    layouts = {"one": (1, "8"), "cached": (1, "2"), "dp2": (2, "2")}
    layouts["pp2"] = (2, "4 --pipeline-model-parallel-size 2")
    for name, (processes, flags) in layouts.items():
        save, out = tmp_path / name, tmp_path / f"{name}-hf"
        more = ["--fp32", "--learnable-temperature", "--contrastive-temperature", "0.05", "--save", str(save)]
        more += ["--export-hf", str(out), "--micro-batch-size", *flags.split()]
        done = run_in_forks(SFT, arguments(good, *more), processes)
        assert done.returncode == 0, done.stderr[-3000:]
        temperatures[name] = [record["temperature"] for record in records(save)]
        weights[name] = load_file(out / "model.safetensors")["model.norm.weight"]
    assert temperatures["one"][0] == pytest.approx(0.05) and temperatures["one"][-1] != pytest.approx(0.05, rel=1e-3)
    for name in layouts:
        assert temperatures[name] == pytest.approx(temperatures["one"], rel=1e-5)
        assert_close(name, weights[name], weights["one"], rtol=1e-4)


def test_non_finite_steps_are_skipped_on_all_ranks_and_end_the_run(good, tmp_path):
    """A step so large that the weights overflow: every later loss is non-finite."""
    save = tmp_path / "run"
    more = ["--fp32", "--lr", "1e30", "--train-iters", "20", "--max-consecutive-skips", "3", "--save", str(save)]
    done = run_program(SFT, arguments(good, *more), 2)
    assert done.returncode != 0
    assert done.stderr.count("pretrain_sft: error:") == 1 and "3 steps in a row" in done.stderr
    found = records(save)
    assert [record["skipped_iterations"] for record in found[-2:]] == [1, 2] and found[-1]["nan_iterations"] == 2
    assert not all(torch.isfinite(torch.tensor(record["loss"] or float("nan"))) for record in found)


def test_a_short_run_of_non_finite_steps_fails_and_leaves_no_export_and_no_checkpoint_of_them(good, tmp_path):
    """Fewer steps than --max-consecutive-skips: step 1 makes the weights what all others fail by."""
    save, export = tmp_path / "run", tmp_path / "hf"
    more = ["--fp32", "--lr", "1e30", "--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--train-iters", "4"]
    more += ["--save", str(save), "--save-interval", "1", "--export-hf", str(export)]
    done = run_in_forks(SFT, arguments(good, *more), 1)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stderr.count("pretrain_sft: error:") == 1 and "the last 3 of 4 steps" in done.stderr
    assert "training is complete" not in done.stdout and not (export / "config.json").exists()
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000001"]


def test_dume_needs_no_responses_and_no_cross_entropy(good, tmp_path):
    done = run_in_forks(SFT, arguments(good, "--fp32", "--variant", "dume", "--overlap-grad-reduce"), 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "disc nce" in done.stdout and "gen nce" not in done.stdout and "ce query" not in done.stdout
