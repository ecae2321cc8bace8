"""The one place that asks what this machine has: device, communication backend, Transformer Engine, Triton."""

import importlib.util
import os
from functools import cache

import torch

from umer1.optional_te import load_fault


@cache
def has_cuda() -> bool:
    """Whether a CUDA device can be used by this process."""
    return torch.cuda.is_available()


def local_rank() -> int:
    """Number of this process on its machine, known before any group exists (torchrun's LOCAL_RANK, else 0)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """The device of this process: the CUDA device of its local rank, else the CPU."""
    if has_cuda():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def backend() -> str:
    """Communication backend for `device()`: "nccl" or "gloo"."""
    return "nccl" if has_cuda() else "gloo"


def te_obstacle() -> str | None:
    """Why Transformer Engine's layers cannot be used; None where they can."""
    return load_fault() if has_cuda() else "there is no CUDA device"


@cache
def has_te() -> bool:
    """Whether Transformer Engine's layers can be used: a CUDA device and the package, which loads."""
    return te_obstacle() is None


@cache
def has_apex_gradient_kernel() -> bool:
    """Whether apex's product that adds a weight's gradient to a buffer can be used (its --cuda_ext build)."""
    return has_cuda() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


@cache
def has_triton() -> bool:
    """Whether triton is installed; its kernels run on CUDA devices, and in its interpreter for tests."""
    return importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """Whether Triton kernels run in triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def default_dtype() -> torch.dtype:
    """bfloat16 where tensor cores are, float32 on the CPU."""
    return torch.bfloat16 if has_cuda() else torch.float32


def device_name() -> str:
    """What a person calls the device."""
    return torch.cuda.get_device_name(device()) if has_cuda() else "CPU"


def synchronize() -> None:
    """Wait until the device has done all queued work; nothing to wait for on the CPU."""
    if has_cuda():
        torch.cuda.synchronize()


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A host tensor in page-locked memory, which a CUDA device copies without a detour; without one, the tensor."""
    return tensor.pin_memory() if has_cuda() else tensor


def release_memory() -> None:
    """Give back the device memory that no tensor holds any more: another process may need it next."""
    if has_cuda():
        torch.cuda.empty_cache()


def memory_gib() -> float:
    """Peak memory in GiB: allocated on the CUDA device, else resident in this process."""
    if has_cuda():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
