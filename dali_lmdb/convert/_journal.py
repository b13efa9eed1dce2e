"""The journal of a conversion: one row for each image that was read, whether stored or refused.

The store's index is built from it at the end, and an interrupted conversion resumes from it. Rows are written
before the records they describe, so the journal may be ahead of the partial file, never behind; on resuming it is
truncated to the records in that file.

File: frames of ``length u32 | crc32 u32 | payload``. The first payload is JSON: the version of this format, and
what is converted and how. The others are Arrow IPC streams of ``ROW_SCHEMA``, one for each commit, or JSON
``{"rows": n}``: only the first n rows of the stream before it count. Truncating thus never removes the row of a
written record, not even for an instant.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import struct
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dali_lmdb.disk import os_errors
from dali_lmdb.errors import ConversionError
from dali_lmdb.store.checksum import crc32
from dali_lmdb.store.encoding import ARROW_ERRORS, read_batch
from dali_lmdb.store.layout import INDEX_SCHEMA
from dali_lmdb.store.regular import open_own

__all__ = ["INDEX_ROW_COLUMNS", "RESUME", "ROW_SCHEMA", "Journal", "Row", "batch_of", "read_header"]

INDEX_ROW_COLUMNS = [name for name in INDEX_SCHEMA.names if name != "file_offset"]
"""Index columns that are known when a record is written."""

ROW_SCHEMA = pa.schema(
    [
        pa.field("name", pa.large_string()),
        *(INDEX_SCHEMA.field(name) for name in INDEX_ROW_COLUMNS),
        pa.field("stamp", pa.int64()),  # of the source's image, see sources.base.Item
        pa.field("reason", pa.large_string()),  # why it is not in the store; null if it is
    ]
)

_NEVER_NULL = [name for name in ROW_SCHEMA.names if name != "reason"]


class Row(NamedTuple):
    """One image of the source, stored or refused; the fields are those of ``ROW_SCHEMA``."""

    name: str
    label: int
    height: int
    width: int
    num_bytes: int
    crc32: int
    kind: int
    change: int
    stamp: int
    """``sources.base.Item.stamp``."""
    reason: str | None
    """Why the image is not stored; None if it is."""


_VERSION = 1
_FRAME = struct.Struct("<II")
RESUME = "then run the same command again to resume"


class Journal:
    """The open and locked journal of one conversion; the lock keeps other converters away from its target.

    Args:
        path: the file; created if absent.

    Attributes:
        header: what is converted and how; None in a new journal, and in one that cannot be continued.
        fault: why it cannot be continued, or None.

    Raises:
        ConversionError: another converter is writing the target, or the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        exists = os.path.lexists(path)
        what = "left by an interrupted conversion, cannot be continued" if exists else "cannot be created"
        with os_errors(path, what, ConversionError):
            self._file = _open_locked(self.path)
        try:
            self.header, self.fault, self._body = _header_of(self._file)
        except BaseException:
            self._file.close()
            raise

    def start(self, header: dict[str, Any]) -> None:
        """Start over: truncate the file and write the first frame."""
        self._cut(0)
        self._body = self._write(json.dumps({"version": _VERSION, **header}, ensure_ascii=True).encode())
        self.header, self.fault = header, None

    def append(self, rows: pa.RecordBatch) -> None:
        """Append rows; they survive the death of this process.

        Raises:
            ConversionError: the file cannot be written.
        """
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, ROW_SCHEMA) as stream:
            stream.write_batch(rows)
        self._write(sink.getvalue())

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order, one batch for each commit.

        Raises:
            ConversionError: the journal is damaged.
        """
        for batch, _ in self._batches():
            yield batch

    def cut_to(self, num_records: int) -> int:
        """Drop the rows of records that did not reach the partial file.

        Args:
            num_records: records in the partial file.

        Returns:
            The number of rows kept, bad images included.

        Raises:
            ConversionError: the journal and the partial file do not belong together.
        """
        kept_rows = kept_records = part_rows = 0
        kept_end = self._body
        for batch, end in self._batches():
            good = batch.column("reason").null_count
            if kept_records + good > num_records:
                part_rows = _rows_of_records(batch, num_records - kept_records)
                kept_rows, kept_records = kept_rows + part_rows, num_records
                kept_end = end if part_rows else kept_end
                break
            kept_rows, kept_records, kept_end = kept_rows + batch.num_rows, kept_records + good, end
        if kept_records != num_records:
            raise ConversionError(
                f"{self.path}: describes {kept_records} of the {num_records} records in the partial file; use "
                "--restart"
            )
        self._cut(kept_end)
        if part_rows:
            self._write(json.dumps({"rows": part_rows}).encode())
        return kept_rows

    def close(self) -> None:
        """Release the lock; remove the file if the conversion never started."""
        if self.header is None and self.fault is None:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _batches(self) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Yield the rows of each commit and the position after its frames."""
        last: tuple[pa.RecordBatch, int] | None = None
        for payload, end in islice(_frames(self._file), 1, None):
            if last is not None and payload.startswith(b"{"):  # {"rows": n} shortens the batch before it
                last = last[0].slice(0, self._rows_kept(payload, last[0].num_rows)), end
                continue
            if last is not None:
                yield last
            last = self._batch(payload), end
        if last is not None:
            yield last

    def _batch(self, payload: bytes) -> pa.RecordBatch:
        """Decode the rows of one commit.

        Raises:
            ConversionError: they are not what ``append`` writes.
        """
        try:
            batch = read_batch(pa.py_buffer(payload))
        except ARROW_ERRORS:
            raise self._damaged() from None
        if batch.schema != ROW_SCHEMA or any(batch.column(name).null_count for name in _NEVER_NULL):
            raise self._damaged()
        return batch

    def _rows_kept(self, payload: bytes, num_rows: int) -> int:
        """Decode ``{"rows": n}``, which follows ``num_rows`` rows."""
        match = re.fullmatch(rb'\{"rows": (\d{1,18})\}', payload)
        if match is None or not 0 < int(match[1]) <= num_rows:
            raise self._damaged()
        return int(match[1])

    def _damaged(self) -> ConversionError:
        return ConversionError(f"{self.path}: damaged; use --restart to start over")

    def _write(self, payload: Any) -> int:
        frame = memoryview(_FRAME.pack(len(payload), crc32(payload)) + bytes(payload))
        with os_errors(self.path, "cannot be written", ConversionError, then=RESUME):
            while frame:  # a write may be short
                frame = frame[self._file.write(frame) :]
        return self._file.tell()

    def _cut(self, end: int) -> None:
        with os_errors(self.path, "cannot be written", ConversionError, then=RESUME):
            self._file.truncate(end)
            self._file.seek(end)


def read_header(path: Path) -> dict[str, Any] | None:
    """Read the header of a journal, locked or not; None if there is none that can be continued."""
    try:
        with io.FileIO(open_own(path, os.O_RDONLY, error=ConversionError)) as file:
            return _header_of(file).header
    except FileNotFoundError:
        return None


class _Header(NamedTuple):
    header: dict[str, Any] | None
    fault: str | None
    end: int


def _header_of(file: io.FileIO) -> _Header:
    """Read the first frame: see ``Journal.header`` and ``Journal.fault``."""
    payload, end = next(_frames(file), (b"", 0))
    if not payload and os.fstat(file.fileno()).st_size == 0:
        return _Header(None, None, 0)
    try:
        header = json.loads(payload)
        version = header.pop("version", None)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return _Header(None, "damaged, or not the journal of a conversion", 0)
    if version != _VERSION:
        return _Header(None, f"journal version {version!r}, this dali_lmdb continues {_VERSION}", 0)
    return _Header(header, None, end)


def _frames(file: io.FileIO) -> Iterator[tuple[bytes, int]]:
    """Yield (payload, end of the frame) of each whole frame; a torn frame ends the file."""
    position = 0
    while True:
        file.seek(position)
        head = file.read(_FRAME.size)
        if len(head) < _FRAME.size:
            return
        length, checksum = _FRAME.unpack(head)
        # A length of 0 is that of zeros, which a power cut may leave. Reading allocates memory for all of it.
        if length == 0 or length > os.fstat(file.fileno()).st_size - file.tell():
            return
        payload = file.read(length)
        if len(payload) < length or crc32(payload) != checksum:
            return
        position += _FRAME.size + length
        yield payload, position


def _open_locked(path: Path) -> io.FileIO:
    """Open a journal, created if absent, and lock it; never wait.

    Raises:
        ConversionError: another converter has locked it, or it is not a file.
        OSError: it cannot be opened or locked.
    """
    while True:
        # Unbuffered, so that closing it writes nothing.
        file = io.FileIO(open_own(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, error=ConversionError), "a+")
        try:
            with os_errors(path, "cannot be locked", ConversionError):
                _lock(file, path)
            if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                return file
        except FileNotFoundError:
            pass  # a converter that ended meanwhile has removed it, so the lock guards nothing
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: io.FileIO, path: Path) -> None:
    """Lock a journal.

    Raises:
        ConversionError: another converter has.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConversionError(f"{path}: another converter is writing this target; let it finish") from None


def batch_of(rows: Sequence[Row]) -> pa.RecordBatch:
    """Convert rows, at least one, to an Arrow batch."""
    columns = dict(zip(Row._fields, zip(*rows, strict=True), strict=True))
    return pa.RecordBatch.from_arrays(
        [pa.array(columns[field.name], type=field.type) for field in ROW_SCHEMA], schema=ROW_SCHEMA
    )


def _rows_of_records(batch: pa.RecordBatch, count: int) -> int:
    """Number of leading rows of a batch that hold its first ``count`` records."""
    if count == 0:
        return 0
    places = np.flatnonzero(batch.column("reason").is_null().to_numpy(zero_copy_only=False))
    return int(places[count - 1]) + 1
