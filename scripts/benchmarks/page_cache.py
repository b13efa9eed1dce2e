"""Drop files from the page cache, and find out what is in it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["bytes_from_device", "drop", "is_cached"]


def drop(path: Path) -> None:
    """Ask the kernel to drop a file's pages.

    It keeps pages that a process has mapped and accessed, and all pages of a file system without storage, such
    as tmpfs: see ``is_cached``.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # dirty pages cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def is_cached(
    path: Path, offsets: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint32]
) -> npt.NDArray[np.bool_]:
    """Return whether the first and last page of each byte range are in the page cache; bool of shape (n, 2).

    mincore(2) reveals this only to users who own or can write the file; to others, every page is reported present.

    Raises:
        OSError: the kernel does not report it.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as map_:
        data = np.frombuffer(map_, dtype=np.uint8)
        pages = np.zeros(-(-len(data) // mmap.PAGESIZE), dtype=np.uint8)
        arguments = (ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(data)))
        library = ctypes.CDLL(None, use_errno=True)
        if library.mincore(*arguments, ctypes.c_void_p(pages.ctypes.data)) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        del data  # otherwise the map cannot be closed
    first = offsets.astype(np.int64)
    last = first + np.maximum(lengths.astype(np.int64), 1) - 1
    return np.asarray(pages[np.stack([first, last], axis=1) // mmap.PAGESIZE] & 1, dtype=np.bool_)


def bytes_from_device() -> int | None:
    """Bytes read from storage for this process so far; None if the kernel does not report it."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("read_bytes:")), None)
    except OSError:
        return None
