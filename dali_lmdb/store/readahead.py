"""Filling the page cache ahead: exact byte ranges, asked for early, waited for in a thread of the loader.

The kernel's own readahead guesses that a file is read in order; in random order it reads many times what is
used. Here each record's range is announced with ``posix_fadvise(WILLNEED)`` while earlier batches are still
at work, so that the device has many requests at once, and is waited for just before the batch is handed
over. As long as everything is in memory anyway, that costs one system call a record and nothing is announced.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dali_lmdb.store.base import Store

__all__ = ["Readahead"]

_COLD = (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_STAY_COLD = 64
"""Batches that must be found in memory one after the other before announcing stops."""
# Linux only; elsewhere every record counts as cold, which is right and only slower.
_NOWAIT = getattr(os, "RWF_NOWAIT", None)


class Readahead:
    """Reads the records of one store into the page cache. For one thread at a time.

    Args:
        store: a store whose bytes lie in files (``Store.byte_ranges``); with another nothing is done.

    Attributes:
        cold: whether announcing is worth while: something was missing lately.
        bytes_read: of records that were not in memory when their batch was due.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._files: dict[Path, int] = {}
        self._scratch = bytearray(1 << 20)
        self._probe = bytearray(1)
        self._warm_batches = 0
        self.cold = False
        self.bytes_read = 0

    def announce(self, records: npt.NDArray[np.int64]) -> None:
        """Ask the kernel to read some records; returns at once."""
        for path, offsets, lengths in self._store.byte_ranges(records):
            descriptor = self._open(path)
            for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
                os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def wait(self, records: npt.NDArray[np.int64]) -> None:
        """Return when some records are in memory."""
        missing = [
            (descriptor, offset, length)
            for path, offsets, lengths in self._store.byte_ranges(records)
            for descriptor in [self._open(path)]
            for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True)
            if not self._in_memory(descriptor, offset, length)
        ]
        if missing and not self.cold:  # the first cold batch was not announced
            for descriptor, offset, length in missing:
                os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
        for descriptor, offset, length in missing:
            self._read(descriptor, offset, length)
            self.bytes_read += length
        self._warm_batches = 0 if missing else self._warm_batches + 1
        self.cold = self._warm_batches < _STAY_COLD if missing or self.cold else False

    def close(self) -> None:
        """Let go of the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
            # A read that misses then fetches just its own range.
            os.posix_fadvise(self._files[path], 0, 0, os.POSIX_FADV_RANDOM)
        return self._files[path]

    def _in_memory(self, descriptor: int, offset: int, length: int) -> bool:
        """Whether the last page is in memory: ranges are read as a whole and in order."""
        if _NOWAIT is None or length == 0:
            return length == 0
        try:
            os.preadv(descriptor, [self._probe], offset + length - 1, _NOWAIT)
        except OSError as error:
            if error.errno in _COLD:
                return False
            raise
        return True

    def _read(self, descriptor: int, offset: int, length: int) -> None:
        """Wait for a range by reading it; unlike touching a map, that lets other threads run."""
        view = memoryview(self._scratch)
        while length > 0:
            count = os.preadv(descriptor, [view[: min(length, len(view))]], offset)
            if count == 0:
                return  # behind the end of the file; reading the record will say so
            offset, length = offset + count, length - count
