"""Write a store's LMDB file: records in order, then the index. The converter publishes it."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dali_lmdb.disk import describe_os_error
from dali_lmdb.errors import ConversionError, StoreDamagedError, StoreError, StoreFormatError
from dali_lmdb.store import layout
from dali_lmdb.store.checksum import crc32
from dali_lmdb.store.encoding import to_ipc
from dali_lmdb.store.fingerprint import Fingerprint
from dali_lmdb.store.meta import Meta
from dali_lmdb.store.pages import PageFile
from dali_lmdb.store.regular import check_own
from dali_lmdb.store.structure import check_structure
from dali_lmdb.store.values import read_values

__all__ = ["StoreWriter", "check_partial"]

# Address space only: the file grows by what is written. Each access of LMDB to the map also maps the pages around
# it, which add to RSS (0.2 GB per GB written) until a new size is set: that maps the file again.
_MAP_STEP_BYTES = 128 << 20
_PAGE_BYTES = 4096
_META_BYTES = 1 << 20  # limit for the metadata without class names
_CHARACTER_BYTES = 12  # most bytes in JSON for a character of a class name
_RECORD_BYTES = 18  # the least that a record takes in a file: its key, and a node's header and pointer
_PIECE_KEYS = (layout.index_key, layout.names_key)
_VALUE_BYTES = 128  # overhead counted for each value, so that tiny ones fill a transaction too
# A transaction's pages are on the heap until it ends. The heap reuses this size for the next transaction; more
# is returned to the kernel and faulted in again page by page, which is slower (1 GB: 0.7 s, 1.7 s with 64 MB).
_TRANSACTION_BYTES = 2 << 20
_FLUSH_BYTES = 64 << 20  # the last flush then takes 0.02 s; without those before it, 0.3 s


class StoreWriter:
    """Append records to an unpublished LMDB file, in transactions.

    Committed records survive the death of this process at any time, and a crash of the machine after ``sync`` or
    ``finish``. A thread flushes them to disk in the background.

    Args:
        path: the partial file; created if absent, continued if present.
        piece_records: number of records in a piece of index and names.
        transaction_bytes: approximate size of a transaction, which is on the heap until it ends.
        flush_bytes: start a flush to disk after writing this much.

    Attributes:
        num_records: records committed so far.

    Raises:
        ConversionError: not a file that this class wrote, or it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        piece_records: int = layout.PIECE_RECORDS,
        transaction_bytes: int = _TRANSACTION_BYTES,
        flush_bytes: int = _FLUSH_BYTES,
    ) -> None:
        self.path = Path(path)
        self._piece_records = piece_records
        self._transaction_bytes, self._flush_bytes = transaction_bytes, flush_bytes
        check_own(path, error=ConversionError)  # LMDB follows links, and waits for pipes
        self._needed_bytes = 0
        self.num_records = _count_records(self.path, piece_records)
        try:
            # The converter holds its own lock; LMDB's would leave a second file behind.
            self._env = lmdb.open(
                str(path),
                subdir=False,
                lock=False,
                sync=False,
                map_size=_MAP_STEP_BYTES,
                max_dbs=0,
                readahead=False,
            )
        except (lmdb.Error, OSError) as error:
            raise self._write_error(error) from error
        try:
            self._needed_bytes = os.path.getsize(path)
            # Not the environment's sync: that reads the map, which may be remapped meanwhile.
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            self._env.close()
            raise self._write_error(error) from error
        self._flusher = ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None
        self._unflushed_bytes = 0
        self._indexed = 0
        self._fingerprint = Fingerprint()
        self._index_crc32: list[int] = []
        self._names_crc32: list[int] = []

    def commit(self, values: list[bytes]) -> None:
        """Write values as the next records, in transactions of about ``transaction_bytes``.

        Raises:
            ConversionError: disk full, or another disk error; earlier commits remain.
        """
        self._reserve(sum(len(value) + 2 * _PAGE_BYTES for value in values))
        done = 0
        while done < len(values):
            index, num_bytes = self.num_records, 0
            with self._writing() as transaction:
                while done < len(values) and num_bytes < self._transaction_bytes:
                    transaction.put(layout.record_key(index), values[done], append=True)
                    num_bytes += len(values[done]) + _VALUE_BYTES
                    index, done = index + 1, done + 1
            self.num_records = index
            self._maybe_flush(num_bytes)

    def sync(self) -> None:
        """Wait until everything committed is on disk.

        Raises:
            ConversionError: the file cannot be written.
        """
        try:
            if self._flush is not None:
                self._flush.result()  # the kernel reports a disk error only once
            self._env.sync(True)
        except (lmdb.Error, OSError) as error:
            raise self._write_error(error) from error

    def record_extents(self, start: int, stop: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        """Offsets and lengths of committed records, as ``PageFile.record_extents``.

        An offset is 0 if writing the index may move the value: small values are in leaf pages, and the
        leaf of the last record is copied when keys are added after it.
        """
        pages = PageFile(self.path)  # opened again, since each transaction may reuse pages of the previous tree
        offsets, lengths = pages.record_extents(start, stop)
        self._extents = start, offsets, lengths
        leaf = pages.leaf_of(layout.record_key(max(0, self.num_records - 1)))
        offsets = offsets.copy()
        offsets[(offsets >= leaf.offset) & (offsets < leaf.offset + leaf.length)] = 0
        return offsets, lengths

    def checksums(self, start: int, stop: int) -> npt.NDArray[np.uint32]:
        """CRC-32 of the records start .. stop - 1, read back from the file; may be called in any thread.

        They must be among those last passed to ``record_extents``.

        Returns:
            uint32 of shape (stop - start,).
        """
        first, offsets, lengths = self._extents
        run = slice(start - first, stop - first)
        values = read_values(self.path, offsets[run], lengths[run])
        return np.array([_checksum(value) for value in values], dtype=np.uint32)

    def pieces(self) -> list[range]:
        """The records of each piece of index and names, for ``add_index``."""
        return layout.pieces_of(self.num_records, self._piece_records)

    def add_index(self, columns: dict[str, npt.NDArray[Any]], names: pa.Array) -> None:
        """Add index and names of the next piece, after all records; those of an interrupted writer are replaced.

        Args:
            columns: named as in ``layout.INDEX_SCHEMA``, each of shape (n,).
            names: n strings.

        Raises:
            ConversionError: the file cannot be written.
        """
        index = to_ipc(columns, layout.INDEX_SCHEMA)
        name_stream = to_ipc({"name": names}, layout.NAMES_SCHEMA)
        piece = len(self._index_crc32)
        self._reserve(index.size + name_stream.size + 16 * _PAGE_BYTES)
        with self._writing() as transaction:
            transaction.put(layout.index_key(piece), index)
            transaction.put(layout.names_key(piece), name_stream)
        self._maybe_flush(index.size + name_stream.size)
        self._index_crc32.append(crc32(index))
        self._names_crc32.append(crc32(name_stream))
        self._fingerprint.add(columns["label"], columns["crc32"])
        self._indexed += len(names)

    def finish(self, *, classes: list[str], made: dict[str, Any], shard: dict[str, Any] | None = None) -> Meta:
        """Add the metadata, after index and names of all records; the file is then a complete store.

        Args:
            classes, made, shard: see ``Meta``.

        Raises:
            ConversionError: the file cannot be written.
        """
        assert self._indexed == self.num_records, "add_index for all pieces comes first"
        self._reserve(_META_BYTES + _CHARACTER_BYTES * sum(map(len, classes)))
        with self._writing() as transaction:
            meta = Meta(
                num_records=self.num_records,
                classes=classes,
                fingerprint=self._fingerprint.hexdigest(),
                txnid=transaction.id(),
                piece_records=self._piece_records,
                index_crc32=self._index_crc32,
                names_crc32=self._names_crc32,
                made=made,
                shard=shard,
            )
            transaction.put(layout.META_KEY, meta.to_bytes())
        self.sync()
        return meta

    def close(self) -> None:
        """Release the file."""
        self._flusher.shutdown()
        os.close(self._descriptor)
        self._env.close()

    def _maybe_flush(self, num_bytes: int) -> None:
        self._unflushed_bytes += num_bytes
        if self._unflushed_bytes < self._flush_bytes or (self._flush is not None and not self._flush.done()):
            return
        try:
            if self._flush is not None:
                self._flush.result()
        except OSError as error:
            raise self._write_error(error) from error
        self._unflushed_bytes = 0
        self._flush = self._flusher.submit(os.fdatasync, self._descriptor)

    def _reserve(self, num_bytes: int) -> None:
        self._needed_bytes += num_bytes
        size = self._env.info()["map_size"]
        if self._needed_bytes > size:
            try:
                self._env.set_mapsize((self._needed_bytes // _MAP_STEP_BYTES + 1) * _MAP_STEP_BYTES)
            except lmdb.Error as error:
                raise self._write_error(error) from error

    def _write_error(self, error: BaseException) -> ConversionError:
        then = "then run the same command again to resume"
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY and limit < max(self._needed_bytes, 2 * _PAGE_BYTES):
            error = OSError(errno.EFBIG, os.strerror(errno.EFBIG))  # LMDB reports EIO or ENOSPC
        code = (error.errno if isinstance(error, OSError) else getattr(error, "code", 0)) or 0
        if code in (errno.EIO, errno.ENOSPC, 0):
            # LMDB reports a short write, as on a full disk, as EIO.
            disk = os.statvfs(self.path.parent)
            free_mb = disk.f_bavail * disk.f_frsize / 1e6
            return ConversionError(
                f"{self.path}: cannot be written: {error} ({free_mb:,.1f} MB free there); make room, raise the "
                f"limits (quota, ulimit -f) or check the disk, {then}"
            )
        if code > 0:
            cause = OSError(code, os.strerror(code))
            return ConversionError(describe_os_error(self.path, "cannot be written", cause, then=then))
        return ConversionError(f"{self.path}: cannot be written: {error}; use --restart")

    @contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        """Open a write transaction; its errors, including those at commit, become ``ConversionError``."""
        try:
            with self._env.begin(write=True) as transaction:
                yield transaction
        except (lmdb.Error, OSError) as error:
            raise self._write_error(error) from error

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checksum(value: bytes | OSError) -> int:
    if isinstance(value, OSError):
        raise value
    return crc32(value)


def check_partial(path: Path) -> None:
    """Check the structure of a partial file that another process left: liblmdb trusts it, so nothing may be wrong.

    Takes about 10 s for a million records.

    Raises:
        ConversionError: it is damaged, or not a file that ``StoreWriter`` writes.
    """
    with _damage_of_partial(path):
        if path.exists() and path.stat().st_size > 0:
            PageFile(path)  # bounds what the next check reserves
            problems = check_structure(path)
            if problems:
                raise StoreDamagedError(f"{problems[0]}{', and more' if len(problems) > 1 else ''}")


def _count_records(path: Path, piece_records: int) -> int:
    """Number of records in a partial file.

    Raises:
        ConversionError: it has other keys than records in order and pieces of an index, or a damaged page.
    """
    if not path.exists() or path.stat().st_size == 0:
        return 0
    with _damage_of_partial(path):
        pages = PageFile(path)
        reserved = {key for key, _ in pages.items(layout.RESERVED_KEY) if key >= layout.RESERVED_KEY}
        num_records = pages.entries - len(reserved)
        if not 0 <= num_records <= len(pages.data) // _RECORD_BYTES:
            raise StoreDamagedError(f"{pages.entries:,} keys in {len(pages.data):,} bytes")
        ranges = layout.pieces_of(num_records, piece_records)
        expected = {layout.META_KEY, *(key(n) for n in range(len(ranges)) for key in _PIECE_KEYS)}
        if not reserved <= expected:
            raise StoreDamagedError(f"an unexpected key {min(reserved - expected)!r}")
        for piece in ranges:
            pages.record_extents(piece.start, piece.stop)
        return num_records


@contextmanager
def _damage_of_partial(path: Path) -> Iterator[None]:
    try:
        yield
    except (StoreDamagedError, StoreFormatError) as error:
        raise ConversionError(f"{path}: the interrupted conversion is damaged ({error}); use --restart") from error
    except StoreError as error:
        raise ConversionError(f"{error}, then run the same command again to resume") from error
