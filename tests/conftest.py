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


# Files of minutes, the longest first: begun last, one would keep a process busy while the others idle.
_LONGEST = (
    *("test_slurm.py", "test_grpo_resume.py", "test_grpo_vllm_faults.py", "test_kill_and_resume.py"),
    *("test_random_kills.py", "test_grpo_parity.py", "test_sft_parity.py", "test_grpo_program.py"),
    *("test_grpo_vllm_program.py", "test_watching.py", "test_fp8_files.py", "test_mmeb_command.py"),
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
