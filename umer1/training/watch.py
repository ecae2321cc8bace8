"""What looks on while a run starts and trains: heartbeats, the hang time-out, timers, profiles.

Nothing here touches a tensor of the model or a generator: curves are the same bits with all of it on.
"""

import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import umer1.megatron_import  # noqa: F401

import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config

from umer1 import device
from umer1.checkpoints.layout import is_writable
from umer1.distributed.parallel import ParallelState
from umer1.training.batches import raise_together
from umer1.training.hang import HangWatch, look_interval
from umer1.training.heartbeat import Heartbeat, claim, clear
from umer1.training.profiling import StepProfiler
from umer1.training.signals import SignalWatch
from umer1.training.watch_config import WatchConfig


class Stopwatch:
    """Seconds of a rank's own work; on CUDA those of the device, between events that are read when it has finished."""

    def __init__(self):
        self._seconds, self._events = 0.0, []
        self._started: Any = None

    def start(self) -> None:
        self._started = _mark()

    def stop(self) -> None:
        """The work since `start` counts; a second call counts nothing."""
        if self._started is not None and device.has_cuda():
            self._events.append((self._started, _mark()))
        elif self._started is not None:
            self._seconds += time.perf_counter() - self._started
        self._started = None

    def add(self, seconds: float) -> None:
        self._seconds += seconds

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        device.synchronize()
        total = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return total


def _mark() -> Any:
    if not device.has_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Watch:
    """A context manager around a run on every rank, from its start on; collective.  Without it phases are only timed.

    own: the phases whose own work is compared between ranks (`take_own`): what a rank does before it waits for others.
    signals: the program's, which hears them before there is a Watch; default: none is heard.
    """

    def __init__(
        self,
        config: WatchConfig,
        hang_seconds: float | None,
        save: str | None,
        state: ParallelState,
        own: tuple,
        signals: SignalWatch | None = None,
    ):
        self.config, self.hang_seconds, self.save, self.state = config, hang_seconds, save, state
        self.own = {name: Stopwatch() for name in own}
        self.heart: Heartbeat | None = None
        self.profiler: StepProfiler | None = None
        self.signals = signals or SignalWatch()
        self._stack = ExitStack()
        self._phases: list[str] = []
        self._spent: dict[str, float] = {}  # seconds by phase since they were taken, from the first step on
        self._in_loop = False

    @classmethod
    def of(cls, config: Any, state: ParallelState, own: tuple, signals: SignalWatch | None = None) -> "Watch":
        """That of a run with this SFTConfig or GRPOConfig."""
        hang_seconds = config.watch.hang_seconds(config.parallel.distributed_timeout_minutes)
        return cls(config.watch, hang_seconds, config.checkpoint.save, state, own, signals)

    def __enter__(self) -> "Watch":
        with ExitStack() as stack:
            folder = self._agree_on_folder()
            self.heart = Heartbeat(folder / "heartbeat", self.state.rank, look_interval(self.hang_seconds))
            stack.enter_context(self.heart)
            stack.enter_context(HangWatch(self.heart, self.state.world_size, self.hang_seconds))
            self.profiler = stack.enter_context(StepProfiler(self.config, folder / "profile", self.state.rank))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        if self.save is None:
            _remove_empty(self.heart)
        self.heart = self.profiler = None

    def _agree_on_folder(self) -> Path:
        """SAVE, or a folder of this run alone among the host's temporary ones; ready for all ranks."""
        message = [str(self.save or Path(tempfile.gettempdir()) / f"umer1-{uuid.uuid4().hex[:12]}")]
        dist.broadcast_object_list(message, src=0)
        folder, problem = Path(message[0]), None
        if self.state.rank == 0:
            problem = is_writable(folder)
            try:
                if self.save is None:
                    clear(folder / "heartbeat")
                elif other := claim(folder / "heartbeat"):
                    problem = (
                        f"save={self.save} is in use: a run whose rank 0 is process {other.pid} on {other.host} is at "
                        f"step {other.step} there; end it, or give another --save"
                    )
            except OSError as error:
                problem = problem or f"nothing can be written to {folder}/heartbeat: {error.strerror}"
        raise_together(problem)
        (folder / "heartbeat").mkdir(parents=True, exist_ok=True)  # hosts that share no file system
        return folder

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Training step `number`, as the log numbers them."""
        self._in_loop = True
        if self.heart is None:
            yield
            return
        self.heart.step = number
        self.profiler.begin(number)
        yield
        self.profiler.end(number)

    @contextmanager
    def phase(self, name: str, own: bool = True) -> Iterator[None]:
        """The block is a phase: in the heartbeat, on NVTX's and the profiler's timelines, and, of `own`, timed.

        own: False where this rank has no work in it, and only waits.
        """
        timer, started = self.own.get(name) if own else None, time.perf_counter()
        self._phases.append(name)
        self._enter(name)
        if timer:
            timer.start()
        with ExitStack() as marks:
            if device.has_cuda():
                torch.cuda.nvtx.range_push(name)
                marks.callback(torch.cuda.nvtx.range_pop)
            if self.profiler and self.profiler.running:
                marks.enter_context(torch.profiler.record_function(name))
            try:
                yield
            finally:
                if timer:
                    timer.stop()
                self._phases.pop()
                if self._in_loop and not self._phases:
                    self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - started
                self._enter(self._phases[-1] if self._phases else "between phases")

    def waits(self, name: str) -> None:
        """The phase's own work is over; until its end this rank waits for others, which is called `name`."""
        if self._phases and self._phases[-1] in self.own:
            self.own[self._phases[-1]].stop()
        self._enter(name)

    @contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """Inside a phase, a block in which this rank waits for others; the phase's own work goes on after it."""
        self.waits(name)
        yield
        if self._phases:
            self._enter(self._phases[-1])
            if timer := self.own.get(self._phases[-1]):
                timer.start()

    def beat(self) -> None:
        """Progress inside a phase."""
        if self.heart:
            self.heart.beat()

    def take_own(self) -> dict[str, float]:
        """Seconds of own work by phase since the last call."""
        return {name: timer.take() for name, timer in self.own.items()}

    def take_seconds(self, steps: int) -> dict[str, float]:
        """seconds_in_PHASE, each step's share of what this rank spent there since the last call, its waits included."""
        found = {f"seconds_in_{name.replace(' ', '_')}": spent / steps for name, spent in self._spent.items()}
        self._spent = {}
        return found

    def attach(self, models: list[torch.nn.Module]) -> None:
        """Forward passes are progress; the reduction of gradients, where ranks wait, is no work of a rank's own."""
        for model in models:
            model.register_forward_pre_hook(lambda *_: self.beat())
        for config in {id(found): found for found in map(get_model_config, models)}.values():
            config.finalize_model_grads_func = self._after_waiting(config.finalize_model_grads_func)

    def _after_waiting(self, finalize: Callable) -> Callable:
        def wait_and_finalize(*arguments: Any, **named: Any) -> Any:
            self.waits("reducing gradients")
            return finalize(*arguments, **named)

        return wait_and_finalize

    def _enter(self, name: str) -> None:
        if self.heart:
            self.heart.enter(name)


def _remove_empty(heart: Heartbeat) -> None:
    """Leave nothing among the temporary files of a run that saw nothing worth keeping."""
    (heart.folder / f"rank-{heart.rank}.json").unlink(missing_ok=True)
    for folder in (heart.folder, heart.folder.parent):
        try:
            folder.rmdir()
        except OSError:  # other ranks' records, stacks or profiles are in it
            return
