"""torch.compile that is held to compiling."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.utils import counters


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, torch.compile works; AssertionError where no graph was made."""
    torch._dynamo.reset()
    counters.clear()
    yield
    assert counters["stats"]["unique_graphs"], "nothing was compiled"
    torch._dynamo.reset()
