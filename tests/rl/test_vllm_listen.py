"""The rollout server under what peers send: each is refused or closed, and a good trainer is served as before.

A stand-in for vLLM keeps the weights' last byte and answers with it; what is tested is who may do what, and when.
"""

import json
import socket
import struct
import threading
import time

import numpy as np
import pytest

from umer1.rl.engines import vllm_listen
from umer1.rl.engines.vllm_remote import PROTOCOL, TOKEN_VARIABLE, proof
from umer1.rl.engines.vllm_wire import Channel, ConnectionLost

SECRET = "open sesame"
SAMPLING = dict(num_generations=1, max_completion_length=4, temperature=1.0, stop_ids=[1], seed=3)


class StandInCore:
    """What a Session needs of VLLMCore: rollouts are the byte that the last whole update ended with."""

    sleeps = False

    def __init__(self):
        self.weights, self.coming, self.queued, self.abandoned = None, None, [], 0

    def call(self, method, *arguments):
        if method == "umer1_put_weights":
            pieces, body = arguments
            if any(piece["bytes"] < 0 for piece in pieces):
                raise RuntimeError("a negative dimension")
            self.coming = body[-1]
        elif method == "umer1_end_weights":
            if self.coming is None:
                raise RuntimeError("only a part of the tensors arrived")
            self.weights, self.coming = self.coming, None
            return {"w": float(self.weights)}
        elif method == "umer1_abandon_weights":
            self.abandoned += 1

    def add(self, index, key, ids, images, videos, sampling):
        self.queued.append(index)
        return len(ids)

    def run(self, keep_on):
        from umer1.rl.engines.vllm_core import Sample

        for index in self.queued:
            keep_on()
            yield [Sample(index, 0, np.array([self.weights], np.int32), np.zeros(1, np.float32), "stop")]

    def drop(self):
        self.queued = []

    def wake(self, what):
        pass

    def sleep(self):
        pass

    def forget(self):
        pass


@pytest.fixture
def server(monkeypatch):
    """(address, core) of a server in a thread of this process."""
    pytest.importorskip("umer1.rl.engines.vllm_core", reason="for its types")  # takes seconds the first time
    core = StandInCore()
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    description = dict(vllm="stand-in", dtype="float32", max_model_len=64)
    monkeypatch.setattr(vllm_listen, "build", lambda settings: (core, dict(description)))
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=vllm_listen.serve_forever, args=(listener, {"description": {}}), daemon=True).start()
    return listener.getsockname(), core


def strange(address) -> Channel:
    return Channel(socket.create_connection(address, timeout=5.0))


def known(address) -> Channel:
    channel = strange(address)
    nonce = channel.poll(5.0).fields["nonce"]
    channel.send("hello", timeout=5.0, protocol=PROTOCOL, proof=proof(SECRET, nonce))
    assert channel.poll(5.0).op == "description"
    return channel


def ask(channel: Channel, op: str, bodies=(), **fields) -> str:
    channel.send(op, bodies, timeout=5.0, **fields)
    return channel.poll(5.0).op


def load(channel: Channel, value: int) -> None:
    assert ask(channel, "begin_weights", staging=None) == "ready"
    assert ask(channel, "weights", [bytes([value])], pieces=[{"bytes": 1}]) == "taken"
    assert ask(channel, "end_weights") == "loaded"


def rollout(channel: Channel) -> int:
    channel.send("generate", timeout=5.0, count=1, sampling=SAMPLING)
    channel.send("prompt", timeout=5.0, key="a", ids=[1, 2], images=[], videos=[])
    answers = [channel.poll(5.0) for _ in range(3)]
    assert [answer.op for answer in answers] == ["length", "completions", "finished"]
    return int(np.frombuffer(answers[1].bodies[0], dtype=np.int32)[0])


def raw(header: bytes) -> bytes:
    return struct.pack("<4sI", b"UMER", len(header)) + header


def hello(**fields) -> bytes:
    return raw(json.dumps({"op": "hello", "sizes": [], "protocol": PROTOCOL, **fields}).encode())


STRANGERS = {
    "half a surrogate pair": hello(proof="\ud83d"),
    "a proof that is a list": hello(proof=["x"]),
    "a proof that is null": hello(proof=None),
    "letters beyond ASCII": hello(proof="ä" * 64),
    "another protocol": raw(b'{"op": "hello", "sizes": [], "protocol": {"a": 1}}'),
    "a command before hello": raw(b'{"op": "begin_weights", "sizes": []}'),
    "infinity for a version": raw(b'{"op": "hello", "sizes": [], "protocol": Infinity}'),
    "no frame": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("sent", STRANGERS.values(), ids=STRANGERS.keys())
def test_what_strangers_say_ends_their_connection_alone(server, sent):
    address, _ = server
    trainer = known(address)
    load(trainer, 7)
    stranger = strange(address)
    stranger.poll(5.0)
    stranger.connection.sendall(sent)
    with pytest.raises(ConnectionLost):
        while True:
            stranger.poll(5.0)
    assert rollout(trainer) == 7 and rollout(known_after(trainer, address, 8)) == 8


def known_after(trainer: Channel, address, value: int) -> Channel:
    """A trainer that takes over once `trainer` has left."""
    trainer.close()
    other = known(address)
    load(other, value)
    return other


BROKEN = {
    "a path of the server's machine": [("begin_weights", [], dict(staging={"path": "/etc/hostname", "size": 4}))],
    "a GPU's handle": [("begin_weights", [], dict(staging={"cuda": [0, {"hex": "00"}]}))],
    "weights without a body": [("begin_weights", [], {}), ("weights", [], dict(pieces=[{"bytes": 1}]))],
    "a negative size": [("begin_weights", [], {}), ("weights", [b"x"], dict(pieces=[{"bytes": -4}]))],
    "pieces that are words": [("begin_weights", [], {}), ("weights", [b"x"], dict(pieces=["ab"]))],
    "an end before the weights": [("begin_weights", [], {}), ("end_weights", [], {})],
    "an end of nothing": [("end_weights", [], {})],
    "weights of no update": [("weights", [b"x"], dict(pieces=[]))],
    "a prompt of no generation": [("prompt", [], dict(key="a", ids=[1]))],
    "a generation without weights": [("generate", [], dict(count=1, sampling=SAMPLING))],
    "an unknown command": [("dance", [], {})],
}


@pytest.mark.parametrize("messages", BROKEN.values(), ids=BROKEN.keys())
def test_what_a_trainer_says_wrongly_is_refused_and_others_are_served(server, messages):
    address, core = server
    wrong = known(address)
    answers = [ask(wrong, op, bodies, **fields) for op, bodies, fields in messages]
    assert answers[-1] == "refused"
    assert core.abandoned == (len(messages) > 1)
    wrong.close()
    trainer = known(address)
    load(trainer, 5)
    assert rollout(trainer) == 5


@pytest.mark.parametrize(
    "fields",
    [dict(count="x"), dict(count=None), dict(count=1, sampling=[]), dict(count=1, sampling=dict(SAMPLING, seed="?"))],
    ids=str,
)
def test_a_generation_that_makes_no_sense_is_refused(server, fields):
    address, _ = server
    trainer = known(address)
    load(trainer, 9)
    assert ask(trainer, "generate", **({"sampling": SAMPLING} | fields)) == "refused"
    assert rollout(trainer) == 9


def test_prompts_that_overflow_are_refused(server):
    address, _ = server
    trainer = known(address)
    load(trainer, 2)
    trainer.send("generate", timeout=5.0, count=1, sampling=SAMPLING)
    trainer.connection.sendall(raw(b'{"op": "prompt", "sizes": [], "key": "a", "ids": [1e999]}'))
    assert trainer.poll(5.0).op == "refused"
    assert rollout(trainer) == 2


def test_nobody_samples_from_anothers_weights(server):
    address, _ = server
    first, second = known(address), known(address)
    load(first, 1)
    assert ask(second, "begin_weights", staging=None) == "refused"
    assert ask(second, "generate", count=0, sampling=SAMPLING) == "refused"
    assert rollout(first) == 1
    first.close()
    load(second, 2)
    assert rollout(second) == 2


def test_a_trainer_that_is_silent_in_mid_update_delays_nobody(server):
    address, core = server
    silent = known(address)
    assert ask(silent, "begin_weights", staging=None) == "ready"
    begin = time.monotonic()
    other = known(address)
    assert ask(other, "begin_weights", staging=None) == "refused"
    assert time.monotonic() - begin < 5.0
    silent.close()
    load(other, 4)
    assert core.abandoned == 1 and rollout(other) == 4


def test_messages_that_arrive_together_are_all_answered(server):
    address, _ = server
    trainer = known(address)
    load(trainer, 3)
    heads = [b'{"op": "cancel", "sizes": []}', b'{"op": "begin_weights", "sizes": []}', b'{"op": "dance", "sizes": []}']
    trainer.connection.sendall(b"".join(map(raw, heads)))
    assert [trainer.poll(5.0).op for _ in range(2)] == ["ready", "refused"]


def test_strangers_do_not_lock_trainers_out(server, monkeypatch):
    address, _ = server
    monkeypatch.setattr(vllm_listen, "_MAX_STRANGERS", 8)
    trainer = known(address)
    idle = [strange(address) for _ in range(40)]
    load(trainer, 6)
    other = known(address)
    assert ask(other, "begin_weights", staging=None) == "refused"  # connected, and told who is there
    assert rollout(trainer) == 6
    for channel in idle:
        channel.close()
