"""What one connection of the vLLM process is served: a session answers its commands, one at a time, on a core.

vLLM is imported by `build`, after the connection stands, so that the other side learns at once that the process lives.
"""

import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from umer1.rl.engines.vllm_wire import Channel, ConnectionLost, Message, WireError

SEND_SECONDS = 60.0
_CONFIGURE_SECONDS = 900.0  # for a child's first message
_CANCEL_CHECK_SECONDS = 0.1


class RequestError(Exception):
    """A message that asks for what cannot be; the sender is told, and the engine goes on."""


class EngineFailure(Exception):
    """The engine itself broke while it generated: nobody can be served any more."""


@dataclass(slots=True)
class Holder:
    """Whose weights a core has.  The sessions of one core share it."""

    owner: "Session | None" = None


@dataclass(slots=True)
class _Asked:
    """A generation whose prompts are still coming in."""

    count: int
    sampling: dict[str, Any]
    prompts: list[Message]


class Session:
    """The commands of one connection, carried out on one core, message by message: between two, others are served.

    A core holds the weights of one session at a time, the first that loads some; it is free again when that one leaves.

    name: of the other side, for those who are turned away.
    shares_memory: whether the other side may name memory and files of this machine to take weights from.
    """

    def __init__(self, core: Any, *, holder: Holder | None = None, name: str = "", shares_memory: bool = False):
        self.core, self.name, self.shares_memory = core, name, shares_memory
        self.holder = Holder() if holder is None else holder
        self.channel: Channel | None = None  # that the last message came by
        self.loaded = False  # whole weights are there, from this connection
        self._asked: _Asked | None = None
        self._update: dict[str, Any] | None = None  # of weights: how the bytes come

    def answer(self, channel: Channel, message: Message) -> None:
        """Carry out one message.  Raises ConnectionLost, WireError or TimeoutError when the asker is to be left, and
        EngineFailure."""
        commands = {
            "generate": self._generate,
            "prompt": self._prompt,
            "cancel": self._cancel,
            "begin_weights": self._begin_weights,
            "weights": self._put_weights,
            "end_weights": self._end_weights,
            "sleep": self._sleep,
            "wake": self._wake,
        }
        self.channel = channel
        try:
            if message.op not in commands:
                raise RequestError(f"unknown command {message.op[:40]!r}")
            commands[message.op](channel, message)
        except (ConnectionLost, WireError, TimeoutError, EngineFailure):
            raise
        except Exception as error:  # whatever a message makes umer1, torch or vLLM raise is its sender's affair
            traceback.print_exc()
            self._asked = None
            self._abandon()
            channel.send("refused", timeout=SEND_SECONDS, reason=f"{type(error).__name__}: {error}"[:2000])

    def close(self) -> None:
        """The other side has gone: what it began is dropped, and others may load their weights."""
        self._abandon()
        if self.holder.owner is self:
            self.holder.owner = None

    def _claim(self) -> None:
        owner = self.holder.owner
        if owner is not None and owner is not self and owner.channel.is_left():
            owner.close()
        elif owner is not None and owner is not self:
            raise RequestError(
                f"the server is in use by another trainer ({owner.name}); end that run, or start a server for this one"
            )
        self.holder.owner = self

    def _sleep(self, channel: Channel, message: Message) -> None:
        self._claim()
        self.core.sleep()
        self.loaded = self.loaded and not self.core.sleeps
        channel.send("done", timeout=SEND_SECONDS)

    def _wake(self, channel: Channel, message: Message) -> None:
        self._claim()
        self.core.wake("weights")
        channel.send("done", timeout=SEND_SECONDS)

    # -- generation --------------------------------------------------------------------------------------------------

    def _generate(self, channel: Channel, message: Message) -> None:
        """`count` "prompt" messages follow; answers "length" or "failed" for each, "completions", then "finished"."""
        if not self.loaded:
            raise RequestError("no weights have been loaded")
        if self._asked is not None:
            raise RequestError("the prompts of the generation before have not all come")
        self._asked = _Asked(int(message.fields["count"]), checked_sampling(message.fields["sampling"]), [])
        self._run_when_complete(channel)

    def _prompt(self, channel: Channel, message: Message) -> None:
        if self._asked is None:
            raise RequestError("a prompt of no generation")
        self._asked.prompts.append(message)
        self._run_when_complete(channel)

    def _cancel(self, channel: Channel, message: Message) -> None:
        """Without a generation: it was finished while the word was under way."""
        if self._asked is not None:
            self._asked = None
            channel.send("finished", timeout=SEND_SECONDS, cancelled=True)

    def _run_when_complete(self, channel: Channel) -> None:
        asked = self._asked
        if len(asked.prompts) < asked.count:
            return
        self._asked = None
        looked, cancelled = time.monotonic(), False

        def keep_on() -> bool:
            nonlocal looked, cancelled
            if not cancelled and time.monotonic() - looked > _CANCEL_CHECK_SECONDS:
                looked = time.monotonic()
                note = channel.poll(0)
                cancelled = note is not None and note.op == "cancel"
            return not cancelled

        try:
            for index, prompt in enumerate(asked.prompts):
                if not keep_on():
                    break
                self._add(channel, index, prompt, asked.sampling)
            for samples in self._samples(keep_on):
                bodies = [part for sample in samples for part in (sample.token_ids, sample.logprobs)]
                heads = [(sample.request, sample.number, sample.finish_reason) for sample in samples]
                channel.send("completions", bodies, timeout=SEND_SECONDS, samples=heads)
        finally:
            self.core.drop()
        channel.send("finished", timeout=SEND_SECONDS, cancelled=cancelled)

    def _samples(self, keep_on: Callable[[], bool]) -> Iterator[Any]:
        try:
            yield from self.core.run(keep_on)
        except (ConnectionLost, WireError, TimeoutError):
            raise  # `keep_on` looks at the connection
        except Exception as error:
            raise EngineFailure(f"{type(error).__name__}: {error}") from error

    def _add(self, channel: Channel, index: int, message: Message, sampling: dict[str, Any]) -> None:
        """Queue one prompt."""
        from umer1.rl.engines.vllm_core import BadPrompt

        images, videos = _media(message)
        ids = [int(token) for token in message.fields["ids"]]
        try:
            length = self.core.add(index, str(message.fields["key"]), ids, images, videos, sampling)
            channel.send("length", timeout=SEND_SECONDS, request=index, tokens=length)
        except BadPrompt as error:
            traceback.print_exc()
            channel.send("failed", timeout=SEND_SECONDS, request=index, reason=str(error)[:500])

    # -- weights -----------------------------------------------------------------------------------------------------

    def _begin_weights(self, channel: Channel, message: Message) -> None:
        """ "weights" messages follow, each acknowledged when its bytes are taken; "end_weights" ends them."""
        self._claim()
        self._abandon()
        self.loaded = False
        staging = message.fields.get("staging")
        if staging and not self.shares_memory:
            raise RequestError("a server takes the bytes of weights from the connection alone")
        self._update = {"staging": staging}
        self.core.call("umer1_begin_weights", staging)
        channel.send("ready", timeout=SEND_SECONDS)

    def _put_weights(self, channel: Channel, message: Message) -> None:
        if self._update is None:
            raise RequestError("weights of no update")
        body = None if self._update["staging"] else message.bodies[0]
        self.core.call("umer1_put_weights", message.fields["pieces"], body)
        channel.send("taken", timeout=SEND_SECONDS)

    def _end_weights(self, channel: Channel, message: Message) -> None:
        if self._update is None:
            raise RequestError("the end of no update")
        sums = self.core.call("umer1_end_weights")
        self.core.wake("kv_cache")
        self.core.forget()
        self._update, self.loaded = None, True
        channel.send("loaded", timeout=SEND_SECONDS, checksums=sums)

    def _abandon(self) -> None:
        """Leave an update that is under way."""
        if self._update is not None:
            self._update = None
            try:
                self.core.call("umer1_abandon_weights")
            except Exception as error:  # the model is of no use now, until the next update has filled it
                print(f"an update that broke off could not be undone: {error}", file=sys.stderr, flush=True)


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


def first_message(channel: Channel) -> Message:
    """Raises TimeoutError when none comes for a quarter of an hour."""
    message = channel.poll(_CONFIGURE_SECONDS)
    if message is None:
        raise TimeoutError(f"the other side has said nothing for {_CONFIGURE_SECONDS:g} s")
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
