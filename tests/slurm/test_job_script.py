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
    folder = tmp_path / place.strip("/") / "7" / "2"
    folder.mkdir(parents=True)
    (folder / "stopped").touch()  # of another cluster's job 7
    words = 'echo "$folder $UMER1_STOPPED_FILE $TORCH_NCCL_DEBUG_INFO_TEMP_FILE"'
    done = run(tmp_path, words, LOGS=logs, SLURM_RESTART_COUNT="2")
    assert not list(folder.iterdir()) and done.stdout.split() == [f"{folder}", f"{folder}/stopped", f"{folder}/nccl-"]


@pytest.mark.parametrize(("task", "requeued"), [({}, "7"), ({"ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "3"}, "7_3")])
def test_a_task_of_an_array_requeues_itself_alone(tmp_path, task, requeued):
    """To Slurm the number of the last task that starts is all of the array: tasks that train would start anew."""
    done = run(
        tmp_path,
        """
        scontrol() { echo "$@" >> said; echo JobState=RUNNING; }
        srun() { touch "$UMER1_STOPPED_FILE"; }
        sleep() { :; }
        step train -- program
        finish""",
        **{f"SLURM_{name}": value for name, value in task.items()},
    )
    assert done.returncode == 75, done
    assert (tmp_path / "said").read_text().splitlines() == [f"show job {requeued}", f"requeue {requeued}"]


def test_a_stopped_job_that_cannot_go_back_into_the_queue_has_failed(tmp_path):
    """Status 0 would start its `afterok` dependents on a model that is not trained."""
    done = run(
        tmp_path,
        """
        scontrol() { [ "$1" = show ] && echo JobState=RUNNING; }
        srun() { touch "$UMER1_STOPPED_FILE"; }
        sleep() { echo waited; }
        step train -- program
        finish""",
    )
    assert done.returncode == 75 and "waited" not in done.stdout, done


def test_log_folders_of_odd_names(tmp_path):
    """Neither `cd`'s search path nor srun's patterns change where the logs go."""
    done = run(
        tmp_path,
        'srun() { printf "<%s>" "$@"; }; step train -- x; wait; mkdir -p "aside/$LOGS/7/0"; . "$JOB"; echo "$folder"',
        LOGS="100%j logs",
        CDPATH="aside",
        JOB=str(JOB),
    )
    assert f"<--output={tmp_path}/100%%j logs/7/0/train-%t.log>" in done.stdout, done
    assert done.stdout.endswith(f">{tmp_path}/100%j logs/7/0\n"), done
    (tmp_path / "file").touch()
    done = run(tmp_path, "echo went on", LOGS="file")
    assert done.returncode == 2 and "went on" not in done.stdout and "file" in done.stderr, done


@pytest.mark.parametrize("words", [["--hf-model", "a b"], ["--hf-model=a b"], ["--hf_model", "x", "--hf_model=a b"]])
def test_rollout_servers_get_the_model_however_it_is_given(tmp_path, words):
    """The last one counts, as for the program."""
    (tmp_path / "examples" / "slurm").mkdir(parents=True)
    script = JOB.with_name("grpo.sbatch").read_text()
    (tmp_path / "examples" / "slurm" / "job.sh").write_text(
        f"""
        scontrol() {{ echo "NodeName=n NodeAddr=127.0.0.1"; }}
        . {JOB}
        train() {{ :; }}
        step() {{ printf '<%s>' "$@"; }}
        finish() {{ :; }}
        """
    )
    given = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "2"}
    command = ["bash", "-c", script, "grpo.sbatch", *words, "--lr", "1"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**given, "ENGINE_NODES": "1"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "<--model><a b>" in done.stdout, done
