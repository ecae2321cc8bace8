"""Runs of examples/grpo.py that are killed, stopped and resumed: how the tests start and watch them."""

import json
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

from programs import interpreter

TESTS = Path(__file__).resolve().parent
LETTERS = "[{name: 'toy_rewards:letters', weight: 1.0}]"
MARK = "UMER1_TEST_RUN"  # inherited by all processes of a run
START_SECONDS = 120  # of a program, on a busy machine


class Program:
    """A training program in a session of its own; its output goes to folder/log-N.txt."""

    def __init__(self, command: list[str], folder: Path, *, processes: int = 1, under: tuple[str, ...] = ()):
        """command: the script and its flags, without the interpreter; `processes` above 1 run under torchrun.

        under: words before it all, a tracer's for example.
        """
        self.script = command[0].encode()
        self.mark = uuid.uuid4().hex
        environment = {
            MARK: self.mark,
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"log-{len(list(folder.glob('log-*')))}.txt"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*under, *interpreter(processes), *command],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait_until(self, condition, seconds: float = START_SECONDS, *, pause: float = 0.002) -> bool:
        """Whether the condition came true before the program ended or time was up."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.ended():
                return False
            assert time.monotonic() < deadline, self.output[-4000:]
            time.sleep(pause)
        return True

    def wait_for(self, words: str, count: int = 1, seconds: float = START_SECONDS) -> None:
        assert self.wait_until(lambda: self.output.count(words) >= count, seconds, pause=0.01), self.output[-4000:]

    def wait_to_end(self, seconds: float) -> None:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds:g} s:\n{self.output[-4000:]}") from None

    def finish(self, status: int = 0, seconds: float = 240) -> str:
        """The output, once the program has ended by itself."""
        self.wait_to_end(seconds)
        assert self.process.returncode == status, f"status {self.process.returncode}:\n{self.output[-6000:]}"
        return self.output

    def kill(self) -> None:
        """Everything at once, as a machine that loses its power."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def members(self) -> list[int]:
        """Processes of the run that live: torchrun gives each rank a session of its own."""
        return marked(self.mark)

    def ranks(self) -> list[int]:
        """The trainer's processes under torchrun, by rank."""
        found = {}
        for pid in children(self.process.pid):
            rank = [entry for entry in process_file(pid, "environ") if entry.startswith(b"RANK=")]
            if rank and self.script in process_file(pid, "cmdline"):
                found[int(rank[0][5:])] = pid
        return [found[rank] for rank in sorted(found)]

    def workers(self) -> list[int]:
        """Processes that read data, of all ranks: forks of theirs."""
        pids = [pid for rank in self.ranks() for pid in children(rank)]
        return [pid for pid in pids if self.script in process_file(pid, "cmdline")]

    def engines(self) -> list[int]:
        """The vLLM processes."""
        return [pid for pid in self.members() if b"umer1.rl.engines.vllm_server" in process_file(pid, "cmdline")]

    def assert_no_orphans(self, seconds: float = 10) -> None:
        """Nothing of the run lives on, an engine's process least of all."""
        deadline = time.monotonic() + seconds
        while (alive := self.members()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in alive]


class Run(Program):
    """examples/grpo.py, or a `program` that stands in for it, on small settings."""

    def __init__(self, setting, folder: Path, *flags: str, processes: int = 1, program: tuple[str, ...] = ()):
        model, data = setting
        given = {
            "--fp32": "",
            "--hf-model": str(model),
            "--load": "none",
            "--data-path": str(data),
            "--data-root": str(data.parent),
            "--save": str(folder / "run"),
            "--export-hf": str(folder / "hf"),
            "--rewards": LETTERS,
            "--rollout-engine": "torch",
            "--global-batch-size": "4",
            "--num-generations": "2",
            "--micro-batch-size": "8",
            "--seq-length": "512",
            "--max-completion-length": "24",
            "--data-block-size": "4",
            "--lr": "1e-3",
            "--save-interval": "2",
            "--log-rollouts": "1",
        }
        given |= dict(zip(flags[::2], flags[1::2], strict=True))
        # a value of None leaves the flag out, "" is a flag without a value
        words = [word for name, value in given.items() if value is not None for word in (name, value) if word]
        program = program or (str(TESTS.parent / "examples" / "grpo.py"),)
        super().__init__([*program, *words], folder, processes=processes)


def slow(folder: Path, seconds: str = "0") -> dict:
    """Settings of a Run whose torch engine is slow; the beginnings of rollouts are marked in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for mark in folder.glob("generate-*"):
        mark.unlink()
    return {"program": (str(TESTS / "slow_grpo.py"), str(folder), seconds)}


def process_file(pid: int, name: str) -> list[bytes]:
    """/proc/PID/environ or cmdline; [] for a process that has gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0")
    except OSError:
        return []


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie that its new parent has yet to collect."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    """Processes that it started and that live; [] for one that has gone."""
    try:
        found = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [int(word) for words in found for word in words if is_running(int(word))]


def marked(mark: str) -> list[int]:
    """Live processes, zombies not counted, with the mark in their environment."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if f"{MARK}={mark}".encode() in process_file(pid, "environ") and is_running(pid)]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
