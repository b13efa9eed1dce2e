"""The page cache from outside: dropping a file from it, and looking what is in it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["bytes_from_device", "drop", "in_memory"]


def drop(path: Path) -> None:
    """Ask the kernel to forget a file's pages.

    It keeps those that some process has mapped and touched, and all pages of a file system that has no other
    place for them, such as tmpfs: see ``in_memory``.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # what is not on the disk yet cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def in_memory(
    path: Path, offsets: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint32]
) -> npt.NDArray[np.bool_]:
    """Whether the first and the last page of some byte ranges are in memory; bool of shape (n, 2).

    The kernel says so (mincore(2)) only to who may write the file or owns it; to others everything is.

    Raises:
        OSError: the kernel does not say.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as map_:
        data = np.frombuffer(map_, dtype=np.uint8)
        pages = np.zeros(-(-len(data) // mmap.PAGESIZE), dtype=np.uint8)
        arguments = (ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(data)))
        library = ctypes.CDLL(None, use_errno=True)
        if library.mincore(*arguments, ctypes.c_void_p(pages.ctypes.data)) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        del data  # the map cannot be closed before
    first = offsets.astype(np.int64)
    last = first + np.maximum(lengths.astype(np.int64), 1) - 1
    return np.asarray(pages[np.stack([first, last], axis=1) // mmap.PAGESIZE] & 1, dtype=np.bool_)


def bytes_from_device() -> int | None:
    """Bytes that this process has caused to be read from storage so far; None if the system does not tell."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("read_bytes:")), None)
    except OSError:
        return None
