"""What this process and its DataLoader workers use: CPU time, and memory of their own."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

__all__ = ["cpu_seconds", "memory_bytes"]

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """CPU time of all threads of this process and of its workers that are alive, in seconds since they started."""
    return time.process_time() + sum(_cpu_seconds_of(pid) for pid in _workers())


def memory_bytes() -> int:
    """Memory of this process and its workers: anonymous and shared, each page they share counted once.

    That is proportional set size (PSS) without mapped files: those are in the page cache, which the kernel takes
    back when it needs it. 0 if the kernel does not say.
    """
    return sum(_memory_of(pid) for pid in (os.getpid(), *_workers()))


def _workers() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def _cpu_seconds_of(pid: int) -> float:
    # See proc(5): user and system time are fields 14 and 15; the name, field 2, may hold spaces and brackets.
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S if fields else 0.0


def _memory_of(pid: int) -> int:
    sizes = dict(line.split(":", 1) for line in _read(pid, "smaps_rollup").splitlines()[1:])
    return sum(int(sizes[name].split()[0]) << 10 for name in ("Pss_Anon", "Pss_Shmem") if name in sizes)


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8")
    except OSError:  # it has ended
        return ""
