"""torch.compile that does compile: umer1 switches it off where there is no GPU (umer1/__init__.py)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch._dynamo.utils import counters


@contextmanager
def compiling() -> Iterator[None]:
    """Inside, torch.compile works; AssertionError where no graph was made."""
    torch._dynamo.reset()
    counters.clear()
    with mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="0"), torch._dynamo.config.patch(disable=False):
        yield
    assert counters["stats"]["unique_graphs"], "nothing was compiled"
    torch._dynamo.reset()
