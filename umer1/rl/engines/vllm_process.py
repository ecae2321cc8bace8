"""The engine's process as the trainer sees it: its environment, its start, its log and its end."""

import itertools
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import IO

from umer1 import device, processes
from umer1.rl.engines.vllm_install import vllm_python

_SITE = Path(__file__).parent / "child_site"
# What a launcher told this rank about its own process group is none of the engine's business.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_SETTINGS = dict(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # ranks share the cores; binding would put every engine on the same ones
    VLLM_NO_USAGE_STATS="1",
    VLLM_PLUGINS="",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    PYTHONUNBUFFERED="1",
)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` (a pid) ends, however it ends (Linux), and not before.

    Schedulers and terminals signal every process of a job: the trainer saves and leaves, and may need its engine to.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    processes.end_with_parent()
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)


def engine_environment(cuda_devices: list[int] | None = None) -> dict[str, str]:
    """This process's environment as the engine's needs it; settings of vLLM that the user made are kept."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER and not name.startswith("TORCHELASTIC_")
    }
    for name, value in _SETTINGS.items():
        environment.setdefault(name, value)
    # On the CPU vLLM warns anew with every picture and every update
    if not device.has_cuda():
        environment.setdefault("TORCHDYNAMO_DISABLE", "1")  # vLLM's small functions: seconds of compiling, no gain
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if device.has_cuda() else "ERROR")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_SITE), environment.get("PYTHONPATH")]))
    if cuda_devices is not None:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [visible[number] if visible != [""] else str(number) for number in cuda_devices]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    return environment


def server_command(mode: str, connection: socket.socket, *arguments: str) -> list[str]:
    """The command line of vllm_server on an inherited socket."""
    command = [vllm_python(), "-m", "umer1.rl.engines.vllm_server", mode, str(connection.fileno()), str(os.getpid())]
    return [*command, *arguments]


def start(
    command: list[str],
    connection: socket.socket,
    *,
    log: IO[bytes] | None = None,
    cuda_devices: list[int] | None = None,
) -> subprocess.Popen:
    """The process, with its output in `log` (default: where this process's goes)."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=engine_environment(cuda_devices if device.has_cuda() else None),
        pass_fds=[connection.fileno()],
    )


class EngineProcess:
    """A running child and the socket to it."""

    def __init__(self, log_path: Path, cuda_devices: list[int] | None = None):
        self.log_path = log_path
        ours, theirs = socket.socketpair()
        self.connection = ours
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_begin = log_path.stat().st_size if log_path.exists() else 0
        with theirs, open(log_path, "ab") as log:
            self.process = start(server_command("--child", theirs), theirs, log=log, cuda_devices=cuda_devices)

    @property
    def pid(self) -> int:
        return self.process.pid

    def ended(self) -> str | None:
        """How the process ended ("exit status 1", "signal SIGKILL"); None while it runs."""
        status = self.process.poll()
        if status is None:
            return None
        return f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"

    def wait_for_end(self, seconds: float = 5.0) -> str | None:
        """`ended`, after a moment: the socket closes a little before the process is gone."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return self.ended()

    def last_words(self, lines: int = 12) -> str:
        """The end of what this process wrote to its log."""
        try:
            with open(self.log_path, "rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_begin, size - 8192))
                written = log.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        different = [line for line, _ in itertools.groupby(written)]  # vLLM says some things once for each thread
        return "\n".join(different[-lines:])

    def kill(self) -> None:
        """End it now and wait until it is gone."""
        self.connection.close()
        self.process.kill()
        self.process.wait()
