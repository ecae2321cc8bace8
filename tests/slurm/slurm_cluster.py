"""A Slurm of the test's own: slurmctld and two slurmd on this machine, real but for authentication."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch")
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
# A job of `high` preempts and requeues one of `low`.  Time limits are in minutes, and jobs are looked at every second.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CryptoType=crypto/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,requeue_delay=1
KillWait=60
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=first NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=second NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> list[str]:
    """Programs of Slurm that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Cluster:
    """Its commands; `folder` holds state and logs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """Output of a command; AssertionError when it fails."""
        result = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """The new job's number."""
        command = ["sbatch", "--parsable", *arguments]
        values = {**self.environment, **environment}
        result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=values, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait(self, job: str, seconds: float = 240) -> str:
        """The state that a job ends in."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in _ENDED:
            assert time.monotonic() < deadline, f"job {job} is still {state}:\n{self.log()}"
            time.sleep(0.3)
        return state

    def hurry(self, job: str, seconds: float = 120) -> None:
        """Let a job that was requeued start now; Slurm has it wait for two minutes."""
        deadline = time.monotonic() + seconds
        while not (self.state(job) == "PENDING" and self.show(job)["Restarts"] != "0"):
            assert time.monotonic() < deadline, f"job {job} was not requeued:\n{self.log()}"
            time.sleep(0.2)
        # Why Slurm waits: a node may still be ending the job's last run, and would refuse the next.
        while list(self.folder.glob(f"spool.*/job{int(job):05d}")):
            assert time.monotonic() < deadline, f"job {job} does not end on its node:\n{self.log()}"
            time.sleep(0.2)
        time.sleep(1)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def log(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Started, and ended with all of its jobs."""
    host = socket.gethostname()
    for name in ("state", "spool.first", "spool.second"):
        (folder / name).mkdir(parents=True)
    text = _CONFIGURATION.format(folder=folder, host=host, user=getpass.getuser(), ports=_free_ports(3))
    (folder / "slurm.conf").write_text(text)
    slurm = Cluster(folder)
    daemons = []
    try:
        for command in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "first"], ["slurmd", "-D", "-N", "second"]):
            with open(folder / f"daemon{len(daemons)}.log", "wb") as out:
                daemons.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=slurm.environment))
        deadline = time.monotonic() + 60
        while True:
            sinfo = ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"]
            result = subprocess.run(sinfo, capture_output=True, text=True, env=slurm.environment)
            if result.stdout.split() == ["idle", "idle"]:
                break
            ended = any(daemon.poll() is not None for daemon in daemons)
            assert not ended and time.monotonic() < deadline, f"no cluster:\n{result.stderr}{slurm.log()}"
            time.sleep(0.2)
        yield slurm
        slurm.run("scancel", "--full", f"--user={getpass.getuser()}")
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
