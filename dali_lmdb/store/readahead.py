"""Readahead of exact byte ranges into the page cache: requested early, awaited in a thread of the loader.

The kernel's own readahead assumes sequential access; in random order it reads many times what is used. Here
each record's range is announced with ``posix_fadvise(WILLNEED)`` while earlier batches are still being
processed, so that the device has many requests at once, and is waited for just before the batch is handed
over. While everything is in the page cache, that costs one system call per record and nothing is announced.

Announcing keeps the kernel busy for 25 µs per record of 110 kB, since it allocates pages, and for longer if the
device's queue is full. So a few threads do it, started when the first record is missing.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dali_lmdb.disk import describe_os_error
from dali_lmdb.errors import StoreError
from dali_lmdb.store.base import Store

__all__ = ["Readahead"]

_WARM_BATCHES_TO_STOP = 64
"""Number of consecutive batches that must be in the page cache before announcing stops."""
_ANNOUNCERS = 4
_RANGES_AT_ONCE = 16
"""Number of ranges announced by one task of a thread."""
_PIECE_BYTES = 128 << 10
"""Size that one call is sure to announce: Linux truncates it to the greater of the device's read_ahead_kb, by
default 128, and max_sectors_kb (force_page_cache_ra in mm/readahead.c)."""

Range = tuple[int, int, int]
"""File descriptor, first byte, number of bytes."""


class Readahead:
    """Reads the records of one store into the page cache. Not thread-safe.

    Args:
        store: a store that knows its ``byte_ranges``; for any other, nothing is done.

    Attributes:
        cold: whether announcing is worthwhile: a record was missing recently.
        bytes_read: size of the records that were missing from the page cache when their batch was needed.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._files: dict[Path, int] = {}
        self._scratch = memoryview(bytearray(1 << 20))
        self._probe = [bytearray(1)]
        self._announcers: ThreadPoolExecutor | None = None
        self._warm_batches = 0
        self.cold = False
        self.bytes_read = 0

    def announce(self, records: npt.NDArray[np.int64]) -> None:
        """Ask the kernel to read some records, without waiting."""
        if self._announcers is None:
            self._announcers = ThreadPoolExecutor(_ANNOUNCERS, thread_name_prefix="dali_lmdb announcer")
        ranges = self._ranges(records)
        for first in range(0, len(ranges), _RANGES_AT_ONCE):
            self._announcers.submit(_ask_for, ranges[first : first + _RANGES_AT_ONCE])

    def wait(self, records: npt.NDArray[np.int64]) -> None:
        """Wait until some records are in the page cache."""
        ranges = self._ranges(records)
        missing = [one for one in ranges if not self._in_memory(one)]
        self.bytes_read += sum(length for _, _, length in missing)
        if missing and not self.cold:
            # The first cold batch was not announced, so all of it is read: probing a page may start reading it
            # (Linux 6), so that a record seems to be cached when only that page is.
            self.announce(records)
            missing = ranges
        for one in missing:
            self._read(one)
        self._warm_batches = 0 if missing else self._warm_batches + 1
        self.cold = self._warm_batches < _WARM_BATCHES_TO_STOP if missing or self.cold else False

    def close(self) -> None:
        """Stop the threads and close the files."""
        if self._announcers is not None:
            self._announcers.shutdown(cancel_futures=True)
            self._announcers = None
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def _open(self, path: Path) -> int:
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise StoreError(describe_os_error(path, "cannot be read ahead", error)) from error
            # So that a cache miss reads only its own range.
            os.posix_fadvise(self._files[path], 0, 0, os.POSIX_FADV_RANDOM)
        return self._files[path]

    def _ranges(self, records: npt.NDArray[np.int64]) -> list[Range]:
        return [
            (descriptor, offset, length)
            for path, offsets, lengths in self._store.byte_ranges(records)
            for descriptor in [self._open(path)]
            for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True)
        ]

    def _in_memory(self, range_: Range) -> bool:
        """Return whether a range's last page is in the page cache: ranges are read completely and in order."""
        descriptor, offset, length = range_
        if length == 0:
            return True
        try:
            os.preadv(descriptor, self._probe, offset + length - 1, os.RWF_NOWAIT)
        except OSError:  # EAGAIN: it is not; any other error recurs when it is read
            return False
        return True

    def _read(self, range_: Range) -> None:
        """Wait for a range by reading it, which releases the GIL, unlike a page fault."""
        descriptor, offset, length = range_
        while length > 0:
            try:
                count = os.preadv(descriptor, [self._scratch[:length]], offset)
            except OSError as error:
                path = next(path for path, opened in self._files.items() if opened == descriptor)
                raise StoreError(describe_os_error(path, "cannot be read ahead", error)) from error
            if count == 0:
                return  # past the end of the file; reading the record reports that
            offset, length = offset + count, length - count


def _ask_for(ranges: list[Range]) -> None:
    for descriptor, offset, length in ranges:
        for start in range(offset, offset + length, _PIECE_BYTES):
            piece = min(_PIECE_BYTES, offset + length - start)
            os.posix_fadvise(descriptor, start, piece, os.POSIX_FADV_WILLNEED)
