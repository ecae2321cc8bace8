"""A teacher without a server to run: vLLM over a directory, in a process of this command that ends with it.

It is asked as any endpoint is, at a port of this machine alone and with a key of this run: journal, retries and resume
are the same.
"""

import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from umer1.annotation.teacher_config import TeacherConfig
from umer1.errors import UserError
from umer1.rl.engines.vllm_install import vllm_python
from umer1.rl.engines.vllm_process import engine_environment

_SERVER = ("-m", "vllm.entrypoints.openai.api_server")
_HOST = "127.0.0.1"
_LAST_MOMENTS = 30.0  # seconds that the server gets to end by itself
_SHOWN = 2000  # characters of its log in a message


@contextmanager
def served_teacher(config: TeacherConfig, log: Path) -> Iterator[tuple[TeacherConfig, str]]:
    """(the settings with the endpoint of a server that answers within the `with`, its key); its words go to `log`.

    Raises UserError with the log's end when the server ends before it answers; one that leaves the block while the
    server has ended gets it too.
    """
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port = probe.getsockname()[1]
    key = secrets.token_urlsafe(24)
    environment = engine_environment() | {"VLLM_API_KEY": key}
    if "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ:
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # a setting for an engine inside its own process
    command = [vllm_python(), "-m", "umer1.annotation.teacher_process", str(os.getpid()), *_SERVER]
    command += ["--model", config.teacher_model, "--served-model-name", config.teacher_model]
    command += ["--host", _HOST, "--port", str(port), *shlex.split(config.vllm_arguments)]
    print(f"umer1 annotate: {config.teacher_model} is loaded by vLLM; log: {log}", file=sys.stderr, flush=True)
    with open(log, "wb") as file:
        # A session of its own: Ctrl-C ends this command, which still takes the answers that come within moments.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, f"http://{_HOST}:{port}/health", log)
        try:
            yield replace(config, endpoint=f"http://{_HOST}:{port}/v1"), key
        except UserError as error:
            if process.poll() is None:
                raise
            raise UserError(f"{error}; {_last_words(process, log)}") from None
    finally:
        _end(process)


def _wait_until_healthy(process: subprocess.Popen, address: str, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None:
        try:
            with opener.open(address, timeout=5):
                return
        except OSError:  # not there yet
            time.sleep(0.2)
    raise UserError(_last_words(process, log))


def _last_words(process: subprocess.Popen, log: Path) -> str:
    end = log.read_text(encoding="utf-8", errors="replace")[-_SHOWN:].strip()
    return f"the teacher's process ended with status {process.returncode}; the end of {log}:\n{end}"


def _end(process: subprocess.Popen) -> None:
    """The server and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_LAST_MOMENTS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
