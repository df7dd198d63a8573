"""How many cores this process may use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .groups import control_groups


def processors() -> int:
    """Cores this process may use, by affinity and by its control groups' quotas; at least 1.

    Two threads of one core share what kernels are made of, so they count once.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    else:
        count = os.cpu_count() or 1
    return max(1, min([count, *map(round, _quotas(control_groups("cpu")))]))


def _quotas(groups: Iterable[tuple[Path, bool]]) -> Iterator[float]:
    """Cores of each control group that has a quota, which is time of all cores in a period."""
    for group, second in groups:
        names = ("cpu.max",) if second else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
            # One below zero is none.
            if quota >= 0:
                yield quota / period


def _siblings(cpu: int) -> str:
    """Names the core that a processor is a thread of."""
    try:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        return (topology / "thread_siblings_list").read_text()
    except OSError:
        return str(cpu)
