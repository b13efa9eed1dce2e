"""Checks of what the machine lets this process use: cores, memory, processes, files, shared memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from dali_lmdb.doctor.cgroup import cpu_limit, memory_limit, task_limit
from dali_lmdb.doctor.findings import Finding, ok, warning

__all__ = [
    "available_memory",
    "cores",
    "gigabytes",
    "memory",
    "open_files",
    "other_limits",
    "processes",
    "shared_memory",
]

_LEAST_MEMORY = 4_000_000_000  # a rank with torch, DALI and some batches takes 2 to 3 GB
_LEAST_TASKS = 1_000  # a rank with its loaders has some 100 threads
_LEAST_FILES = 4_096  # shards, workers and the batches that they share
_LEAST_SHARED = 1 << 30  # 7 float32 batches of 256 x 3 x 224 x 224


def cores(root: Path) -> Iterator[Finding]:
    """The cores that this process may use, by affinity and by its control group."""
    usable, all_cores, limit = len(os.sched_getaffinity(0)), os.cpu_count() or 1, cpu_limit(root)
    text = f"{usable} of {all_cores}" if usable < all_cores else f"{usable}"
    if limit is not None and limit < usable:
        remedy = (
            f"give --workers {max(1, int(limit))} for each rank's share, or raise the limit (docker run --cpus)"
        )
        yield warning("cores", f"{text}, but this control group's limit is the time of {limit:g}", remedy)
    elif usable == 1 and all_cores > 1:
        remedy = "start it without taskset, or in SLURM with more --cpus-per-task"
        yield warning("cores", f"this process is bound to 1 of {all_cores}", remedy)
    else:
        yield ok("cores", text + (" (bound by affinity)" if usable < all_cores else ""))


def memory(root: Path) -> Iterator[Finding]:
    """The memory that this process may use."""
    total, limit = _total_memory(root), memory_limit(root)
    usable = available_memory(root)
    text = (
        gigabytes(total)
        if limit is None or limit >= total
        else f"{gigabytes(limit)} of {gigabytes(total)} (control group)"
    )
    if usable < _LEAST_MEMORY:
        yield warning(
            "memory",
            text,
            f"training needs some {gigabytes(_LEAST_MEMORY)}; raise the limit (docker run --memory)",
        )
    else:
        yield ok("memory", text)


def available_memory(root: Path) -> int:
    """Bytes of memory that this process and its page cache may take at most."""
    limit = memory_limit(root)
    total = _total_memory(root)
    return total if limit is None else min(limit, total)


def _total_memory(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) << 10
    raise ValueError("/proc/meminfo has no MemTotal")


def processes(root: Path) -> Iterator[Finding]:
    """The number of processes and threads that may be started."""
    left = task_limit(root)
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    user = None if soft == resource.RLIM_INFINITY else soft
    if left is not None and left < _LEAST_TASKS:
        yield warning(
            "processes", f"{left:,} more in this control group", "raise pids.max (docker run --pids-limit)"
        )
    elif user is not None and user < _LEAST_TASKS:
        yield warning("processes", f"{user:,} for this user", f"raise the limit: ulimit -u {_LEAST_TASKS * 4}")
    else:
        limits = [
            f"{number:,} {what}"
            for number, what in ((left, "more in this control group"), (user, "for this user"))
            if number is not None
        ]
        yield ok("processes", ", ".join(limits) or "no limit")


def open_files() -> Iterator[Finding]:
    """The limit on open files; the soft one is raised where needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _LEAST_FILES:
        remedy = (
            f"raise the hard limit to {_LEAST_FILES}: ulimit -Hn, or docker run --ulimit nofile={_LEAST_FILES}"
        )
        yield warning("open files", f"at most {hard:,}, too few for many shards or workers", remedy)
    else:
        yield ok("open files", f"{_number(soft)}, raised up to {_number(hard)} where needed")


def other_limits() -> Iterator[Finding]:
    """Limits on address space and file size, which most programs have none of."""
    limits = {
        "-v": (resource.RLIMIT_AS, "address space", "maps the store and reserves much for CUDA"),
        "-d": (resource.RLIMIT_DATA, "data", "needs it for batches"),
        "-f": (resource.RLIMIT_FSIZE, "file size", "writes stores and checkpoints"),
    }
    clean = True
    for option, (number, what, why) in limits.items():
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            clean = False
            yield warning(
                "other limits",
                f"{what} is limited to {soft:,} bytes; this package {why}",
                f"ulimit {option} unlimited",
            )
    if clean:
        yield ok("other limits", "address space, data and file size are unlimited")


def shared_memory(root: Path) -> Iterator[Finding]:
    """The room in ``/dev/shm``, through which DataLoader workers pass batches."""
    found = os.statvfs(root / "dev/shm")
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    text = f"{gigabytes(free)} free of {gigabytes(size)}"
    if free < _LEAST_SHARED:
        remedy = "docker run --shm-size 8g, or remove old files from /dev/shm; --backend dali does not need it"
        yield warning("shared memory", f"{text}, little for the workers of --backend torch", remedy)
    else:
        yield ok("shared memory", text)


def _number(limit: int) -> str:
    return "no limit" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def gigabytes(num_bytes: int) -> str:
    """A size for people, in units of 10^9 or 10^6 bytes."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
