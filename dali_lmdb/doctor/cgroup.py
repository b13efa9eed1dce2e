"""Limits of this process's control groups, of version 1 or 2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_limit", "memory_limit", "task_limit"]

_UNLIMITED = 1 << 60  # version 1 writes the largest multiple of a page instead of "max"


def cpu_limit(root: Path) -> float | None:
    """Cores whose time this process may use; None: no limit."""
    limits = []
    for folder in _folders(root, "cpu"):
        words = _words(folder / "cpu.max")  # version 2
        if not words:
            words = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            limits.append(int(words[0]) / int(words[1]))
    return min(limits, default=None)


def memory_limit(root: Path) -> int | None:
    """Bytes of memory that the group may use; None: no limit."""
    return _least(root, "memory", "memory.max", "memory.limit_in_bytes")


def task_limit(root: Path) -> int | None:
    """Processes and threads that the group may start beside those it has; None: no limit."""
    left = [
        int(words[0]) - int((_words(folder / "pids.current") or ["0"])[0])
        for folder in _folders(root, "pids")
        if (words := _words(folder / "pids.max")) and words[0] != "max"
    ]
    return min(left, default=None)


def _least(root: Path, controller: str, *names: str) -> int | None:
    found = [
        int(words[0])
        for folder in _folders(root, controller)
        for name in names
        if (words := _words(folder / name)) and words[0] != "max"
    ]
    least = min(found, default=math.inf)
    return int(least) if least < _UNLIMITED else None


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The group of this process and those above it, whose limits hold too, in either version.

    In a container the path in ``/proc/self/cgroup`` may be that of the host, and its own group is at the top.
    """
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        if controllers:  # version 1; one is a link to the other, if several are mounted together
            tops = [f"sys/fs/cgroup/{name}" for name in {controllers, controller}]
        else:
            tops = ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        for top in tops:
            group = Path(path.lstrip("/"))
            for part in (group, *group.parents):
                yield root / top / part


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except OSError:
        return []
