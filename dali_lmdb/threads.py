"""Default numbers of threads, computed from the cores that this process may use (see sched_getaffinity)."""

from __future__ import annotations

import os

__all__ = ["MAX_THREADS", "threads_per_rank", "threads_to_convert", "threads_to_read"]

MAX_THREADS = 1024
"""More than a process can use anywhere; with a mistyped 100,000 DALI aborts the process."""


def threads_per_rank(ranks_per_node: int | None = None) -> int:
    """One rank's share of the cores, at least 1; for threads or worker processes of loading and training.

    Args:
        ranks_per_node: number of ranks on this machine; by default torchrun's LOCAL_WORLD_SIZE, or 1 without it.
    """
    if ranks_per_node is None:
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, _num_cores() // max(1, ranks_per_node))


def threads_to_convert(given: int | None = None) -> int:
    """``given``, or all cores, at least 2, so that one thread reads while another validates.

    Raises:
        ValueError: ``given`` is not 1 to ``MAX_THREADS``.
    """
    return _in_range(given, default=max(2, _num_cores()))


def threads_to_read(given: int | None = None) -> int:
    """``given``, or all cores, at least 4, since threads that read a whole store often wait for the disk.

    Raises:
        ValueError: ``given`` is not 1 to ``MAX_THREADS``.
    """
    return _in_range(given, default=max(4, _num_cores()))


def _in_range(given: int | None, *, default: int) -> int:
    if given is not None and not 1 <= given <= MAX_THREADS:
        raise ValueError(f"num_threads is {given}, expected 1 to {MAX_THREADS}")
    return default if given is None else given


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
