"""Process and machine memory, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil


def peak_rss_bytes() -> int:
    """Largest resident size that the process has had."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        # not getrusage(): its ru_maxrss survives exec, so a small program started by a large one reports the large one
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rss_bytes() -> int:
    """Resident size of the process."""
    return int(psutil.Process().memory_info().rss)


def free_bytes() -> int:
    """Memory that a new allocation can have without swapping, within the limit of the process's control group."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")  # a container sees its own group here; psutil sees the whole machine
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))
