"""Signals, full disks, another layout, a dead launcher: a run resumes and ends with the weights of the undisturbed one.

Kills at random moments: test_random_kills.py.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from checkpoint_runs import mount_disk, remount, unmount
from grpo_runs import is_running
from programs import SFT, interpreter
from safetensors.torch import load_file
from sft_reference import write_pairs
from tiny_qwen2_vl import make_tiny_directory

from umer1.checkpoints import layout

ITERATIONS = 24


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    model = make_tiny_directory(folder / "model", layers=2)
    data = write_pairs(folder / "data", count=24)
    return model, data


def arguments(setting, folder: Path, *flags: str) -> list[str]:
    """Of a run with one log line a step that saves every second step into folder/run; later flags win."""
    model, data = setting
    base = ["--hf-model", str(model), "--data-path", str(data), "--data-root", str(data.parent), "--fp32"]
    base += f"--global-batch-size 4 --micro-batch-size 2 --train-iters {ITERATIONS} --lr 1e-3".split()
    base += ["--save", str(folder / "run"), "--save-interval", "2", "--export-hf", str(folder / "hf")]
    return [*base, "--lr-warmup-iters", "4", "--data-block-size", "4", *flags]


def start(setting, folder: Path, *flags: str, processes: int = 1) -> subprocess.Popen:
    """The program in a session of its own."""
    command = [*interpreter(processes), str(SFT), *arguments(setting, folder, *flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def finish(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out[-4000:]
    return out


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf" / "model.safetensors")


def assert_identical(got: Path, want: Path) -> None:
    got_weights, want_weights = weights(got), weights(want)
    assert got_weights.keys() == want_weights.keys()
    different = [name for name in want_weights if not torch.equal(got_weights[name], want_weights[name])]
    assert not different, f"{len(different)} of {len(want_weights)} tensors differ: {different[:3]}"


def assert_close(got: Path, want: Path) -> None:
    want_weights = weights(want)
    for name, tensor in weights(got).items():
        error = float((tensor - want_weights[name]).norm() / want_weights[name].norm())
        assert error < 1e-3, f"{name}: {error:.1e}"


def wait_for(process: subprocess.Popen, word: str) -> None:
    for line in process.stdout:
        if word in line:
            return


@pytest.fixture(scope="module")
def undisturbed(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(setting, folder))
    return folder


def test_a_disk_that_fills_up_ends_the_run_and_costs_nothing(setting, undisturbed, tmp_path):
    """Two ranks that save in the background: one message, and the same command goes on once there is more space."""
    disk, kept = tmp_path / "run", 3
    one = max(size_of(checkpoint) for checkpoint in (undisturbed / "run").glob("iter_*"))
    if not mount_disk(disk, f"size={int((kept + 0.5) * one)}"):
        pytest.skip("this user may not mount a file system")
    try:
        process = start(setting, tmp_path, "--async-save", processes=2)
        out, _ = process.communicate(timeout=240)
        assert process.returncode != 0 and out.count("could not be written under") == 1, out[-4000:]
        assert "No space left on device" in out and 'pretrain_sft.py", line' not in out, out[-4000:]
        left = sorted(disk.glob("iter_*"))
        assert len(left) == kept and not list(disk.glob(".tmp-*"))
        assert not layout.corrupt_files(left[-1], layout.read_manifest(left[-1]))
        remount(disk, f"size={40 * one}")
        out = finish(start(setting, tmp_path, "--async-save", processes=2))
        assert f"resumed at iteration {int(left[-1].name[5:])} " in out
    finally:
        unmount(disk)
    assert_close(tmp_path, undisturbed)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*"))


@pytest.mark.parametrize("flags", ["", "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"])
def test_resume_in_another_layout(setting, undisturbed, tmp_path, flags):
    """Ten steps by one process, the rest by two: float error apart, the same weights."""
    process = start(setting, tmp_path)
    wait_for(process, "iteration       11/")
    kill(process)
    out = finish(start(setting, tmp_path, *flags.split(), processes=2))
    assert "resumed at iteration" in out
    assert_close(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("number", "flags"),
    [(signal.SIGTERM, "--save-interval 1000"), (signal.SIGUSR1, "--save-interval 5 --async-save")],
    ids=["SIGTERM", "SIGUSR1 while a save is in the background"],
)
def test_a_signal_saves_and_leaves(setting, undisturbed, tmp_path, number, flags):
    process = start(setting, tmp_path, *flags.split())
    wait_for(process, "iteration        5/")
    process.send_signal(number)
    out = finish(process)
    assert f"stopped by {number.name}" in out
    assert not list((tmp_path / "run").glob(".tmp-*"))
    assert "resumed at iteration" in finish(start(setting, tmp_path))
    assert_identical(tmp_path, undisturbed)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_signal_while_the_run_starts_is_remembered(setting, tmp_path):
    """A job that is preempted then has not failed: it saves after its first step, and goes back into the queue.

    Already before ranks look for each other, which may take minutes.
    """
    process = start(setting, tmp_path)
    deadline = time.monotonic() + 120
    while not catches(process.pid, signal.SIGTERM):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert not (tmp_path / "run").exists(), "the start was over"
    assert "stopped by SIGTERM after iteration 1; the same command goes on" in finish(process)


def test_ranks_end_with_a_killed_launcher(setting, tmp_path):
    """Orphans would go on training and save beside the run that replaces them."""
    process = start(setting, tmp_path, processes=2)
    for _ in range(3):
        wait_for(process, "elapsed time")
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True)
    ranks = [int(word) for word in found.stdout.split()]
    assert len(ranks) >= 2
    process.kill()
    process.communicate(timeout=60)  # returns when nobody holds the pipe any more
    deadline = time.monotonic() + 30  # a process closes its pipe some moments before it is gone
    while [rank for rank in ranks if is_running(rank)]:
        assert time.monotonic() < deadline, f"still running: {[rank for rank in ranks if is_running(rank)]}"
        time.sleep(0.05)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < ITERATIONS
    assert "resumed at iteration" in finish(start(setting, tmp_path, processes=2))
