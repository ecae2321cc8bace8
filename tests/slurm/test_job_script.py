"""examples/slurm/job.sh without a Slurm: functions stand in for its commands."""

import subprocess
from pathlib import Path

JOB = Path(__file__).resolve().parents[2] / "examples" / "slurm" / "job.sh"


def test_the_status_is_trainings_also_where_it_ends_as_a_signal_comes(tmp_path):
    """The signal ends the shell's `wait`, and training is over before the shell looks whether it still runs."""
    script = f"""
        scontrol() {{ echo "NodeName=n NodeAddr=127.0.0.1"; }}
        srun() {{ trap 'exit 3' USR1; for i in {{1..300}}; do sleep 0.1; done; }}
        kill() {{ builtin kill "$@" || return; [ "$1" != -USR1 ] || sleep 1; }}
        . {JOB}
        step train -- program
        (sleep 0.5; builtin kill -USR1 $$) &
        finish"""
    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done
    assert "training ended with status 3; logs are in logs/7/0" in done.stdout
