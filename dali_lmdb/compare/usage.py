"""What this process and its DataLoader workers use: CPU time, memory of their own, and bytes read from storage."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading
import time
from pathlib import Path

__all__ = ["MemoryPeak", "cpu_seconds", "free_unused_memory", "memory_bytes", "storage_bytes"]

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SAMPLE_S = 0.1
_GROWTH = 1.02


def cpu_seconds() -> float:
    """CPU time of all threads of this process and of its workers that are alive, in seconds since they started."""
    return time.process_time() + sum(_cpu_seconds_of(pid) for pid in _workers())


def storage_bytes() -> int | None:
    """Bytes that the kernel has fetched from storage for this process and its workers since they started.

    That counts reads and page faults of mapped files alike, with what the kernel reads ahead for them; pages found
    in the page cache count nothing. None if the kernel does not say.
    """
    return _total([_storage_bytes_of(pid) for pid in _processes()])


def memory_bytes(pids: list[int] | None = None) -> int | None:
    """Memory of this process and its workers: anonymous and shared, each page they share counted once.

    That is proportional set size (PSS) without mapped files: those are in the page cache, which the kernel takes
    back when it needs it. None if the kernel does not say.

    Args:
        pids: the processes; None: this one and its workers.
    """
    return _total([_size_of(pid, "smaps_rollup", ("Pss_Anon", "Pss_Shmem")) for pid in pids or _processes()])


class MemoryPeak:
    """The highest ``memory_bytes`` while it is open, of this process and the workers that it has on entry.

    A thread samples the resident memory, which costs next to nothing. ``memory_bytes`` takes some 20 ms of a core
    for a process, so it is called only on entry, if resident memory has grown since the last call, and at the end.
    """

    def __enter__(self) -> MemoryPeak:
        self._pids = _processes()
        self._samples: list[int | None] = []
        self._sample()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    @property
    def bytes(self) -> int | None:
        """The highest so far; None if the kernel does not say."""
        return max((size for size in self._samples if size is not None), default=None)

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            if _resident_bytes(self._pids) > _GROWTH * self._resident:
                self._sample()

    def _sample(self) -> None:
        self._resident = _resident_bytes(self._pids)
        self._samples.append(memory_bytes(self._pids))


def free_unused_memory() -> None:
    """Return to the system what this process has freed, so that it does not count for what is measured next."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _processes() -> list[int]:
    return [os.getpid(), *_workers()]


def _workers() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def _cpu_seconds_of(pid: int) -> float:
    # See proc(5): user and system time are fields 14 and 15; the name, field 2, may hold spaces and brackets.
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S if fields else 0.0


def _storage_bytes_of(pid: int) -> int | None:
    counts = dict(line.split(": ") for line in _read(pid, "io").splitlines())
    return int(counts["read_bytes"]) if "read_bytes" in counts else None


def _resident_bytes(pids: list[int]) -> int:
    return sum(_size_of(pid, "status", ("RssAnon", "RssShmem")) or 0 for pid in pids)


def _size_of(pid: int, file: str, names: tuple[str, ...]) -> int | None:
    """The sum in bytes of what a file says in lines like ``RssAnon:  12 kB``; None if it lacks any of them."""
    values = dict(line.split(":", 1) for line in _read(pid, file).splitlines() if ":" in line)
    return _total([int(values[name].split()[0]) << 10 if name in values else None for name in names])


def _total(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8")
    except OSError:  # it has ended
        return ""
