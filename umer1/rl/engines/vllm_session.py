"""What one connection of the vLLM process is served: a session answers its commands, one at a time, on a core.

vLLM is imported by `build`, after the connection stands, so that the other side learns at once that the process lives.
"""

import itertools
import time
import traceback
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np

from umer1.rl.engines.vllm_wire import Channel, Message, WireError

SEND_SECONDS = 60.0
_MESSAGE_SECONDS = 900.0  # for the next message of a command under way: a trainer may wait for its other ranks
_CANCEL_CHECK_SECONDS = 0.1


class RequestError(Exception):
    """A message that asks for what cannot be; the sender is told, and the engine goes on."""


class Session:
    """The commands of one connection, carried out on one core."""

    def __init__(self, core: Any):
        self.core = core
        self.loaded = False  # whole weights are there, from this connection

    def answer(self, channel: Channel, message: Message) -> None:
        """Carry out one command.  Raises ConnectionLost when the asker goes meanwhile."""
        commands = {
            "generate": self._generate,
            "begin_weights": self._weights,
            "sleep": self._sleep,
            "wake": self._wake,
        }
        if message.op == "cancel":  # of a generation that was finished while the word was under way
            return
        try:
            if message.op not in commands:
                raise RequestError(f"unknown command {message.op[:40]!r}")
            commands[message.op](channel, message)
        except (RequestError, KeyError, TypeError, ValueError) as error:
            traceback.print_exc()
            channel.send("refused", timeout=SEND_SECONDS, reason=f"{type(error).__name__}: {error}"[:2000])

    def _sleep(self, channel: Channel, message: Message) -> None:
        self.core.sleep()
        self.loaded = self.loaded and not self.core.sleeps
        channel.send("done", timeout=SEND_SECONDS)

    def _wake(self, channel: Channel, message: Message) -> None:
        self.core.wake("weights")
        channel.send("done", timeout=SEND_SECONDS)

    # -- generation --------------------------------------------------------------------------------------------------

    def _generate(self, channel: Channel, message: Message) -> None:
        """`count` "prompt" messages follow; answers "length" or "failed" for each, "completions", then "finished"."""
        if not self.loaded:
            raise RequestError("no weights have been loaded")
        sampling = checked_sampling(message.fields["sampling"])
        cancelled = False
        try:
            for index in range(int(message.fields["count"])):
                cancelled = not self._take_prompt(channel, index, sampling)
                if cancelled:
                    break
            asked = time.monotonic()

            def keep_on() -> bool:
                nonlocal asked, cancelled
                if not cancelled and time.monotonic() - asked > _CANCEL_CHECK_SECONDS:
                    asked = time.monotonic()
                    note = channel.poll(0)
                    cancelled = note is not None and note.op == "cancel"
                return not cancelled

            if not cancelled:
                for samples in self.core.run(keep_on):
                    bodies = [part for sample in samples for part in (sample.token_ids, sample.logprobs)]
                    heads = [(sample.request, sample.number, sample.finish_reason) for sample in samples]
                    channel.send("completions", bodies, timeout=SEND_SECONDS, samples=heads)
        finally:
            self.core.drop()
        channel.send("finished", timeout=SEND_SECONDS, cancelled=cancelled)

    def _take_prompt(self, channel: Channel, index: int, sampling: dict[str, Any]) -> bool:
        """Receive and queue one prompt; False when the asker cancelled instead."""
        message = next_message(channel)
        if message.op == "cancel":
            return False
        if message.op != "prompt":
            raise WireError(f"{message.op[:40]!r} where a prompt was due")
        from umer1.rl.engines.vllm_core import BadPrompt

        images, videos = _media(message)
        ids = [int(token) for token in message.fields["ids"]]
        try:
            length = self.core.add(index, str(message.fields["key"]), ids, images, videos, sampling)
            channel.send("length", timeout=SEND_SECONDS, request=index, tokens=length)
        except BadPrompt as error:
            traceback.print_exc()
            channel.send("failed", timeout=SEND_SECONDS, request=index, reason=str(error)[:500])
        return True

    # -- weights -----------------------------------------------------------------------------------------------------

    def _weights(self, channel: Channel, message: Message) -> None:
        """ "weights" messages follow, each acknowledged when its bytes are taken; "end_weights" ends them."""
        self.loaded = False
        staging = message.fields.get("staging")
        self.core.call("umer1_begin_weights", staging)
        complete = False
        try:
            channel.send("ready", timeout=SEND_SECONDS)
            for part in self._parts(channel):
                self.core.call("umer1_put_weights", part.fields["pieces"], None if staging else part.bodies[0])
                channel.send("taken", timeout=SEND_SECONDS)
            sums = self.core.call("umer1_end_weights")
            self.core.wake("kv_cache")
            self.core.forget()
            complete = True
        finally:
            if not complete:
                self.core.call("umer1_abandon_weights")
        self.loaded = True
        channel.send("loaded", timeout=SEND_SECONDS, checksums=sums)

    def _parts(self, channel: Channel) -> Iterator[Message]:
        while (message := next_message(channel)).op == "weights":
            yield message
        if message.op != "end_weights":
            raise RequestError(f"the update was broken off by {message.op[:40]!r}")


def checked_sampling(sampling: dict[str, Any]) -> dict[str, Any]:
    """The fields of umer1.rl.types.Sampling with their types; RequestError on others."""
    wanted = dict(num_generations=int, max_completion_length=int, temperature=float, stop_ids=list, seed=int)
    try:
        taken = {name: kind(sampling[name]) for name, kind in wanted.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"sampling settings that are not complete: {error!r}") from None
    if not (1 <= taken["num_generations"] <= 4096 and taken["max_completion_length"] >= 1):
        raise RequestError("num_generations must be 1 to 4096 and max_completion_length at least 1")
    return taken


def _media(message: Message) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """uint8 arrays of the prompt's pictures: `images` [[H, W, 3], ...], `videos` [[frames, H, W, 3], ...]."""
    found: list[list[np.ndarray]] = []
    bodies = iter(message.bodies)
    for name, dimensions in (("images", 3), ("videos", 4)):
        shapes = message.fields.get(name, [])
        if any(len(shape) != dimensions or shape[-1] != 3 for shape in shapes):
            raise ValueError(f"{name} have shapes {str(shapes)[:200]}")
        arrays = [np.frombuffer(body, dtype=np.uint8) for body in itertools.islice(bodies, len(shapes))]
        found.append([array.reshape(shape) for array, shape in zip(arrays, shapes, strict=True)])
    return found[0], found[1]


def next_message(channel: Channel) -> Message:
    """Raises TimeoutError when none comes for a quarter of an hour."""
    message = channel.poll(_MESSAGE_SECONDS)
    if message is None:
        raise TimeoutError(f"the other side has said nothing for {_MESSAGE_SECONDS:g} s")
    return message


def build(settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The core, and what a client is told of it.  Imports vLLM."""
    from umer1.rl.engines import vllm_core

    known = {item.name for item in fields(vllm_core.EngineSettings)}
    core = vllm_core.VLLMCore(
        vllm_core.EngineSettings(**{name: value for name, value in settings.items() if name in known})
    )
    import vllm

    return core, dict(vllm=vllm.__version__, dtype=settings["dtype"], max_model_len=settings["max_model_len"])
