"""The records that a process is decoding, in a small file that tells of them after a decoder has killed it."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dali_lmdb.disk import describe_os_error
from dali_lmdb.errors import one_line
from dali_lmdb.loaders.prefetch import Feed
from dali_lmdb.plan.batches import BatchPlan

__all__ = ["InFlightFile", "LeftOver", "read_left_over"]

_log = logging.getLogger("dali_lmdb")

_MAGIC = b"inflight"
_FINGERPRINT_BYTES = 48  # the longest one, of an image folder, has 39
_HEADER_BYTES = len(_MAGIC) + 8 + _FINGERPRINT_BYTES  # 8: the batch size
_MOST_BYTES = 64 << 20  # a larger file is not ours


class InFlightFile:
    """Keeps track of batches in a file; mapped, so that it costs two copies of a batch's record numbers.

    No ``fsync``: the kernel keeps what was stored when the process dies. It is no help after a power failure, and
    need not be. A file that cannot be written is no reason to stop: a warning says what is lost.

    The file: ``inflight``, the batch size as int64, the store's fingerprint, padded with zeros; then for each
    batch its epoch, its number of records and ``batch_size`` record indices, as int64.

    Args:
        path: the file, made anew.
        fingerprint: of the store.
        batch_size: the most records of a batch.
        num_batches: the most batches that DALI works on.
    """

    def __init__(self, path: Path, *, fingerprint: str, batch_size: int, num_batches: int) -> None:
        self._path = path
        header = _MAGIC + batch_size.to_bytes(8, "little") + fingerprint.encode().ljust(_FINGERPRINT_BYTES, b"\0")
        rows = np.zeros((1 + num_batches, 2 + batch_size), np.int64)
        try:
            path.unlink(missing_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            with open(descriptor, "r+b") as file:
                # Written, not only made longer: a store to a page for which the disk has no room is a SIGBUS.
                file.write(header + rows.tobytes())
                file.flush()
                self._map = mmap.mmap(descriptor, len(header) + rows.nbytes)
        except OSError as error:
            self._rows = rows
            _log.warning(
                "%s; training continues, but a record that kills the process will not be known",
                one_line(describe_os_error(path, "cannot be written", error)),
            )
        else:
            self._rows = np.frombuffer(self._map, np.int64, offset=len(header)).reshape(rows.shape)

    def set_given(self, plans: Iterable[BatchPlan]) -> None:
        """Note the batches that DALI works on, in order.

        At every instant, the file names all that are in the old list and in the new one: a batch moves to the
        place of one before it, and its own place is overwritten or cleared only then.
        """
        row = 1
        for row, plan in enumerate(plans, start=2):
            _write(self._rows[row - 1], plan)
        self._rows[row:, 1] = 0

    def noting(self, make_feed: Callable[..., Feed]) -> Callable[..., Feed]:
        """``make_feed``, with a note of the batch while it is made: Pillow may decode some of its images."""

        def noted(plan: BatchPlan, **options: Any) -> Feed:
            _write(self._rows[0], plan)
            try:
                return make_feed(plan, **options)
            finally:
                self._rows[0, 1] = 0

        return noted

    def remove(self) -> None:
        """Remove the file."""
        self._rows = np.zeros_like(self._rows)
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def _write(row: npt.NDArray[np.int64], plan: BatchPlan) -> None:
    row[2 : 2 + len(plan.records)] = plan.records
    row[0] = plan.epoch
    row[1] = len(plan.records)  # last: until then the row counts as it did


class LeftOver(NamedTuple):
    """What a process was decoding when it died."""

    fingerprint: str
    """Fingerprint of the store."""
    batches: list[tuple[int, list[int]]]
    """(epoch, record indices) of each batch."""

    @property
    def records(self) -> list[int]:
        """All records, each once, in order."""
        return sorted({record for _, records in self.batches for record in records})


def read_left_over(path: Path) -> LeftOver | None:
    """What a dead process left in its file; None if it is not a file of ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            data = file.read(_MOST_BYTES) if stat.S_ISREG(status.st_mode) else b""
    except OSError:
        return None
    batch_size = int.from_bytes(data[len(_MAGIC) : len(_MAGIC) + 8], "little")
    content = data[_HEADER_BYTES:]
    if not data.startswith(_MAGIC) or batch_size > len(content) or len(content) % (8 * (2 + batch_size)):
        return None
    rows = np.frombuffer(content, np.int64).reshape(-1, 2 + batch_size)
    fingerprint = data[len(_MAGIC) + 8 : _HEADER_BYTES].rstrip(b"\0").decode(errors="replace")
    return LeftOver(
        fingerprint,
        [(int(row[0]), row[2 : 2 + row[1]].tolist()) for row in rows if 0 < row[1] <= batch_size and row[0] >= 0],
    )
