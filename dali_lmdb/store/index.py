"""Index and names of one store file, read in the pieces in which they were written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dali_lmdb.errors import StoreDamagedError
from dali_lmdb.store import layout
from dali_lmdb.store.checksum import crc32
from dali_lmdb.store.encoding import columns_of, from_ipc
from dali_lmdb.store.meta import Meta
from dali_lmdb.store.pages import PageFile

__all__ = ["Index", "Names"]

# Checking the index takes 5 ms for 38 MB (1.28 million records), which opening can afford; a larger one is checked
# by `dali-lmdb verify` only.
_MAX_CHECKED_BYTES = 64 << 20


class Index:
    """The columns of ``layout.INDEX_SCHEMA``, as views of the memory map.

    Args:
        pages, meta: the file's pages and metadata.
        check: validate checksums; by default only if the index is at most 64 MiB.

    Raises:
        StoreDamagedError: a piece is missing or altered.
    """

    def __init__(self, pages: PageFile, meta: Meta, *, check: bool | None = None) -> None:
        self._pages, self._meta = pages, meta
        ranges = meta.pieces()
        views = [_view(pages, layout.index_key(piece)) for piece in range(len(ranges))]
        if check is None:
            check = sum(map(len, views)) <= _MAX_CHECKED_BYTES
        if check and list(map(crc32, views)) != meta.index_crc32:
            raise StoreDamagedError(f"{pages.path}: damaged: __index__ has a wrong checksum; convert it again")
        self._pieces = []
        for view, records in zip(views, ranges, strict=True):
            batch = from_ipc(view, layout.INDEX_SCHEMA, num_records=len(records))
            piece = {} if batch is None else columns_of(batch)
            if not piece or not all(_lies_in(pages.data, column) for column in piece.values()):
                raise StoreDamagedError(f"{pages.path}: damaged: __index__ is not readable; convert it again")
            self._pieces.append(piece)
        pages.release_pages()
        # Offset of each column of each piece in the file, in bytes.
        self._starts = {
            name: np.array([_address(piece[name]) - _address(pages.data) for piece in self._pieces])
            for name in layout.INDEX_SCHEMA.names
        }

    def parts(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """Yield a column piece by piece; pages are unmapped after use, to keep RSS low."""
        for piece in self._pieces:
            yield piece[name]
            self._pages.release_pages()

    def column(self, name: str) -> npt.NDArray[Any]:
        """A whole column; a copy if there are several pieces."""
        if len(self._pieces) == 1:
            return self._pieces[0][name]
        return np.concatenate([piece[name] for piece in self._pieces])

    def gather(self, name: str, records: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """A column's values for some records, of shape (len(records),).

        Raises:
            IndexError: no such record.
        """
        if len(records) and not 0 <= records.min() <= records.max() < self._meta.num_records:
            raise IndexError(
                f"{self._pages.path}: records {records.min()} to {records.max()}, expected 0 to "
                f"{self._meta.num_records - 1}"
            )
        if len(self._pieces) == 1:
            return self._pieces[0][name][records]
        piece, row = np.divmod(records, self._meta.piece_records)
        dtype = self._pieces[0][name].dtype
        first = self._starts[name][piece] + row * dtype.itemsize
        # Byte by byte, since a piece may start at any offset in the file.
        values: npt.NDArray[Any] = self._pages.data[first[:, None] + np.arange(dtype.itemsize)].view(dtype)[:, 0]
        return values


class Names:
    """The records' names, each piece read on first use.

    Args:
        pages, meta: the file's pages and metadata.
    """

    def __init__(self, pages: PageFile, meta: Meta) -> None:
        self._pages, self._meta = pages, meta
        self._ranges = meta.pieces()
        self._pieces: dict[int, pa.Array] = {}

    def one(self, record: int) -> str:
        """The name of a record.

        Raises:
            StoreDamagedError: the piece that contains it was altered.
        """
        piece, row = divmod(record, self._meta.piece_records)
        name: str = self._piece(piece)[row].as_py()
        return name

    def all(self) -> pa.ChunkedArray:
        """All names, as strings in the memory map.

        Raises:
            StoreDamagedError: they were altered.
        """
        pieces = [self._piece(piece) for piece in range(len(self._ranges))]
        return pa.chunked_array(pieces, pa.large_string())

    def _piece(self, piece: int) -> pa.Array:
        if piece not in self._pieces:
            view = _view(self._pages, layout.names_key(piece))
            batch = None
            if crc32(view) == self._meta.names_crc32[piece]:
                batch = from_ipc(view, layout.NAMES_SCHEMA, num_records=len(self._ranges[piece]))
            if batch is None:
                raise StoreDamagedError(
                    f"{self._pages.path}: damaged: __names__ is not readable; convert it again"
                )
            self._pieces[piece] = batch.column(0)
        return self._pieces[piece]


def _view(pages: PageFile, key: bytes) -> memoryview:
    extent = pages.find(key)
    if extent is None:
        raise StoreDamagedError(f"{pages.path}: damaged: no {key.decode()}; convert it again")
    return pages.view(extent)


def _lies_in(data: npt.NDArray[np.uint8], column: npt.NDArray[Any]) -> bool:
    """Return whether a column is a view of the map; Arrow copies compressed or byte-swapped columns."""
    start = _address(column) - _address(data)
    return column.nbytes == 0 or 0 <= start <= len(data) - column.nbytes


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
