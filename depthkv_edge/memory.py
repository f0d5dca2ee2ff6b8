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

