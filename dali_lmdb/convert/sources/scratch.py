"""A temporary file for what listing a large source must keep, but not in memory."""

from __future__ import annotations

import os
import tempfile
import weakref
from typing import IO, Any

from dali_lmdb.errors import SourceError

__all__ = ["ScratchFile"]


class ScratchFile:
    """A file without a name in the temporary folder, made when first written to.

    It is gone with this object, or with the process, however that ends.

    Reading and writing raise:
        SourceError: the temporary folder is missing, full or broken.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._num_bytes = 0

    def append(self, data: Any) -> int:
        """Write bytes, or what has some (an array), at the end; returns where they start."""
        start = self._num_bytes
        view = memoryview(data).cast("B")
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  it stays open
                weakref.finalize(self, self._file.close)
            while len(view):
                num_written = self._file.write(view)
                self._num_bytes += num_written
                view = view[num_written:]
        except OSError as error:
            raise self._refused("written", error) from error
        return start

    def read(self, start: int, num_bytes: int) -> bytes:
        """Some of what was written, from ``start`` on."""
        assert self._file is not None
        try:
            data = os.pread(self._file.fileno(), num_bytes, start)
        except OSError as error:
            raise self._refused("read", error) from error
        assert len(data) == num_bytes
        return data

    def _refused(self, what: str, error: OSError) -> SourceError:
        return SourceError(
            f"{tempfile.tempdir or 'no temporary folder'}: the list of images, {self._num_bytes:,} bytes so far, "
            f"cannot be {what}: {error.strerror}; make room there, or set TMPDIR to a folder on another disk"
        )
