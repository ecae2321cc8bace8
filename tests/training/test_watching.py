"""Heartbeats, the hang time-out, profiles, offending samples, stragglers; and that none of it changes a curve."""

import fcntl
import json
import math
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from grpo_runs import TESTS, Program
from sft_reference import write_pairs
from tiny_qwen2_vl import make_tiny_directory

from umer1.data.index_cache import KEPT_BYTES
from umer1.distributed.parallel import ParallelConfig, init_distributed
from umer1.errors import UserError
from umer1.models.fp8 import FP8Config
from umer1.processes import is_running
from umer1.testing import run_distributed
from umer1.training.config import SFTConfig
from umer1.training.hang import HANG_STATUS, HangWatch, message
from umer1.training.heartbeat import RECORD_BYTES, Heartbeat, claim, other_run, read_beats
from umer1.training.offending import LossWatch
from umer1.training.sft import SFTTrainer
from umer1.training.stragglers import straggler_report
from umer1.training.watch import Watch
from umer1.training.watch_config import WatchConfig

SFT = str(TESTS.parent / "examples" / "pretrain_sft.py")
STEP = "elapsed time"
HANG_MINUTES = "0.15"  # longer than any phase of a start takes when other tests have the processors
CURVE = ("iteration", "loss", "disc_loss", "gen_loss", "ce_query", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watching")
    return make_tiny_directory(folder / "model", layers=2), write_pairs(folder / "data", count=24)


def start(setting, folder: Path, *flags: str, steps: int = 4, processes: int = 1) -> Program:
    model, data = setting
    command = [SFT, "--hf-model", str(model), "--data-path", str(data), "--data-root", str(data.parent), "--fp32"]
    command += "--global-batch-size 4 --micro-batch-size 2 --lr 1e-3 --lr-warmup-iters 0 --data-block-size 4".split()
    command += ["--save", str(folder / "run"), "--train-iters", str(steps), *flags]
    return Program(command, folder, processes=processes)


def curve(folder: Path) -> list[list]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [[record[name] for name in CURVE] for record in map(json.loads, lines)]


def test_a_stopped_rank_ends_the_run_with_one_message_about_every_rank(setting, tmp_path):
    run = start(setting, tmp_path, "--hang-timeout-minutes", HANG_MINUTES, steps=100_000, processes=2)
    run.wait_for(STEP, count=3)
    stopped = random.randrange(2)
    pid = run.ranks()[stopped]
    other = 1 - stopped
    os.kill(pid, signal.SIGSTOP)
    try:
        run.wait_for("Look first at", seconds=60)
        run.wait_until(lambda: f"exitcode: {HANG_STATUS}" in run.output or "SIGTERM" in run.output, 30, pause=0.05)
    finally:
        os.kill(pid, signal.SIGCONT)  # torchrun's SIGTERM can be heard now
    run.wait_to_end(60)
    assert run.process.returncode != 0
    said = run.output
    assert said.count("Where every rank is") == 1, said[-3000:]
    lines = {rank: next(line for line in said.splitlines() if f"  rank {rank} (pid" in line) for rank in range(2)}
    assert f"rank {stopped} (pid {pid} on" in lines[stopped] and "stopped, killed or out of reach" in lines[stopped]
    assert "no progress for" in lines[other] and "out of reach" not in lines[other]
    assert f"Look first at: {stopped}." in said
    assert f"exitcode  : {HANG_STATUS}" in said, said[-3000:]
    stacks = (tmp_path / "run" / "heartbeat" / f"rank-{other}.stacks").read_text()
    assert f"rank {other} (pid" in stacks and "Current thread" in stacks and "sft.py" in stacks, stacks
    run.assert_no_orphans()


def beat_of(heart: Heartbeat, pid: int, host: str | None = None) -> None:
    """Make a heartbeat that of another process."""
    heart._pid, heart._host = pid, host or heart._host


def test_a_second_run_in_the_same_save_is_refused(tmp_path):
    """It would remove what the first one is writing.  The first one's rank 0 is process 1 here, which always runs."""
    heart = Heartbeat(tmp_path / "heartbeat", 0, 0.05)
    heart.folder.mkdir()
    beat_of(heart, 1)
    with init_distributed(ParallelConfig()) as state, heart:
        heart.step = 7
        with pytest.raises(UserError, match="save=.* is in use: .*process 1 on .* at step"):
            Watch(WatchConfig(), None, str(tmp_path), state, ()).__enter__()
    assert other_run(heart.folder) is None, "it has ended"


def test_of_two_runs_that_start_at_one_moment_one_goes_on(tmp_path, monkeypatch):
    other = Heartbeat(tmp_path, 0, 5.0)
    beat_of(other, 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: other.write())
    assert claim(tmp_path).pid == 1, "the other one has written last"
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for path in tmp_path.iterdir():
        path.unlink()
    assert claim(tmp_path) is None and read_beats(tmp_path)[0].pid == os.getpid()


def test_records_of_runs_that_are_gone_stop_nobody(tmp_path):
    assert other_run(tmp_path) is None, "none"
    heart, gone = Heartbeat(tmp_path, 0, 5.0), subprocess.Popen(["true"])
    heart.write()
    started = time.monotonic()
    assert other_run(tmp_path) is None, "of this process"
    while is_running(gone.pid):
        time.sleep(0.01)
    beat_of(heart, gone.pid)  # it has ended, and nobody has waited for it
    heart.write()
    assert other_run(tmp_path) is None and time.monotonic() - started < 5
    gone.wait()
    assert not is_running(gone.pid)
    beat_of(heart, subprocess.Popen(["sleep", "0.3"]).pid)  # killed, and on its way out
    heart.write()
    assert other_run(tmp_path) is None and time.monotonic() - started < 5
    beat_of(heart, 1, "another-host")
    heart.write()
    assert other_run(tmp_path, patience=0.3) is None, "nobody writes it"


def test_a_start_that_hangs_ends_with_the_phase_it_hangs_in(setting, tmp_path):
    """The data's index is being made by another process, which never ends; the file is large, so that it is kept."""
    data = tmp_path / "data.jsonl"
    with open(data, "wb") as file:
        file.truncate(KEPT_BYTES)
        fcntl.flock(file, fcntl.LOCK_EX)
        flags = ("--data-path", str(data), "--hang-timeout-minutes", HANG_MINUTES)
        run = start(setting, tmp_path, *flags)
        run.wait_to_end(120)
    assert run.process.returncode == HANG_STATUS, run.output
    assert f"rank 0 (pid {run.process.pid} on" in run.output and "step 0, reading the data's index" in run.output
    stacks = (tmp_path / "run" / "heartbeat" / "rank-0.stacks").read_text()
    assert "index_cache.py" in stacks and "reading the data's index" in stacks


def test_curves_are_the_same_bits_with_everything_on(setting, tmp_path):
    off = ("--hang-timeout-minutes", "0", "--loss-spike-deviations", "0")
    start(setting, tmp_path / "off", *off, processes=2).finish()
    on = "--hang-timeout-minutes 1 --loss-spike-deviations 0.001 --profile --profile-step-start 2".split()
    on += "--profile-step-end 4 --profile-ranks 0 1".split()
    said = start(setting, tmp_path / "on", *on, processes=2).finish()
    assert curve(tmp_path / "on") == curve(tmp_path / "off") and len(curve(tmp_path / "on")) == 4
    run = tmp_path / "on" / "run"
    for rank in range(2):
        trace = json.loads((run / "profile" / f"steps-2-3-rank-{rank}.trace.json").read_text())
        names = {event.get("name") for event in trace["traceEvents"]}
        assert {"data", "forward and backward", "optimizer"} <= names
        assert "aten::" in (run / "profile" / f"steps-2-3-rank-{rank}.memory.txt").read_text()
    beats = read_beats(run / "heartbeat")
    assert {rank: (beat.step, beat.phase) for rank, beat in beats.items()} == {0: (4, "ended"), 1: (4, "ended")}
    assert (run / "heartbeat" / "rank-1.json").stat().st_size == RECORD_BYTES
    assert not list((run / "heartbeat").glob("*.stacks")), "nothing hung"
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["slowest_rank"] in (0, 1) and record["slowest_forward_and_backward_ratio"] >= 1
    assert "slowest rank: " in said
    seconds = {name: value for name, value in record.items() if name.startswith("seconds_in_")}
    assert {"seconds_in_data", "seconds_in_forward_and_backward", "seconds_in_optimizer"} <= seconds.keys()
    assert all(value > 0 for value in seconds.values()) and not any("weights" in name for name in seconds), seconds


def test_a_signal_profiles_the_next_step_and_a_step_that_is_not_finite_names_its_samples(setting, tmp_path):
    """Weights overflow at once; the run ends after three such steps."""
    model, data = setting
    flags = "--lr 1e30 --max-consecutive-skips 3".split()
    done = start(setting, tmp_path / "nan", *flags, steps=20, processes=2)
    done.wait_to_end(120)
    assert done.process.returncode != 0 and "3 steps in a row" in done.output
    found = [json.loads(line) for line in (tmp_path / "nan" / "run" / "offending_samples.jsonl").open()]
    steps = sorted({record["iteration"] for record in found})
    assert len(steps) == 3 and len(found) == 6
    count = len(json.loads(data.read_text()))
    for step in steps:
        records = [record for record in found if record["iteration"] == step]
        assert {record["rank"] for record in records} == {0, 1}
        assert all(record["cause"].startswith("non_finite_") for record in records)
        samples = [sample for record in records for sample in record["samples"]]
        assert sorted(sample["slot"] for sample in samples) == [0, 1, 2, 3]
        assert all(0 <= sample["index"] < count and sample["dataset"] for sample in samples)
    run = start(setting, tmp_path / "signal", steps=100_000)
    run.wait_for(STEP, count=2)
    os.kill(run.process.pid, signal.SIGUSR2)
    run.wait_for("profile of steps", seconds=60)
    os.kill(run.process.pid, signal.SIGTERM)
    assert "stopped by SIGTERM" in run.finish()
    (trace,) = (tmp_path / "signal" / "run" / "profile").glob("steps-*.trace.json")
    first, last = trace.name.split("-")[1:3]
    assert first == last and json.loads(trace.read_text())["traceEvents"]


def test_spikes_are_judged_by_the_median_of_the_steps_before():
    seed = random.SystemRandom().randrange(2**32)
    rng, watch = random.Random(seed), LossWatch(10)
    usual = [watch.judge(3 - step / 100 + rng.uniform(-0.1, 0.1), rng.uniform(1, 1.2)) for step in range(100)]
    assert usual == [None] * 100, seed
    assert watch.judge(20.0, 1.1) == "loss_spike" and watch.judge(2.0, 50.0) == "gradient_spike", seed
    assert watch.judge(math.nan, 1.0) == "non_finite_loss" and watch.judge(2.0, math.inf) == "non_finite_gradient"
    assert watch.judge(2.0, 1.1) is None and watch.judge(-5.0, 0.0) is None, "lower is no spike"
    young = LossWatch(10)
    assert [young.judge(value, 1.0) for value in (1.0, 1.0, 90.0)] == [None] * 3, "too few steps to say what is usual"


def test_a_process_that_makes_progress_is_left_alone_and_one_that_does_not_leaves(tmp_path):
    left: list[int] = []
    with Heartbeat(tmp_path, 0, 0.05) as heart:
        heart.enter("data")
        ended = []

        def leave(status: int) -> None:
            left.append(status)
            ended.append(watch._closing.set())

        watch = HangWatch(heart, 2, 0.4, leave)
        with watch:
            for _ in range(20):
                heart.beat()
                watch._closing.wait(0.05)
            assert not left
            assert watch._closing.wait(60)
    assert left == [HANG_STATUS]
    stacks = (tmp_path / "rank-0.stacks").read_text()
    assert "step 0, data (20 passes done)" in stacks and "test_watching.py" in stacks


def test_the_message_has_a_line_for_ranks_that_nobody_can_see(tmp_path):
    hearts = [Heartbeat(tmp_path, rank, 1.0) for rank in range(2)]
    for heart in hearts:
        heart.step = 7 + heart.rank
        heart.enter("optimizer")
        heart.write()
    (tmp_path / "rank-2.json").write_text('{"rank": 2, "ho')  # half a record
    text = message(read_beats(tmp_path), {0, 1}, 4, 60.0, tmp_path)
    for rank in (2, 3):
        assert f"rank {rank}: its heartbeat cannot be seen from here" in text
    assert "step 7, optimizer" in text and "step 8, optimizer" in text and "Look first at: 0." in text


def compare_times(seconds: list[list[float]]) -> dict:
    with init_distributed(ParallelConfig()) as state:
        return straggler_report(dict(zip(("data", "generating"), seconds[state.rank], strict=True)), state)


def test_the_slowest_rank_is_found_in_each_phase():
    seconds = [[0.0, 2.0], [0.5, 2.0], [1.5, 6.0]]  # rank 0 reads no data
    for record in run_distributed(compare_times, 3, seconds):
        assert record == {
            "slowest_rank": 2,
            "slowest_ratio": 7.5 / 2.5,
            "slowest_data_rank": 2,
            "slowest_data_ratio": 1.5,
            "slowest_generating_rank": 2,
            "slowest_generating_ratio": 3.0,
        }


@pytest.mark.parametrize(("fp8", "name", "mfu"), [(None, "H100", 1.0), ("hybrid", "H100", None), (None, "CPU", None)])
def test_mfu_is_of_the_bf16_peak_and_not_quoted_under_fp8(fp8, name, mfu, monkeypatch):
    monkeypatch.setattr("umer1.device.device_name", lambda: name)
    trainer, found = object.__new__(SFTTrainer), []
    trainer.config, trainer.state = SFTConfig(fp8=FP8Config(fp8_format=fp8)), SimpleNamespace(world_size=2)
    trainer.logger, trainer.stragglers = SimpleNamespace(log=found.append), dict
    trainer.progress = lambda seconds, steps: {}
    step = {"seconds": 2.0, "tokens": 10, "slots": 10, "patches": 0, "flops": 2 * 2 * 989e12, "learning_rate": 1.0}
    trainer.log([step])
    assert found[0]["mfu"] == mfu and found[0]["tflops_per_device"] == pytest.approx(989)


def test_settings_that_cannot_be_are_named_together():
    wrong = WatchConfig(hang_timeout_minutes=-1, loss_spike_deviations=-2, profile_step_start=3, profile_step_end=3)
    wrong.profile_ranks = ["0", "x"]
    found = " | ".join(wrong.violations())
    for name in ("hang_timeout_minutes=-1", "loss_spike_deviations=-2", "profile_step_end=3", "profile_ranks=x"):
        assert name in found
    assert not WatchConfig().violations() and not WatchConfig(profile_ranks=["1"]).violations(2)
    assert WatchConfig(profile_ranks=["1", "2"]).violations(2) == ["profile_ranks=2 must be ranks, numbers from 0 to 1"]
    assert WatchConfig().hang_seconds(10) == 570 and WatchConfig(hang_timeout_minutes=0).hang_seconds(10) is None
