"""What the benchmark suites share: providers, timing, peak memory, and errors against fp64.

Times.  Without a GPU: wall time of each call (pytest-benchmark's rounds).  On CUDA: events around each call, with the
L2 cache overwritten before it, so that inputs come from memory as they do in a training step; wall time, launches
included, is kept beside it.  Medians, with the 20% and 80% quantiles.

Memory.  What a call takes at its peak above what was there before it, results included.  On CUDA from the allocator;
elsewhere from the kernel's high-water mark of this process's resident memory (Linux), which sees every library's
buffers and not only torch's.

Errors.  ||result - reference|| / ||reference|| in fp64, the largest over a call's results; the reference is computed in
fp64 from the same, already rounded inputs.
"""

import ctypes
import gc
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from umer1 import device
from umer1.errors import UserError

Results = Mapping[str, torch.Tensor]
"""Name -> tensor of what a call computes: loss, gradients, rewards."""

_COLD_BYTES = 256 << 20  # more than any L2


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way to compute what a suite measures."""

    name: str
    make: Callable[[Any], Callable[[], Results]]
    """Inputs -> the call that is timed."""
    package: str | None = None
    """Import name of what has to be installed for it."""
    needs_cuda: bool = False
    ours: bool = False
    """Part of umer1: an error of it fails the suite, one of the others is a line in the record."""
    fits: Callable[[Any], str | None] = lambda inputs: None
    """Why these inputs are not for it, or None."""
    within: Callable[[], AbstractContextManager] = nullcontext
    """What has to be entered around its calls."""

    def obstacle(self, inputs: Any) -> str | None:
        """Why it cannot be measured here, or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return "not installed"
        if self.needs_cuda and not device.has_cuda():
            return "needs a GPU"
        return self.fits(inputs)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The least that any implementation must do."""

    flops: float  # of matrix products
    bytes: float  # inputs read once, results written once
    dtype: torch.dtype  # that the products are in

    def floor_seconds(self, ceilings: Mapping[str, float]) -> float:
        """The larger of arithmetic, memory and one launch at this machine's measured ceilings."""
        arithmetic = self.flops / ceilings[matmul_key(self.dtype)] if self.flops else 0.0
        return max(arithmetic, self.bytes / ceilings["copy_bytes_per_second"], ceilings["launch_seconds"])


def matmul_key(dtype: torch.dtype) -> str:
    return f"matmul_{dtype_name(dtype)}_flops"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------- time


def device_seconds(call: Callable[[], Any], *, budget: float = 0.3, least: int = 3, most: int = 100) -> list[float]:
    """Seconds of each call on the CUDA device, the L2 cache overwritten before each; about `budget` seconds of them."""
    cold = torch.empty(_COLD_BYTES, dtype=torch.int8, device=device.device())

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    once()
    rounds = min(most, max(least, int(budget / max(once(), 1e-6))))
    return [once() for _ in range(rounds)]


def wall_seconds(call: Callable[[], Any], rounds: int) -> list[float]:
    """Wall seconds of each call, queued device work included."""
    found = []
    for _ in range(rounds):
        device.synchronize()
        started = time.perf_counter()
        call()
        device.synchronize()
        found.append(time.perf_counter() - started)
    return found


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, best, 20% and 80% quantile; of few values the nearest."""
    ordered = sorted(seconds)
    at = [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8)]
    found = {"median": statistics.median(ordered), "best": ordered[0], "low": at[0], "high": at[1]}
    return found | {"rounds": len(ordered)}


# ------------------------------------------------------------------------------------------------------------ memory


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Bytes that a call takes at its peak above what was there before; None where the system cannot say."""
    gc.collect()
    if device.has_cuda():
        device.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call()
        device.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before
    if not _reset_high_water():
        return None
    before = _status_bytes("VmRSS")
    results = call()
    peak = _status_bytes("VmHWM")
    del results
    return max(peak - before, 0)


def _reset_high_water() -> bool:
    """Give freed memory back and start the high-water mark anew; False where /proc does not offer it."""
    marks = Path("/proc/self/clear_refs")
    if not marks.exists():
        return False
    ctypes.CDLL(None).malloc_trim(0)
    marks.write_text("5")
    return True


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


# ------------------------------------------------------------------------------------------------------------ errors


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| in fp64; the norm of the difference where the reference is 0."""
    got, want = got.detach().to(want.device, torch.float64), want.double()
    if got.shape != want.shape:
        raise ValueError(f"shape {tuple(got.shape)}, the reference has {tuple(want.shape)}")
    difference, scale = float((got - want).norm()), float(want.norm())
    return difference / scale if scale else difference


def errors(got: Results, want: Results) -> dict[str, float]:
    """Relative error of every result of the reference by name."""
    return {name: relative_error(got[name], tensor) for name, tensor in want.items()}


# ---------------------------------------------------------------------------------------------------------- ceilings


def measure_ceilings(dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """What this machine does at best: a large copy (bytes read and written), square products, a call of no work."""
    found = {"copy_bytes_per_second": _copy_rate((4 << 30) if device.has_cuda() else (128 << 20))}
    for dtype in dtypes:
        found[matmul_key(dtype)] = _matmul_rate(dtype)
    one = torch.ones(1, device=device.device())
    found["launch_seconds"] = _best(lambda: one.add_(1.0))
    return found


def _copy_rate(size: int) -> float:
    source = torch.empty(size, dtype=torch.int8, device=device.device()).random_()
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source))


def _matmul_rate(dtype: torch.dtype) -> float:
    size = 1024
    if device.has_cuda():
        size = 8192 if dtype.itemsize < 4 else 4096
    left, right = (torch.randn(size, size, device=device.device()).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: left @ right)


def _best(call: Callable[[], Any]) -> float:
    """The median on a GPU; the best of several on a CPU, where other programs take part of the machine."""
    if device.has_cuda():
        return statistics.median(device_seconds(call))
    call()
    return min(wall_seconds(call, 7))


def measured(
    provider: Provider,
    inputs: Any,
    reference: Results | None,
    cost: Cost,
    ceilings: Mapping[str, float],
    timer: Callable[[Callable[[], Any], float], list[float]],
) -> dict[str, Any]:
    """What `rows` of a record hold about one provider on one set of inputs, besides the shape.

    timer: (call, about how many seconds it takes) -> wall seconds of each of several calls.  A failure of a provider
    that is not ours is a line of the record.
    """
    row: dict[str, Any] = {"provider": provider.name, "ours": provider.ours}
    if (obstacle := provider.obstacle(inputs)) is not None:
        return row | {"not_measured": obstacle}
    try:
        with provider.within():
            return row | _run(provider.make(inputs), reference, timer) | {"floor_seconds": cost.floor_seconds(ceilings)}
    except UserError as error:
        return row | {"not_measured": str(error)}
    except torch.OutOfMemoryError:
        return row | {"not_measured": "out of memory"}
    except Exception as error:
        if provider.ours:
            raise
        first_line = (str(error).splitlines() or [""])[0]
        return row | {"not_measured": f"fails: {type(error).__name__}: {first_line[:200]}"}


def _run(call: Callable[[], Results], reference: Results | None, timer: Callable) -> dict[str, Any]:
    """Errors, memory, times."""
    results = call()
    found: dict[str, Any] = {}
    if reference is not None:
        found["errors"] = errors(results, reference)
        found["error"] = worst(found["errors"])
    del results
    started = time.perf_counter()
    found["peak_bytes"] = peak_bytes(call)
    found["wall_seconds"] = quantiles(timer(call, time.perf_counter() - started))
    found["seconds"] = quantiles(device_seconds(call)) if device.has_cuda() else found["wall_seconds"]
    return found


def worst(found: Mapping[str, float]) -> float:
    """The largest error; NaN is larger than any."""
    return math.nan if any(math.isnan(value) for value in found.values()) else max(found.values())
