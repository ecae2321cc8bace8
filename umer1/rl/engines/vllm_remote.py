"""Reaching a vLLM server over TCP: who may, and whether it runs the same model."""

import hmac
import os
import socket
import time
from dataclasses import asdict
from typing import Any

import torch

from umer1.errors import UserError
from umer1.models.qwen2_vl.config import Qwen2VLConfig
from umer1.printable import printable
from umer1.rl.engines.vllm_assets import dtype_name
from umer1.rl.engines.vllm_wire import Channel, ConnectionLost, WireError
from umer1.rl.types import Interrupted, Stop

PROTOCOL = 1
TOKEN_VARIABLE = "UMER1_ROLLOUT_TOKEN"
_SECONDS = 30.0
PATIENCE_SECONDS = 60.0


def token() -> str:
    """The secret that server and clients share; "" for none."""
    return os.environ.get(TOKEN_VARIABLE, "")


def proof(secret: str, nonce: str) -> str:
    """What shows that one knows the secret, without saying it: an HMAC over the server's random nonce."""
    return hmac.new(secret.encode(), nonce.encode(), "sha256").hexdigest()


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel close a connection whose other machine is gone within about a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # as on Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def model_description(config: Qwen2VLConfig) -> dict[str, Any]:
    """A model's shape as JSON gives it back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def connect(
    address: tuple[str, int], config: Qwen2VLConfig, dtype: torch.dtype, max_model_len: int, stop: Stop
) -> Channel:
    """A channel to the server.  UserError when it does not fit; else as the channel, or Interrupted."""
    connection = _connected(address, stop)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(connection)
    channel = Channel(connection)
    try:
        nonce = _answer(channel, "challenge").fields.get("nonce")
        if not (isinstance(nonce, str) and nonce.isascii()):
            raise WireError("a challenge without a nonce")
        channel.send("hello", timeout=_SECONDS, protocol=PROTOCOL, proof=proof(token(), nonce))
        _check(address, _answer(channel, "description").fields, config, dtype, max_model_len)
    except BaseException:
        channel.close()
        raise
    return channel


def _connected(address: tuple[str, int], stop: Stop) -> socket.socket:
    """Tried for a while: a server that is started anew takes no connections until its engine stands."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return socket.create_connection(address, timeout=_SECONDS)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionLost(f"cannot connect for {PATIENCE_SECONDS:g} s: {error}") from None
        if stop():
            raise Interrupted("connecting was broken off")
        time.sleep(0.5)


def _answer(channel: Channel, op: str):
    message = channel.poll(_SECONDS)
    if message is None:
        raise TimeoutError(f"no answer within {_SECONDS:g} s (a server serves one trainer's engine at a time)")
    if message.op == "refused":
        raise UserError(f"The rollout server refused: {printable(message.fields.get('reason'), 500)}")
    if message.op != op:
        raise WireError(f"{message.op[:40]!r} where {op!r} was due")
    return message


def _check(address, told: dict[str, Any], config: Qwen2VLConfig, dtype: torch.dtype, max_model_len: int) -> None:
    wanted = dict(model_description(config), dtype=dtype_name(dtype))
    model = told.get("model")
    offered = dict(model if isinstance(model, dict) else {}, dtype=told.get("dtype"))
    wrong = [f"{name} is {offered.get(name)} there, {value} here" for name, value in wanted.items()]
    wrong = [line for line, (name, value) in zip(wrong, wanted.items(), strict=True) if offered.get(name) != value]
    length = told.get("max_model_len")
    if not isinstance(length, int) or length < max_model_len:
        wrong.append(f"--max-model-len is {length} there, {max_model_len} or more is needed")
    if wrong:
        raise UserError(f"The rollout server at {address[0]}:{address[1]} does not fit: " + "; ".join(wrong) + ".")
