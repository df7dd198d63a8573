"""What differs between operating systems: memory advice, processors, the cache folder."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path


def processors() -> int:
    """Processors this process may use, by affinity and by its control group's quota; at least 1."""
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return max(1, count)


def cache_folder() -> Path:
    """Where compiled kernels are kept; KEELBACK_CACHE names another place."""
    if named := os.environ.get("KEELBACK_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "keelback"


@cache
def yield_address() -> int:
    """Address of the C function that gives up the processor, or 0 where there is none."""
    if sys.platform == "win32":
        return 0
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0


def resident_bytes() -> int:
    """Memory this process holds now; 0 where it cannot be told."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0
