"""Helpers for tests: run a function on several gloo ranks, compare tensors by name."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

from umer1 import device

# What most ranks import, seconds of a core each time.  Without a GPU ranks are forks of one process that has it all
# and has done nothing yet; with one they are new processes, since a look at the GPU must not come before a fork.
_PRELOADED = ["umer1.training.grpo", "umer1.training.sft", "umer1.inference.engine"]
# Ranks that have not failed get this long to end on their own after another rank has failed.
GRACE_SECONDS = 3.0


def _child(
    work: bytes, environ: dict[str, str], rank: int, world_size: int, init_file: str, timeout: float, pipe
) -> None:
    os.environ.clear()
    os.environ.update(environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{init_file}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        fn, args = pickle.loads(work)
        result = (True, fn(*args))
        torch.distributed.destroy_process_group()
    except BaseException:
        result = (False, traceback.format_exc())
    # Plain pickle copies tensors; the pipe's own pickler would share memory that dies with this process.
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()


def run_distributed(fn: Callable, world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Return values of `fn(*args)` on each of `world_size` new processes that share a gloo process group.

    `fn` stands at the top level of an importable module; its arguments and its result can be pickled.  RANK and
    WORLD_SIZE are set and torch.distributed is initialised, so that `init_distributed` works as under torchrun.
    Raises RuntimeError with every failed rank's traceback, or after `timeout` seconds; no process is left behind.
    """
    work = pickle.dumps((fn, args))  # as results are, and a process that is forked gets no more than 256 open files
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder, rank_context() as context:
        pipes, processes = [], []
        try:
            for rank in range(world_size):
                mine, theirs = context.Pipe(duplex=False)
                init_file = str(Path(folder) / "init")
                arguments = (work, dict(os.environ), rank, world_size, init_file, timeout, theirs)
                process = context.Process(target=_child, args=arguments, daemon=True)
                process.start()
                theirs.close()
                pipes.append(mine)
                processes.append(process)
            return _collect(pipes, processes, deadline, timeout)
        finally:
            for process in processes:
                process.join(GRACE_SECONDS)
                if process.is_alive():
                    process.kill()
                    process.join()


@contextmanager
def rank_context() -> Iterator[BaseContext]:
    """What starts the ranks' processes; they compute in one thread each, as this process's environment then says."""
    context = torch.multiprocessing.get_context("spawn" if device.has_cuda() else "forkserver")
    context.set_forkserver_preload(_PRELOADED)
    settings = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    saved = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield context
    finally:
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _collect(pipes: list, processes: list, deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting and time.monotonic() < deadline:
        for pipe in connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
            rank = waiting.pop(pipe)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(GRACE_SECONDS)
                succeeded, value = False, f"ended without a result, exit code {processes[rank].exitcode}"
            (results if succeeded else failures)[rank] = value
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    for process in processes if failures or waiting else []:
        process.kill()
    if failures:
        reports = "\n".join(f"rank {rank}:\n{report}" for rank, report in sorted(failures.items()))
        raise RuntimeError(f"{len(failures)} of {len(processes)} ranks failed\n{reports}")
    if waiting:
        raise RuntimeError(f"ranks {sorted(waiting.values())} did not end within {timeout} s")
    return [results[rank] for rank in range(len(processes))]


def assert_close(
    name: str, got: torch.Tensor, want: torch.Tensor, *, rtol: float = 1e-5, atol: float | None = None
) -> None:
    """Fail unless max |got - want| <= atol + rtol * max |want|; `atol` defaults to 0.

    The scale is the tensor's largest value and not each element's: elements near zero carry the sum's round-off.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if want.numel() == 0:
        return
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    difference, scale = (got - want).abs().max().item(), want.abs().max().item()
    limit = (atol or 0.0) + rtol * scale
    assert difference <= limit, (
        f"{name}: largest difference {difference:.3e} > {limit:.3e} (largest expected value {scale:.3e})"
    )
