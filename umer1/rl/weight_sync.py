"""The trainer's current weights into the rollout engines, with proof that they arrived.

Weights stream tensor by tensor to every rank (collectives over the world), and each rank's engine takes them over.  An
engine that fails half-way must not leave the other ranks waiting in a collective: its rank goes on to the end of the
stream, and only then do all ranks agree on what happened.

Engines report checksums by name: `NAME` is what arrived of a tensor, `engine:NAME` what the running model holds of it.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from umer1.distributed.parallel import ParallelState
from umer1.errors import UserError
from umer1.models.qwen2_vl.weights import stream_hf
from umer1.rl.checksum import checksum
from umer1.rl.types import EngineDied, RolloutEngine

# A rank that is stuck this long after the time-out cannot be talked to any more: its process ends.
GRACE_SECONDS = 60.0
# The same for engines that may only just be starting; longer than they give themselves.
READY_SECONDS = 570.0
EXIT_STATUS = 70


class _TimeOut(Exception):
    """The stream is asked for more after the time-out."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What happened on one rank, told to all; the lowest `order` is the cause, others follow from it."""

    order: int  # 0 engine died, 1 another error, 2 this rank's engine was slow, 3 waited for other ranks, 4 well
    message: str = ""
    reported: int = 0  # checksums that the engine gave


class WeightSync:
    """Loads the trainer's weights into `engine` (one per rank, or this rank's part of a replica's).

    `timeout`: seconds for one update, from when all engines stand ready.  `grace`: seconds after it until a rank that
    is stuck ends its process.
    """

    def __init__(self, engine: RolloutEngine, state: ParallelState, timeout: float, *, grace: float = GRACE_SECONDS):
        self.engine, self.state, self.timeout, self.grace = engine, state, timeout, grace

    def __call__(self, models: list[torch.nn.Module]) -> float:
        """Stream `models` (this rank's chunks, wrapped or not) into the engine; collective over the world.

        Returns seconds since all engines were ready.  Raises on all ranks together: EngineDied when an engine died
        (the text of the first), else UserError: a time-out, with rank and phase; checksums that differ.  An error of
        this rank's own that is neither is raised as it is, and as a UserError on the other ranks.
        """
        watchdog = _Watchdog()

        def all_ready() -> float:
            """Wait for every rank; returns the deadline.  Collective."""
            if self.state.world_size > 1:
                dist.all_reduce(ready := torch.zeros(1, device=self.state.device))
                ready.item()  # on a GPU the host waits here
            watchdog.set(self.timeout + self.grace, lambda: self._end_process(stream))
            return time.monotonic() + self.timeout

        stream = _Stream(stream_hf(models, self.state), all_ready)
        watchdog.set(READY_SECONDS + self.grace, lambda: self._end_process(stream))
        try:
            outcome, error = self._load(stream)
            outcomes = self._agree(outcome)
        finally:
            watchdog.off()
        worst = min(outcomes, key=lambda each: each.order)  # the first rank of equals
        if worst.order == 0:
            raise EngineDied(worst.message) from error
        if error is not None and outcome.order == 1:
            raise error
        if worst.order < 4:
            raise UserError(worst.message) from error
        if not any(each.reported for each in outcomes):
            raise UserError("weight update: no engine reported a checksum, so nothing shows that the weights arrived")
        return time.monotonic() - stream.deadline + self.timeout

    def _load(self, stream: "_Stream") -> tuple[_Outcome, Exception | None]:
        """Load, then exhaust the stream whatever happened, then compare."""
        where = f"rank {self.state.rank}: weight update of the {self.engine.name} engine"
        error, reported = None, {}
        try:
            reported = self.engine.load_weights(iter(stream))
        except Exception as caught:  # whatever it is, the other ranks wait for this one in the stream
            error = caught
        phase, times = stream.phase, stream.times()
        stream.drain()
        if isinstance(error, EngineDied):
            return _Outcome(0, f"{where}: {error}"), error
        if isinstance(error, _TimeOut):
            order = 2 if stream.engine_seconds > stream.waiting_seconds else 3
            return _Outcome(order, f"{where} did not end within {self.timeout:g} s; {times}"), error
        if error is not None:
            return _Outcome(1, f"{where} failed while {phase}: {error}"), error
        wrong = [
            f"{name}: the trainer has {stream.checksums.get(name.removeprefix('engine:'), 'no such tensor')}, "
            f"the engine {value}"
            for name, value in reported.items()
            if stream.checksums.get(name.removeprefix("engine:")) != value
        ]
        if wrong:
            shown = "\n".join(f"  - {line}" for line in wrong[:10])
            message = f"{where}: {len(wrong)} of {len(reported)} checksums differ, weights did not arrive:\n{shown}"
            return _Outcome(1, message), UserError(message)
        return _Outcome(4, reported=len(reported)), None

    def _agree(self, outcome: _Outcome) -> list[_Outcome]:
        """Every rank's outcome, by rank; collective."""
        outcomes: list = [outcome]
        if self.state.world_size > 1:
            outcomes = [None] * self.state.world_size
            dist.all_gather_object(outcomes, outcome)
        return outcomes

    def _end_process(self, stream: "_Stream") -> None:
        """In the watchdog's thread: the main one is stuck in a call that Python cannot interrupt."""
        print(
            f"umer1: error: rank {self.state.rank}: weight update of the {self.engine.name} engine is stuck for too "
            f"long (limit {self.timeout:g} s), while {stream.phase}; the process ends",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_STATUS)


class _Watchdog:
    """Calls something from a thread of its own unless it is set anew or off in time."""

    timer: threading.Timer | None = None

    def set(self, seconds: float, bark: Callable[[], None]) -> None:
        self.off()
        self.timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), bark)
        self.timer.daemon = True
        self.timer.start()

    def off(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class _Stream:
    """The trainer's tensors on their way into the engine: checksums, and where the time went.

    `all_ready` is called once, before the first tensor: it waits for the other ranks and gives the deadline.
    """

    def __init__(self, tensors: Iterator[tuple[str, torch.Tensor]], all_ready: Callable[[], float]):
        self.tensors, self.all_ready = tensors, all_ready
        self.deadline: float | None = None
        self.checksums: dict[str, float] = {}
        self.phase = "the engine gets ready"
        self.engine_seconds = self.waiting_seconds = 0.0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """For the engine.  Raises _TimeOut when the deadline has passed, in the engine or in the stream."""
        self._wait_for_all()
        begin = time.monotonic()
        while True:
            asked = time.monotonic()
            self.engine_seconds += asked - begin
            item = None if asked > self.deadline else self._next()
            begin = time.monotonic()
            self.waiting_seconds += begin - asked
            if begin > self.deadline:
                raise _TimeOut
            if item is None:
                self.phase = "the engine finishes"
                return
            self.phase = f"the engine takes tensor {len(self.checksums)}, {item[0]}"
            yield item

    def drain(self) -> None:
        """Take part in the rest of the stream for the other ranks' sake."""
        self._wait_for_all()
        while self._next() is not None:
            pass

    def times(self) -> str:
        """Where the time went, for a message."""
        return (
            f"{len(self.checksums)} tensors streamed, {self.engine_seconds:.1f} s in the engine and "
            f"{self.waiting_seconds:.1f} s waiting for the other ranks, last seen while {self.phase}"
        )

    def _wait_for_all(self) -> None:
        if self.deadline is None:
            self.phase = "waiting for the other ranks' engines to be ready"
            self.deadline = self.all_ready()

    def _next(self) -> tuple[str, torch.Tensor] | None:
        self.phase = f"waiting for tensor {len(self.checksums) + 1} from the other ranks"
        item = next(self.tensors, None)
        if item is not None:
            self.checksums[item[0]] = checksum(item[1])
        return item
