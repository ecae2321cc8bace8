"""examples/slurm under a real Slurm: two tasks, preemption, the time limit, and what a failure does to dependents.

Except for GRPO's, each job trains the embedded default, the tiny base on mini-MMEB, by two tasks.
"""

import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from grpo_world import Setting as GRPOSetting
from grpo_world import records
from safetensors.torch import load_file
from slurm_cluster import cluster, missing

from umer1.data.mini_mmeb import make_mini_mmeb

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 60

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"Slurm is not installed: {', '.join(missing())}")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """mini-MMEB, drawn once for all jobs."""
    return make_mini_mmeb(tmp_path_factory.mktemp("mini") / "data")


def submit(slurm, mini, folder: Path, *flags: str, options: tuple[str, ...] = ()) -> str:
    """SFT by two tasks on one node, in a folder of its own that looks like the repository's."""
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "mini-mmeb").symlink_to(mini)
    shutil.copytree(ROOT / "examples", folder / "examples")
    arguments = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", *options, "examples/slurm/sft.sbatch"]
    arguments += "--save run --save-interval 1000 --export-hf hf --global-batch-size 4 --micro-batch-size 2".split()
    arguments += f"--train-iters {ITERATIONS} --lr-warmup-iters 4 --data-block-size 4 --log-interval 5".split()
    return slurm.submit(*arguments, *flags, cwd=folder, PYTHON=sys.executable, PYTHONUNBUFFERED="1")


def log(folder: Path, job: str) -> str:
    """Everything that a job wrote."""
    paths = [folder / f"slurm-{job}.out", *sorted((folder / "logs").rglob("*.log"))]
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in paths if path.exists())


def wait_for(folder: Path, job: str, words: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while words not in log(folder, job):
        assert time.monotonic() < deadline, log(folder, job)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def undisturbed(slurm, mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "job"
    job = submit(slurm, mini, folder)
    assert slurm.wait(job) == "COMPLETED", log(folder, job)
    return folder


def assert_identical(got: Path, want: Path) -> None:
    got, want = (load_file(folder / "hf" / "model.safetensors") for folder in (got, want))
    assert got.keys() == want.keys()
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different, f"{len(different)} of {len(want)} tensors differ: {different[:3]}"


def test_two_tasks_train_together(undisturbed):
    text = log(undisturbed, "*") + "".join(path.read_text() for path in undisturbed.glob("slurm-*.out"))
    assert "training ended with status 0" in text
    assert "DP 2" in text and "mini-MMEB" in text, text


def test_a_preempted_job_saves_requeues_and_ends_with_the_same_weights(slurm, mini, undisturbed, tmp_path):
    folder = tmp_path / "job"
    job = submit(slurm, mini, folder)
    wait_for(folder, job, "iteration       10/")
    other = slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=sleep 1", cwd=tmp_path)
    assert slurm.wait(other) == "COMPLETED"
    slurm.hurry(job)
    assert slurm.wait(job) == "COMPLETED", log(folder, job)
    text = log(folder, job)
    assert int(slurm.show(job)["Restarts"]) == 1
    assert "stopped by SIGTERM" in text, text
    assert "resumed at iteration" in text, text
    assert_identical(folder, undisturbed)


def test_a_job_near_its_time_limit_saves_and_requeues_itself(slurm, mini, undisturbed, tmp_path):
    folder = tmp_path / "job"
    job = submit(slurm, mini, folder)
    wait_for(folder, job, "iteration       10/")
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@... does before the limit
    slurm.hurry(job)
    assert slurm.wait(job) == "COMPLETED", log(folder, job)
    text = log(folder, job)
    assert int(slurm.show(job)["Restarts"]) == 1
    assert "stopped by SIGUSR1" in text, text
    assert "resumed at iteration" in text, text
    assert_identical(folder, undisturbed)


def test_a_cancelled_job_saves_and_stays_out(slurm, mini, tmp_path):
    folder = tmp_path / "job"
    job = submit(slurm, mini, folder)
    wait_for(folder, job, "iteration       10/")
    slurm.run("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    wait_for(folder, job, "training ended with status 0")
    assert "stopped by SIGTERM" in log(folder, job)
    assert list((folder / "run").glob("iter_*")), "nothing was saved"
    time.sleep(2)
    assert slurm.state(job) == "CANCELLED"


def test_a_failure_ends_the_job_and_its_dependents_wait_in_vain(slurm, mini, tmp_path):
    folder = tmp_path / "job"
    job = submit(slurm, mini, folder, "--global-batch-size", "5")
    after = slurm.submit(f"--dependency=afterok:{job}", "--wrap=true", "--kill-on-invalid-dep=yes", cwd=tmp_path)
    assert slurm.wait(job) == "FAILED"
    assert "global_batch_size=5 is not a multiple of the 2 data-parallel ranks" in log(folder, job)
    assert slurm.wait(after) == "CANCELLED"


@pytest.mark.thorough
def test_grpo_with_engines_on_a_node_of_their_own(slurm, tmp_path):
    pytest.importorskip("vllm")
    setting = GRPOSetting(tmp_path / "setting", layers=2, hidden=128)
    folder = tmp_path / "job"
    folder.mkdir()
    shutil.copytree(ROOT / "examples", folder / "examples")
    flags = setting.flags("--rollout-engine", "vllm", "--max-completion-length", "8", "--num-generations", "2")
    flags += [
        "--train-iters",
        "3",
        "--save",
        "run",
        "--parity-threshold",
        "1e-3",
        "--export-hf",
        "hf",
    ]
    options = ["--nodes=2", "--gpus-per-node=0", "examples/slurm/grpo.sbatch"]
    job = slurm.submit(*options, *flags, cwd=folder, PYTHON=sys.executable, ENGINE_NODES="1")
    assert slurm.wait(job, 400) == "COMPLETED", log(folder, job)
    assert "training is complete" in log(folder, job)
    assert [record["iteration"] for record in records(folder / "run")] == [1, 2, 3]
    assert (folder / "logs" / job / "0" / "engine-0.log").exists()
    assert (folder / "hf" / "model.safetensors").exists()
