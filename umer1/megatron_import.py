"""megatron-core, imported as umer1 needs it; the process is left as it was.

Modules that use megatron import this one before it.  While megatron-core is imported here

- its small functions stay as they are where there is no GPU: wrapped in torch.compile they would be compiled at the
  first step, for seconds and without a gain;
- its warnings about Transformer Engine, Apex and a GPU, each of which is optional here, are not shown;
- a Transformer Engine that is installed and does not load counts as absent (umer1/optional_te.py).
"""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

from umer1.optional_te import load_fault

# What umer1 uses of it and megatron.core does not import by itself: later imports would warn as the first one does.
_MODULES = (
    "megatron.core",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.transformer.transformer_block",
    "megatron.core.transformer.transformer_config",
)


def _as_it_is(function: Callable | None = None, **settings: Any) -> Any:
    """Stands in for torch.compile, with and without arguments."""
    return function if function is not None else _as_it_is


def _import() -> None:
    load_fault()
    compile_ = torch.compile
    if not torch.cuda.is_available():
        torch.compile = _as_it_is
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"megatron\.core")
            warnings.filterwarnings("ignore", message=r"`torch\.distributed\..* is deprecated", category=FutureWarning)
            for name in _MODULES:
                importlib.import_module(name)
    finally:
        torch.compile = compile_


_import()
