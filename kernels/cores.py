"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def processors() -> int:
    """Cores this process may use, by affinity and by its control group's quota; at least 1.

    Two threads of one core share what kernels are made of, so they count once.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    else:
        count = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return max(1, count)


def _siblings(cpu: int) -> str:
    """Names the core that a processor is a thread of."""
    try:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        return (topology / "thread_siblings_list").read_text()
    except OSError:
        return str(cpu)
