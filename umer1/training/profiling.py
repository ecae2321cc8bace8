"""torch's profiler and a memory snapshot for given steps, or for the next one after SIGUSR2."""

import signal
import sys
from pathlib import Path
from types import FrameType

import torch
from torch.profiler import ProfilerActivity, profile

from umer1 import device
from umer1.files import atomic_path
from umer1.training.watch_config import WatchConfig

_MEMORY_EVENTS = 200_000  # of the CUDA allocator, kept while a snapshot is being made
_MEMORY_ROWS = 40  # of the table that stands for the snapshot on a CPU


class StepProfiler:
    """A context manager around the loop; `begin` and `end` stand around each step.

    Writes folder/steps-A-B-rank-N.trace.json (chrome://tracing, Perfetto) and beside it the memory: on CUDA
    ...memory.pickle for pytorch.org/memory_viz, on a CPU ...memory.txt, the operations by the memory they took.
    """

    def __init__(self, config: WatchConfig, folder: Path, rank: int):
        self.config, self.folder, self.rank = config, folder, rank
        self.planned = config.profile and rank in map(int, config.profile_ranks)
        self.asked = False
        self._profile: profile | None = None
        self._first = self._last = 0

    @property
    def running(self) -> bool:
        """Whether the step at hand is profiled."""
        return self._profile is not None

    def begin(self, step: int) -> None:
        """Before step `step`."""
        start, end = self.config.profile_step_start, self.config.profile_step_end
        planned = self.planned and start <= step < end  # a resumed run may start in between
        if self.running or not (self.asked or planned):
            return
        self._first, self._last, self.asked = step, end - 1 if planned else step, False
        if device.has_cuda():
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.has_cuda() else [])]
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=not device.has_cuda())
        self._profile.start()

    def end(self, step: int) -> None:
        """After step `step`."""
        if self.running and step >= self._last:
            self._write(step)

    def _write(self, step: int) -> None:
        device.synchronize()
        done, self._profile = self._profile, None
        done.stop()
        name = f"steps-{self._first}-{step}-rank-{self.rank}"
        try:
            with atomic_path(self.folder / f"{name}.trace.json") as aside:
                done.export_chrome_trace(str(aside))
            if device.has_cuda():
                with atomic_path(self.folder / f"{name}.memory.pickle") as aside:
                    torch.cuda.memory._dump_snapshot(str(aside))
            else:
                with atomic_path(self.folder / f"{name}.memory.txt") as aside:
                    table = done.key_averages().table(sort_by="self_cpu_memory_usage", row_limit=_MEMORY_ROWS)
                    aside.write_text(table + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:  # training goes on without the profile
            print(f"rank {self.rank}: the profile could not be written: {error}", file=sys.stderr, flush=True)
        else:
            print(f"rank {self.rank}: profile of steps {self._first} to {step}: {self.folder}/{name}.*", flush=True)
        finally:
            if device.has_cuda():
                torch.cuda.memory._record_memory_history(enabled=None)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __enter__(self) -> "StepProfiler":
        self._before = signal.signal(signal.SIGUSR2, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGUSR2, self._before)
        if self.running:
            self._profile.stop()
            self._profile = None
