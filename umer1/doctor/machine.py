"""What of the machine itself tends to hurt: limits, shared memory, disks, the network's cards."""

import os
import resource
import shutil
from pathlib import Path

_FILES = 4096
_SHARED = 1 << 30


def notes(shared: Path = Path("/dev/shm"), cards: Path = Path("/sys/class/infiniband")) -> list[str]:
    """One line each; a line that begins with `!` names something to change."""
    found = [f"{os.cpu_count()} CPU cores, {_memory():.0f} GiB memory"]
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = f"{soft:,} open files a process"
    few = soft != resource.RLIM_INFINITY and soft < _FILES
    found.append(f"! {files}: raise it (ulimit -n {_FILES * 16}); workers and engines need many" if few else files)
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        text = f"{size / 2**30:.1f} GiB shared memory ({shared})"
        found.append(f"! {text}: data workers need more (docker run --shm-size 16g)" if size < _SHARED else text)
    names = sorted(entry.name for entry in cards.iterdir()) if cards.is_dir() else []
    found.append(f"InfiniBand or RoCE: {', '.join(names) or 'none (several nodes would talk over TCP)'}")
    return found


def _memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
