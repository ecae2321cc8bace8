"""Where a measurement comes from: machine, versions, commit and command, and the file that its numbers are kept in."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from umer1 import device
from umer1.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "perf" / "results"
PACKAGES = ("torch", "triton", "megatron-core", "transformers", "numpy", "liger-kernel", "cut-cross-entropy", "inf-cl")
PACKAGES += ("transformer-engine", "faiss-cpu")


def describe_machine() -> dict[str, Any]:
    """Device, processor, cores and memory."""
    found: dict[str, Any] = {
        "device": device.device_name(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if device.has_cuda():
        properties = torch.cuda.get_device_properties(device.device())
        found |= {"gpu_memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        found["multiprocessors"] = properties.multi_processor_count
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """Of the packages that matter here and are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """The commit that is checked out, and whether files that it has were changed; unknown outside a checkout."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    code = ("umer1", "kernels", "csrc", "perf/*.py", "setup.py")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code) if head else None
    return {"commit": head or "unknown", "uncommitted_changes": None if changed is None else bool(changed)}


def machine_slug() -> str:
    """The machine in a file name: `cpu`, or the GPU's name."""
    name = device.device_name().lower()
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name).split())


def new_record(suite: str) -> dict[str, Any]:
    """An empty record of a suite with everything that says where its numbers come from."""
    return {
        "suite": suite,
        "command": " ".join(["python", _short(sys.argv[0]), shlex.join(map(_short, sys.argv[1:]))]).strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **commit(),
        "machine": describe_machine(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": versions(),
        "rows": [],
    }


def _short(word: str) -> str:
    """Paths of this machine do not belong into a record."""
    path = Path(word)
    if not path.is_absolute():
        return word
    if path.name == "__main__.py":
        return f"-m {path.parent.name}"
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def save_record(record: dict[str, Any], folder: str | Path | None = None) -> Path:
    """Write a record as FOLDER/SUITE_MACHINE.json, whole or not at all."""
    path = Path(folder or RESULTS) / f"{record['suite']}_{machine_slug()}.json"
    write_json(path, record)
    return path
