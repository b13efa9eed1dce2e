"""Reading a published store file: zero-copy, from any thread, in any forked or spawned process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dali_lmdb.errors import StoreDamagedError, StoreFormatError
from dali_lmdb.store import layout
from dali_lmdb.store.base import Store
from dali_lmdb.store.index import Index, Names
from dali_lmdb.store.meta import Meta
from dali_lmdb.store.pages import Extent, PageFile

__all__ = ["FileStore"]


class FileStore(Store):
    """One published store file.

    Opening maps the file and reads no record. Records, and columns stored in one piece, are views of the
    map, shared with every other process that has the file open, and keep the map alive after ``close``.
    A store pickles as its path.

    Args:
        path: the LMDB file.

    Raises:
        StoreNotFoundError, StoreFormatError, StoreDamagedError: see ``dali_lmdb.errors``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        pages = PageFile(path)
        meta = pages.find(layout.META_KEY)
        if meta is None or pages.find(layout.index_key(0)) is None:
            raise StoreFormatError(f"{path}: {_what_else(pages)}")
        self.meta = Meta.from_bytes(bytes(pages.view(meta)), path=path)
        self._index = Index(pages, self.meta)
        self._names = Names(pages, self.meta)
        self._pages = pages
        self._data = pages.data
        self._found_offsets: npt.NDArray[np.uint64] | None = None
        if pages.txnid != self.meta.txnid or self._moved():
            # Rewritten since it was published, for instance by a compacting copy: do not trust the index.
            self._found_offsets, _ = pages.record_extents(0, len(self))

    def __len__(self) -> int:
        return self.meta.num_records

    @property
    def classes(self) -> list[str]:
        return self.meta.classes

    @property
    def fingerprint(self) -> str:
        return self.meta.fingerprint

    def column(self, name: str) -> npt.NDArray[Any]:
        return self._index.column(name)

    def column_parts(self, name: str) -> Iterator[npt.NDArray[Any]]:
        return self._index.parts(name)

    def gather(self, name: str, records: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        return self._index.gather(name, records)

    def extents(self, records: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        """Locate the bytes of some records in the file.

        Args:
            records: record indices, int64 of shape (n,).

        Returns:
            (offsets, lengths): uint64 and uint32 of shape (n,), in bytes, inside the file.

        Raises:
            IndexError: no such record.
            StoreDamagedError: the index points outside the file.
        """
        lengths = self.gather("num_bytes", records)
        if self._found_offsets is None:
            offsets = self.gather("file_offset", records)
        else:
            offsets = self._found_offsets[records]
        for position in np.flatnonzero(offsets == 0):
            offsets[position] = self._find(int(records[position])).offset
        size = len(self._data)
        if ((offsets > size) | (lengths > size - np.minimum(offsets, size))).any():
            raise StoreDamagedError(f"{self.path}: damaged: the index points outside the file")
        return offsets, lengths

    def byte_ranges(
        self, records: npt.NDArray[np.int64]
    ) -> list[tuple[Path, npt.NDArray[np.uint64], npt.NDArray[np.uint32]]]:
        return [(self.path, *self.extents(records))]

    def arrays(self, records: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
        offsets, lengths = self.extents(records)
        data = self._data
        ends = (offsets + lengths).tolist()
        return [data[start:end] for start, end in zip(offsets.tolist(), ends, strict=True)]

    def name(self, index: int) -> str:
        return self._names.one(self._checked_index(index))

    def names(self) -> pa.ChunkedArray:
        return self._names.all()

    def release_pages(self) -> None:
        self._pages.release_pages()

    def _moved(self) -> bool:
        """Return whether the first or last record is not where the index says."""
        ends = [0, len(self) - 1] if len(self) else []
        offsets = self.gather("file_offset", np.array(ends, np.int64)).tolist()
        return any(offset not in (0, self._find(end).offset) for end, offset in zip(ends, offsets, strict=True))

    def _find(self, index: int) -> Extent:
        extent = self._pages.find(layout.record_key(index))
        if extent is None or extent.length != int(self.gather("num_bytes", np.array([index]))[0]):
            raise StoreDamagedError(f"{self.path}: damaged: record {index} is missing; convert it again")
        return extent


def _what_else(pages: PageFile) -> str:
    """Describe an LMDB file that is not a store, and the remedy."""
    if pages.find(layout.record_key(0)) is not None:
        return "an unfinished store; run its conversion again to resume"
    return (
        f"an LMDB file of another layout, with {pages.describe()}; expected {layout.META_KEY.decode()} as in a "
        "store, or __len__ or __keys__ as in a classic database; unpack its images into class folders and convert "
        "those"
    )
