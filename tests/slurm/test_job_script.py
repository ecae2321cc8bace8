"""examples/slurm/job.sh without a Slurm: functions stand in for its commands."""

import subprocess
from pathlib import Path

import pytest

JOB = Path(__file__).resolve().parents[2] / "examples" / "slurm" / "job.sh"


def run(folder: Path, script: str, **environment: str) -> subprocess.CompletedProcess:
    """After job.sh was read, in a job with the number 7."""
    start = f"""
        scontrol() {{ echo "NodeName=n NodeAddr=127.0.0.1"; }}
        . {JOB}
    """
    given = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", **environment}
    command = ["bash", "-c", start + script]
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=60)


def test_the_status_is_trainings_also_where_it_ends_as_a_signal_comes(tmp_path):
    """The signal ends the shell's `wait`, and training is over before the shell looks whether it still runs."""
    done = run(
        tmp_path,
        """
        srun() { trap 'exit 3' USR1; for i in {1..300}; do sleep 0.1; done; }
        kill() { builtin kill "$@" || return; [ "$1" != -USR1 ] || sleep 1; }
        step train -- program
        (sleep 0.5; builtin kill -USR1 $$) &
        finish""",
    )
    assert done.returncode == 3, done
    assert f"training ended with status 3; logs are in {tmp_path}/logs/7/0" in done.stdout


@pytest.mark.parametrize("place", ["logs", "/elsewhere"])
def test_what_a_job_writes_is_in_its_log_folder(tmp_path, place):
    """LOGS may be relative or not."""
    logs = place if place == "logs" else f"{tmp_path}{place}"
    words = 'echo "$folder $UMER1_STOPPED_FILE $TORCH_NCCL_DEBUG_INFO_TEMP_FILE"'
    done = run(tmp_path, words, LOGS=logs, SLURM_RESTART_COUNT="2")
    folder = tmp_path / place.strip("/") / "7" / "2"
    assert folder.is_dir() and done.stdout.split() == [f"{folder}", f"{folder}/stopped", f"{folder}/nccl-"]
