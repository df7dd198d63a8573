"""Control groups: what they leave a process of memory, and of cores."""

from __future__ import annotations

from pathlib import Path

from keelback.engine import platform
from keelback.kernels import cores
from keelback.kernels.groups import control_groups


def rooms(root: Path, own: str) -> list[int]:
    return list(platform._group_rooms(control_groups("memory", root, own)))


def quotas(root: Path, own: str) -> list[float]:
    return list(cores._quotas(control_groups("cpu", root, own)))


def test_control_groups_limit_memory(tmp_path: Path):
    for folder, limit in ((".", "max"), ("a", "1000"), ("a/b", "5000")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.current").write_text("700\n")
        (tmp_path / folder / "memory.stat").write_text("anon 600\ninactive_file 100\n")
    assert rooms(tmp_path, "0::/a/b\n") == [400, 4400]
    old = tmp_path / "memory" / "c"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("3000\n")
    (old / "memory.usage_in_bytes").write_text("9000\n")
    (old / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 2\n")
    assert rooms(tmp_path, "4:cpu:/\n5:memory:/c\n") == [0]
    assert rooms(tmp_path, "0::/nowhere\n") == []


def test_control_groups_limit_cores(tmp_path: Path):
    for folder, limit in ((".", "max"), ("a", "150000"), ("a/b", "400000")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "cpu.max").write_text(f"{limit} 100000\n")
    assert quotas(tmp_path, "0::/a/b\n") == [1.5, 4]
    for folder, limit in ((".", -1), ("c", 20_000)):
        old = tmp_path / "cpu" / folder
        old.mkdir(exist_ok=True)
        (old / "cpu.cfs_quota_us").write_text(f"{limit}\n")
        (old / "cpu.cfs_period_us").write_text("10000\n")
    assert quotas(tmp_path, "4:cpu,cpuacct:/c\n5:memory:/a\n") == [2]
    # In a container the path may be the one outside, and its own group the outermost.
    assert quotas(tmp_path / "a", "0::/docker/1ab\n") == [1.5]
    assert quotas(tmp_path, "5:memory:/a\n") == []


def test_processors_are_at_most_those_of_the_smallest_quota(monkeypatch):
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 8)
    monkeypatch.delattr(cores.os, "sched_getaffinity", raising=False)
    for found, count in (([], 8), ([20.0], 8), ([6.0, 2.4], 2), ([0.1], 1)):
        monkeypatch.setattr(cores, "_quotas", lambda groups, found=found: iter(found))
        assert cores.processors() == count
