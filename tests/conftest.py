"""Shared helpers (tests/tiny_qwen2_vl.py and others) are importable from every test folder and every spawned rank."""

import importlib.util
import os
import sys
from pathlib import Path

import torch

_HERE = str(Path(__file__).resolve().parent)
# Without a GPU, Triton kernels run in triton's interpreter; read when triton is imported.  Not for child processes:
# a kernel is compiled in one, and vLLM's must not find a triton that seems to work.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)
# Where vLLM's CPU build is installed, transformers imports only with what its process gets as sitecustomize.
_SITE = Path(_HERE).parent / "umer1/rl/engines/child_site"
_spec = importlib.util.spec_from_file_location("child_site", _SITE / "sitecustomize.py")
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_HERE, str(_SITE), os.environ.get("PYTHONPATH", "")]))


def pytest_collection_modifyitems(items):
    """The folders with the longest tests first: begun last, they would keep one process busy while the others idle."""
    items.sort(key=lambda item: not {"slurm", "training"} & set(item.path.parts))
