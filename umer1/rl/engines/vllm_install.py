"""Where vLLM is installed: in this interpreter, or in another that UMER1_VLLM_PYTHON names.

vLLM asks for one exact build of torch, which need not be the trainer's (an image of NVIDIA's has its own).  It runs in
processes of its own anyway, so they may have an environment of their own, with umer1 in it: `docker/Dockerfile`.
"""

import importlib.util
import os
import subprocess
import sys
from functools import cache

INSTALL = "pip install '.[rollout-cpu]' (without a GPU) or '.[rollout]'"
VARIABLE = "UMER1_VLLM_PYTHON"
_FIND = "import importlib.util as u; print(all(u.find_spec(name) for name in ('vllm', 'umer1')))"


def vllm_python() -> str:
    """The interpreter that vLLM's processes run in."""
    return os.environ.get(VARIABLE) or sys.executable


def has_vllm() -> bool:
    """Whether vLLM is installed there; only its own process imports it."""
    python = vllm_python()
    return importlib.util.find_spec("vllm") is not None if python == sys.executable else _other_has_vllm(python)


@cache
def _other_has_vllm(python: str) -> bool:
    try:
        found = subprocess.run([python, "-c", _FIND], capture_output=True, text=True, timeout=60, cwd="/")
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.stdout.strip() == "True"


def how_to_install() -> str:
    """For a message: what makes `has_vllm` true."""
    python = vllm_python()
    if python == sys.executable:
        return INSTALL
    return f"{VARIABLE}={python} has not both vllm and umer1; install them there, or unset it"
