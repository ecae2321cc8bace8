"""GRPO with vLLM: engines that die, are late or are told to stop; the run goes on, or stops with its state saved."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from grpo_reference import write_rl_pairs
from grpo_runs import MARK, Run, marked, metrics, slow
from tiny_qwen2_vl import make_tiny_directory

pytest.importorskip("vllm")

VLLM = ("--rollout-engine", "vllm", "--max-completion-length", "300", "--train-iters", "4", "--save-interval", "100")
PARITY = 1e-3  # mean |difference| of log-probs in fp32, the promise after every sync


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo-faults")
    return make_tiny_directory(folder / "model", layers=2, hidden=128), write_rl_pairs(folder / "data", count=12)


def wait_for_rollouts(run: Run, folder: Path, call: int, rank: int = 0) -> None:
    """Until the n-th call of the engine is well under way."""
    assert run.wait_until((folder / f"generate-{rank}-{call}").exists), run.output[-6000:]
    time.sleep(0.2)


def assert_parity(folder: Path, steps: int) -> None:
    records = [line for line in metrics(folder) if "mismatch_mean" in line]
    assert [line["iteration"] for line in records] == list(range(1, steps + 1))
    assert max(line["mismatch_mean"] for line in records) < PARITY
    assert all(line["failed_share"] == 0 and line["grad_norm"] > 0 for line in records)


def test_killed_engines(setting, tmp_path):
    """The first death is mended, the second is one too many; the same command then goes on."""
    flags = (*VLLM, "--rollout-max-restarts", "1")
    run = Run(setting, tmp_path, *flags, **slow(tmp_path))
    for call in (2, 4):  # the third call repeats the second
        wait_for_rollouts(run, tmp_path, call)
        (engine,) = run.engines()
        os.kill(engine, signal.SIGKILL)
    output = run.finish(status=2, seconds=120)
    assert "a rollout engine died and is started anew (1 of 1)" in output
    assert "ended (signal SIGKILL) while generating" in output
    assert output.count("grpo: error: rollout engines died 2 times, more than --rollout-max-restarts 1") == 1
    assert "Traceback" not in output
    run.assert_no_orphans()
    assert [entry.name for entry in (tmp_path / "run").glob("iter_*")] == ["iter_0000002"]
    run = Run(setting, tmp_path, *flags)
    assert "resumed at iteration 2" in run.finish()
    run.assert_no_orphans()
    assert_parity(tmp_path, 4)


def test_a_signal_to_all_processes_and_late_rollouts(setting, tmp_path):
    """The engine hears SIGTERM too, as a scheduler sends it.  The next run has too little time for its rollouts."""
    run = Run(setting, tmp_path, *VLLM, **slow(tmp_path))
    wait_for_rollouts(run, tmp_path, 2)
    os.killpg(run.process.pid, signal.SIGTERM)
    output = run.finish(seconds=60)
    assert "stopped by SIGTERM during the rollouts of iteration 2" in output and "died" not in output
    run.assert_no_orphans()
    run = Run(setting, tmp_path, *VLLM, "--rollout-timeout-seconds", "0.1", "--log-rollouts-prompts", "4")
    assert "resumed at iteration 1" in run.finish()
    run.assert_no_orphans()
    late = metrics(tmp_path)[1:]
    assert [line["iteration"] for line in late] == [2, 3, 4]
    assert all(line["failed_share"] > 0 and line["mismatch_mean"] < PARITY for line in late)
    for line in (tmp_path / "run/rollouts/iter_0000004.jsonl").read_text().splitlines():
        for completion in json.loads(line)["completions"]:
            assert (completion["total"] is None) == (completion["status"] == "failed")


def test_no_orphans_of_a_killed_launcher(setting, tmp_path):
    run = Run(setting, tmp_path, *VLLM, processes=2, **slow(tmp_path))
    for rank in range(2):
        wait_for_rollouts(run, tmp_path, 1, rank)
    assert len(run.engines()) == 2
    run.process.kill()
    run.process.wait()
    run.assert_no_orphans()


class Server:
    """`umer1 serve-rollouts` in a session of its own."""

    def __init__(self, model: Path, port: int, log: Path):
        self.mark = uuid.uuid4().hex
        command = [sys.executable, "-m", "umer1.cli", "serve-rollouts", "--model", str(model), "--port", str(port)]
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [*command, "--max-model-len", "512", "--dtype", "float32"],
                stdout=file,
                stderr=file,
                env={**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_a_server_that_dies_and_comes_back(setting, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "server.log"
    server = Server(setting[0], port, log)
    try:
        flags = (*VLLM, "--rollout-server", f"127.0.0.1:{port}", "--rollout-max-restarts", "3")
        run = Run(setting, tmp_path, *flags, **slow(tmp_path))
        wait_for_rollouts(run, tmp_path, 2)
        server.kill()
        run.wait_for("a rollout engine died and is started anew (1 of 3)", seconds=60)
        server = Server(setting[0], port, log)
        run.finish()
        assert_parity(tmp_path, 4)
    finally:
        server.kill()
    run.assert_no_orphans()
    assert not marked(server.mark)
