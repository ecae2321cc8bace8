"""The compiled operators of csrc/: which libraries are there, and loading them."""

import ctypes
from functools import cache
from pathlib import Path

import torch

CPU_LIBRARY = "_C.abi3.so"
CUDA_LIBRARY = "_C_cuda.abi3.so"
FOLDER = Path(__file__).resolve().parents[1]


@cache
def load_extension() -> str | None:
    """Register the operators torch.ops.umer1.*: None, or why the extension cannot be used."""
    if not (FOLDER / CPU_LIBRARY).exists():
        return f"umer1/{CPU_LIBRARY} has not been built (pip install, with a C++ compiler)"
    torch.ops.load_library(str(FOLDER / CPU_LIBRARY))
    return None


@cache
def _cuda_library() -> ctypes.CDLL | None:
    """The CUDA half, which only a torch with CUDA can load; None where it was not built."""
    if torch.version.cuda is None or load_extension() or not (FOLDER / CUDA_LIBRARY).exists():
        return None
    torch.ops.load_library(str(FOLDER / CUDA_LIBRARY))
    library = ctypes.CDLL(str(FOLDER / CUDA_LIBRARY))
    library.umer1_cuda_archs.restype = ctypes.c_char_p
    return library


def runs_on(capability: int, archs: list[int]) -> bool:
    """Whether code for the compute capabilities `archs` (90 for 9.0), the last one as PTX too, runs on `capability`.

    Machine code runs on its own major version from its minor version on, PTX on everything newer.
    """
    same_major = any(arch // 10 == capability // 10 and arch <= capability for arch in archs)
    return same_major or max(archs) <= capability


@cache
def extension_obstacle(device: torch.device) -> str | None:
    """Why the compiled operators cannot run on tensors of this device; None where they can."""
    missing = load_extension()
    if missing or device.type == "cpu":
        return missing
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    library = _cuda_library()
    if library is None:
        return f"umer1/{CUDA_LIBRARY} has not been built (pip install with nvcc on a machine whose torch has CUDA)"
    archs = [int(arch) for arch in library.umer1_cuda_archs().decode().split("_")]
    major, minor = torch.cuda.get_device_capability(device)
    if not runs_on(10 * major + minor, archs):
        return f"it is compiled for {archs}, this GPU is {10 * major + minor} (UMER1_CUDA_ARCHS)"
    return None


def take_bad_index() -> tuple[int, int] | None:
    """(index, number of rows) of a gather on CUDA that met an index out of range since the last call; None without."""
    library = _cuda_library()
    if library is None:
        return None
    index, total = ctypes.c_int64(), ctypes.c_int64()
    found = library.umer1_take_bad_index(ctypes.byref(index), ctypes.byref(total))
    return (index.value, total.value) if found else None
