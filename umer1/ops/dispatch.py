"""Which implementation of an operation runs: the only place that decides it."""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Literal

import torch

from umer1.device import device_name, has_triton, triton_interpreted
from umer1.errors import UserError

Impl = Literal["auto", "torch", "triton", "cuda"]
IMPLS = ("auto", "torch", "triton", "cuda")

# (operation, implementation) -> devices on which a record under perf/results shows that it beats plain torch.  None has
# been measured yet: `auto` is plain torch until `make gpu-check` has left such a record.
PROVEN: dict[tuple[str, str], frozenset[str]] = {}

logger = logging.getLogger(__name__)


@cache
def _tell(op: str, chosen: str, reasons: str) -> None:
    logger.info("%s: impl=auto runs %s%s", op, chosen, f" ({reasons})" if reasons else "")


def choose(op: str, impl: str, obstacles: Mapping[str, str | None]) -> str:
    """The implementation that runs `op`: "torch", "triton" or "cuda".

    obstacles: implementation -> why it cannot run these tensors here, or None where it can; the best one first, and
    torch, which always can, last.  `auto` takes the first that can and is PROVEN on this device, and says once per
    choice what it took and why no better one; a request that cannot be met is a UserError with the reason and what can
    be asked for.
    """
    possible = [name for name, reason in obstacles.items() if reason is None]
    if impl == "auto":
        faster = {name: reason or _doubt(op, name) for name, reason in obstacles.items() if name != "torch"}
        chosen = next((name for name, reason in faster.items() if reason is None), "torch")
        _tell(op, chosen, "; ".join(f"{name}: {reason}" for name, reason in faster.items() if reason))
        return chosen
    if impl not in IMPLS:
        raise UserError(f"{op}: impl={impl!r} must be one of {', '.join(IMPLS)}")
    if impl not in obstacles:
        raise UserError(f"{op}: there is no {impl} implementation; use auto or {' or '.join(obstacles)}")
    if obstacles[impl]:
        raise UserError(f"{op}: impl={impl!r} cannot run: {obstacles[impl]}; use auto or {' or '.join(possible)}")
    return impl


def _doubt(op: str, impl: str) -> str | None:
    """Why an implementation that can run is not taken unasked, or None."""
    here = device_name()
    if impl not in ("triton", "cuda") or here in PROVEN.get((op, impl), ()):
        return None
    return f"no record shows that it is faster on {here}; ask for it by impl={impl!r}"


def triton_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of this device; None where they can.

    On CPU tensors they run only in triton's interpreter, which tests use.
    """
    if not has_triton():
        return "triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and triton_interpreted()):
        return None
    return f"the tensors are on {device.type}, Triton kernels need CUDA"
