"""How a kernel file says which forms of its kernels ship, so that they can be compiled where there is no GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton

INTERPRETED = triton.knobs.runtime.interpret
"""Kernels run in triton's interpreter, on CPU tensors: read when they are decorated, so set before triton is imported.

The interpreter multiplies bf16 as if it were uint16: kernels take INTERPRETED as a constexpr and, where it holds, turn
their operands into fp32 before any arithmetic (tl.dot included).  It also stores bf16 by cutting it off."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One form of a kernel as it is launched on a GPU.  A kernel file lists its own in `variants(arch) -> list`."""

    name: str
    """For reports: operation, tile, dtype."""
    kernel: Any
    """The @triton.jit function."""
    types: Mapping[str, str]
    """Argument -> triton's type: `*bf16`, `i32`, `fp32`, `tensordesc<bf16[128,64]>`; constexprs are left out."""
    constexprs: Mapping[str, Any]
    """Argument -> value."""
    divisible_by_16: tuple[str, ...] = ()
    """Pointers and integers that launches see as multiples of 16: without them there are no 16-byte loads."""
    options: Mapping[str, int] = field(default_factory=dict)
    """num_warps, num_stages."""
