"""The control groups of Linux that this process is in: folders of files that say its limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(
    controller: str, root: Path = Path("/sys/fs/cgroup"), own: str | None = None
) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is of version 2) of each group that bounds this process, outermost first.

    controller: "cpu" or "memory". own: what /proc/self/cgroup says. Folders need not be there: in
    a container the outermost is its own, whatever that file says.
    """
    if own is None:
        try:
            own = Path("/proc/self/cgroup").read_text()
        except OSError:
            return
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base, parts = root / controller if controllers else root, Path(path).parts[1:]
        for depth in range(len(parts) + 1):
            yield base.joinpath(*parts[:depth]), not controllers
