"""`umer1 serve-rollouts`: the real vLLM behind TCP."""

import os
import re
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("vllm")

import torch  # noqa: E402
from tiny_qwen2_vl import make_tiny_directory  # noqa: E402
from vllm_world import VLLMWorld  # noqa: E402

from umer1.errors import UserError  # noqa: E402
from umer1.models.qwen2_vl.directory import HFDirectory  # noqa: E402
from umer1.rl.config import RolloutConfig  # noqa: E402
from umer1.rl.engines.vllm_engine import VLLMEngine  # noqa: E402
from umer1.rl.engines.vllm_remote import TOKEN_VARIABLE  # noqa: E402
from umer1.rl.types import EngineDied  # noqa: E402

SECRET = "correct horse"


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return VLLMWorld(tmp_path_factory.mktemp("server"), tied=False)


@pytest.fixture(scope="module")
def address(world):
    """A server that all tests share."""
    log = world.root / "server.log"
    command = [sys.executable, "-m", "umer1.cli", "serve-rollouts", "--model", str(world.root / "model")]
    with open(log, "wb") as output:
        server = subprocess.Popen(
            [*command, "--port", "0", "--max-model-len", "1024"],
            stdout=output,
            stderr=output,
            env=os.environ | {TOKEN_VARIABLE: SECRET, "OMP_NUM_THREADS": "1"},
        )
    try:
        deadline = time.monotonic() + 240.0
        while (found := re.search(r"listens on 127\.0\.0\.1:(\d+)", log.read_text())) is None:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield "127.0.0.1", int(found[1])
    finally:
        server.terminate()
        assert server.wait(30.0) == 0


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)


def test_weights_and_rollouts_over_tcp(world, address, secret):
    """Untied head, pictures and video; from a second client after the first one as well."""
    for seed in range(2):
        engine = world.engine(server=address)
        with pytest.raises(EngineDied, match="no weights"):  # another client's count for nothing
            engine.generate(world.requests, world.sampling(), never)
        engine.restart()
        world.change(seed)
        engine.load_weights(world.weights())
        answers = engine.generate(world.requests, world.sampling(seed=seed), never)
        assert max(world.worst(answers).values()) < 1e-4
        engine.sleep()
        engine.wake()
        engine.close()


def test_a_client_that_goes_leaves_the_server_free(world, address, secret):
    engine = world.engine(server=address)
    engine.load_weights(world.weights())

    def leave() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(world.requests, world.sampling(num_generations=64, max_completion_length=600), leave)
    begin = time.monotonic()
    engine.load_weights(world.weights())  # connects anew
    assert None not in engine.generate(world.requests, world.sampling(), never)[0]
    assert time.monotonic() - begin < 30.0
    engine.close()


@pytest.mark.parametrize("wrong", ["", "wrong", SECRET + " "])
def test_only_who_knows_the_secret_is_let_in(world, address, monkeypatch, wrong):
    monkeypatch.setenv(TOKEN_VARIABLE, wrong)
    with pytest.raises(UserError, match=f"{TOKEN_VARIABLE} is not the server's"):
        world.engine(server=address).start()


def test_a_server_of_another_model_is_refused(address, secret, tmp_path):
    other = HFDirectory.open(make_tiny_directory(tmp_path, hidden=128, layers=3))
    engine = VLLMEngine(
        RolloutConfig(), other, dtype=torch.bfloat16, max_model_len=4096, rank=0, local_rank=0, server=address
    )
    with pytest.raises(UserError, match="num_layers is 2 there, 3 here.*dtype is float32.*max-model-len is 1024 there"):
        engine.start()


def test_strangers_do_no_harm(world, address, secret):
    """Noise, oversized hellos, and connections that say nothing."""
    silent = [socket.create_connection(address) for _ in range(5)]
    for data in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"UMER\xff\xff\xff\x7f", b"UMER\x02\x00\x00\x00[]"):
        with socket.create_connection(address) as stranger:
            stranger.sendall(data)
            stranger.settimeout(5.0)
            received = b""
            while part := _received(stranger):
                received += part
            assert received.startswith(b"UMER") and b"challenge" in received  # and nothing after it
            assert b"description" not in received
    engine = world.engine(server=address)
    engine.load_weights(world.weights())
    assert None not in engine.generate(world.requests, world.sampling(), never)[0]
    engine.close()
    for stranger in silent:
        stranger.close()


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""


def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "umer1.cli", "serve-rollouts", *arguments]
    clean = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    return subprocess.run(command, capture_output=True, text=True, env=clean | environment, timeout=60)


def test_wrong_settings_are_said_at_once(world, address):
    done = serve("--host", "0.0.0.0", "--port", "70000")
    assert done.returncode == 2
    assert "--model is required" in done.stderr and "port=70000" in done.stderr and TOKEN_VARIABLE in done.stderr
    done = serve("--model", str(world.root / "model"), "--port", str(address[1]))
    assert done.returncode == 2 and f"cannot listen on 127.0.0.1:{address[1]}" in done.stderr
    assert "--max-model-len" in serve("--help").stdout
