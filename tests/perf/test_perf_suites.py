"""Every suite at tiny sizes: each provider that can run here does, and ours is near fp64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITES = ("infonce", "rank_margin", "gather_hidden", "linear_cross_entropy", "topk")


def run_suite(name: str, *flags: str) -> subprocess.CompletedProcess:
    """Without torch.compile, which takes longer than all else."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--sizes", "tiny"]
    command += ["-k", "not compile", *flags, f"perf/bench_{name}.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_checks(name):
    done = run_suite(name, "--benchmark-disable")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_a_run_leaves_a_record(tmp_path):
    done = run_suite("rank_margin", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    rows = {row["provider"]: row for row in record["rows"]}
    assert rows["umer1 torch"]["error"] < 1e-5
    assert rows["umer1 torch"]["seconds"]["median"] > 0
    assert {"copy_bytes_per_second", "matmul_float32_flops", "launch_seconds"} == set(record["ceilings"])
    assert record["command"].startswith("python -m pytest") and str(tmp_path.parent) not in record["command"]
