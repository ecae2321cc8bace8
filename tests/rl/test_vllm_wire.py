"""Messages and weight pieces between trainer and engine; no vLLM needed."""

import json
import random
import socket
import struct
import threading
import time

import numpy as np
import pytest
import torch

from umer1.models.qwen2_vl.directory import SpecialTokens
from umer1.rl.engines.vllm_answers import Answers, unexpanded
from umer1.rl.engines.vllm_session import Session
from umer1.rl.engines.vllm_staging import Assembler, StagingBuffer, StagingView, fill
from umer1.rl.engines.vllm_wire import Channel, ConnectionLost, Message, WireError
from umer1.rl.types import Request


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    yield Channel(ours), Channel(theirs)
    ours.close()
    theirs.close()


def test_messages_arrive_as_they_were_sent(pair):
    one, other = pair
    bodies = [b"", b"abc", np.arange(6, dtype=np.float32)]
    one.send("first", bodies, timeout=1.0, number=1, text="häh")
    one.send("second", timeout=1.0)
    message = other.poll(1.0)
    assert (message.op, message.fields) == ("first", {"number": 1, "text": "häh"})
    assert message.bodies == [b"", b"abc", bodies[2].tobytes()]
    assert other.poll(1.0).op == "second" and other.poll(0.0) is None


def test_a_large_message_passes_in_parts(pair):
    one, other = pair
    body = random.Random(0).randbytes(5 << 20)
    sender = threading.Thread(target=one.send, args=("large", [body]), kwargs={"timeout": 10.0})
    sender.start()
    deadline, message = time.monotonic() + 10.0, None
    while message is None and time.monotonic() < deadline:
        message = other.poll(0.001)  # most polls end in the middle of it
    sender.join()
    assert message.bodies == [body]


def test_nobody_waits_for_ever(pair):
    one, other = pair
    begin = time.monotonic()
    assert one.poll(0.2) is None
    with pytest.raises(TimeoutError, match="not taken within"):
        one.send("large", [bytes(8 << 20)], timeout=0.2)
    assert time.monotonic() - begin < 2.0
    other.close()
    with pytest.raises(ConnectionLost):
        one.send("more", [bytes(8 << 20)], timeout=1.0)
    with pytest.raises(ConnectionLost):
        while True:
            one.poll(1.0)


def test_a_cancel_that_comes_after_the_end_is_no_command(pair):
    """A trainer may break off what the engine has just finished; its next command must not meet a refusal."""
    trainer, engine = pair
    session = Session(core=None)
    session.answer(engine, Message("cancel", {}, []))
    assert trainer.poll(0.1) is None
    session.answer(engine, Message("dance", {}, []))
    assert trainer.poll(1.0).op == "refused"


def frame(header: bytes, magic: bytes = b"UMER", length: int | None = None) -> bytes:
    return struct.pack("<4sI", magic, len(header) if length is None else length) + header


@pytest.mark.parametrize(
    "sent",
    [
        frame(b"{}", magic=b"GET "),
        frame(b"", length=(8 << 20) + 1),
        frame(b"not json"),
        frame(b"[" * 100_000),
        frame(b"[]"),
        frame(b'{"op": "x"}'),
        frame(b'{"sizes": []}'),
        frame(b'{"op": 1, "sizes": []}'),
        frame(b'{"op": "x", "sizes": [-1]}'),
        frame(b'{"op": "x", "sizes": [true]}'),
        frame(b'{"op": "x", "sizes": [1.5]}'),
        frame(json.dumps({"op": "x", "sizes": [1 << 40]}).encode()),
        frame(b'{"op": "x", "sizes": [1e400]}'),
        frame(b"\xff\xfe"),
    ],
    ids=lambda sent: repr(sent[8:30]),
)
def test_what_is_no_message_is_refused(pair, sent):
    one, other = pair
    one.connection.sendall(sent)
    with pytest.raises(WireError):
        other.poll(1.0)


def test_random_bytes_never_do_more_than_fail(pair):
    """Frames with bytes changed at random: a message, nothing yet, or WireError; never another exception."""
    rng = random.Random(1)
    valid = frame(json.dumps({"op": "generate", "count": 2, "sizes": [3, 0]}).encode()) + b"abc"
    for _ in range(500):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            data = bytearray(valid)
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            ours.sendall(data[: rng.randint(1, len(data))])
            try:
                message = Channel(theirs).poll(0.0)
            except WireError:
                continue
            assert message is None or isinstance(message.op, str)


TENSORS = {
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3.0),
    "small": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "bf16": torch.randn(7, 5).bfloat16(),
    "turned": torch.randn(40, 30).T,
    "large": torch.randn(1000, 33),
}


@pytest.mark.parametrize("size", [256, 1000, 1 << 20])
@pytest.mark.parametrize("shared", [True, False])
def test_weights_pass_through_a_small_buffer(size, shared):
    buffer, assembler, arrived = StagingBuffer(size, shared=shared), Assembler(torch.device("cpu")), {}
    view = StagingView(buffer.described(), torch.device("cpu")).bytes if shared else buffer.view
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "empty"}
    for pieces in fill(iter(tensors.items()), buffer.view):
        assert max(piece["offset"] + piece["bytes"] for piece in pieces) <= size
        arrived |= dict(assembler.add(json.loads(json.dumps(pieces)), view))
        buffer.view.fill_(255)  # what was taken is no view of the buffer
    assert assembler.name is None and list(arrived) == list(tensors)
    for name, tensor in tensors.items():
        assert arrived[name].dtype == tensor.dtype and torch.equal(arrived[name], tensor)
    buffer.close()


@pytest.mark.parametrize(
    "change", [dict(begin=4), dict(bytes=1000), dict(offset=-1), dict(offset=1 << 30), dict(dtype="object")]
)
def test_pieces_that_do_not_fit_are_refused(change):
    piece = dict(name="a", dtype="float32", shape=[4], begin=0, bytes=8, offset=0) | change
    with pytest.raises(ValueError):
        Assembler(torch.device("cpu")).add([piece], torch.zeros(64, dtype=torch.uint8))


def test_pads_are_shortened_to_one_for_each_block():
    special = SpecialTokens(*range(90, 98))  # image_pad 92, video_pad 93, vision_start 94, vision_end 95
    ids = [1, 94, 92, 92, 92, 95, 94, 92, 95, 94, 93, 93, 95, 2, 2, 3]
    expected = [1, 94, 92, 95, 94, 92, 95, 94, 93, 95, 2, 2, 3]
    assert unexpanded(torch.tensor(ids), special).tolist() == expected


@pytest.mark.parametrize(
    "message",
    [
        Message("length", {"request": 5, "tokens": 1}),
        Message("length", {}),
        Message("failed", {"request": 0}),
        Message("completions", {"samples": [[0, 0, "stop"]]}, []),
        Message("completions", {"samples": [[0, 9, "stop"]]}, [bytes(4), bytes(4)]),
        Message("completions", {"samples": [[-1, 0, "stop"]]}, [bytes(4), bytes(4)]),
        Message("completions", {"samples": [[0, 0, "stop"]]}, [bytes(8), bytes(4)]),
        Message("completions", {"samples": [[0, 0, "stop"]]}, [bytes(3), bytes(3)]),
        Message("completions", {"samples": 3}),
        Message("hello"),
    ],
    ids=lambda message: f"{message.op}-{len(message.bodies)}",
)
def test_answers_that_make_no_sense_are_refused(message):
    answers = Answers([Request("a", None)], 2)
    with pytest.raises(WireError):
        answers.take(message)


def test_a_response_without_finite_log_probs_is_left_out():
    answers = Answers([Request("a", None)], 2)
    good, bad = np.zeros(1, np.float32), np.full(1, np.nan, np.float32)
    ids = np.zeros(1, np.int32)
    samples = [[0, 0, "stop"], [0, 1, "length"]]
    answers.take(Message("completions", {"samples": samples}, [part.tobytes() for part in (ids, good, ids, bad)]))
    assert answers.found[0][0].token_ids == [0] and answers.found[0][1] is None and "a" in answers.failures
