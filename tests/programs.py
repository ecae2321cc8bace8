"""How tests run the training programs: as a user does, or in forks of one process that has imported everything.

A rank that starts anew imports for seconds before it does anything; where a test looks at what a run computes and not
at how it starts, dies or is launched, `run_in_forks` does without.
"""

import atexit
import contextlib
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from umer1 import device
from umer1.testing import rank_context

ROOT = Path(__file__).resolve().parents[1]
SFT, GRPO = ROOT / "examples" / "pretrain_sft.py", ROOT / "examples" / "grpo.py"
_SETTINGS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_PORTS = (15_000, 30_000)  # below those that the system gives to whoever asks for any


def interpreter(processes: int) -> list[str]:
    """The words before a program's: several ranks have torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else [])]


def run_program(
    program: Path, arguments: list[str], processes: int = 1, *, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess:
    """The ended program, under torchrun where it has several ranks."""
    command = [*interpreter(processes), str(program), *arguments]
    environment = {**os.environ, **_SETTINGS, **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


def run_in_forks(
    program: Path, arguments: list[str], processes: int = 1, *, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess:
    """The ended program, a process for each rank; the status is that of the first that failed.

    A GPU must not be looked at before a fork: where there is one, this is `run_program`.
    """
    if device.has_cuda():
        return run_program(program, arguments, processes, timeout=timeout, **variables)
    words = [str(program), *arguments]
    environment = {**os.environ, **_SETTINGS, **variables}
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    with tempfile.TemporaryDirectory() as folder, rank_context() as context:
        ranks = []
        try:
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
                ranks.append(context.Process(target=_rank, args=(words, environment | own, f"{folder}/{rank}")))
                ranks[-1].start()
            status = _first_failure(ranks, timeout)
        finally:
            for process in ranks:
                _kill(process)
        out, err = ("".join(p.read_text() for p in sorted(Path(folder).glob(f"*.{n}"))) for n in ("stdout", "stderr"))
    return subprocess.CompletedProcess(words, status, out, err)


class Forked:
    """A program of one process that has been started so and runs, in a session of its own."""

    def __init__(self, program: Path, arguments: list[str], output: Path):
        """output: where its .stdout and .stderr go."""
        self._files = [Path(f"{output}.{name}") for name in ("stdout", "stderr")]
        words = ([str(program), *arguments], {**os.environ, **_SETTINGS}, str(output))
        with rank_context() as context:
            self.process = context.Process(target=_rank, args=words)
            self.process.start()

    @property
    def output(self) -> str:
        return "".join(file.read_text() for file in self._files if file.exists())

    def ended(self) -> bool:
        return self.process.exitcode is not None

    def wait_until(self, condition: Callable[[], object], seconds: float) -> None:
        """Until the condition is true, the program has ended or time is up."""
        deadline = time.monotonic() + seconds
        while not condition() and not self.ended() and time.monotonic() < deadline:
            time.sleep(0.002)

    def kill(self) -> None:
        """Everything at once, as a machine that loses its power."""
        _kill(self.process)


def _first_failure(ranks: list, timeout: float) -> int:
    """0 once all ranks have ended well, else the status of the first that has not."""
    deadline = time.monotonic() + timeout
    while (found := [process.exitcode for process in ranks]).count(0) < len(ranks):
        if any(found):
            return next(filter(None, found))
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired("the program's ranks", timeout)
        ranks[found.index(None)].join(0.05)
    return 0


def _kill(process) -> None:
    """The rank and what it has started."""
    process.kill()
    with contextlib.suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _free_port() -> int:
    while True:
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", random.SystemRandom().randrange(*_PORTS)))
            except OSError:
                continue
            return found.getsockname()[1]


def _rank(words: list[str], environment: dict[str, str], output: str) -> None:
    """One rank's process, made to look like one that `python PROGRAM ...` has started."""
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = words
    torch.set_num_threads(1)
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
