"""States of every random generator of a process, as JSON; they mean something to the same layout only."""

import base64
import random
from typing import Any

import umer1.megatron_import  # noqa: F401

import numpy as np
import torch
from megatron.core import tensor_parallel

from umer1 import device


def rng_state() -> dict[str, Any]:
    """torch (CPU and CUDA), numpy, python and megatron's tracker; tensors as base64 of their bytes."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
        "tracker": {key: _encode(value) for key, value in tensor_parallel.get_cuda_rng_tracker().get_states().items()},
    }
    if device.has_cuda():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_decode(state["torch"]))
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states({key: _decode(value) for key, value in state["tracker"].items()})
    if "cuda" in state and device.has_cuda():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
