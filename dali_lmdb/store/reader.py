"""Reading a published store file: zero-copy, from any thread, in any forked or spawned process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dali_lmdb.errors import StoreDamagedError, StoreFormatError
from dali_lmdb.store import layout
from dali_lmdb.store.base import Store
from dali_lmdb.store.pages import Extent, PageFile

__all__ = ["FileStore"]

# Checking the index takes 7 ms for 42 MB (1.28 million records, 2 cores), which opening can afford; a larger one
# is checked by `dali-lmdb verify` only.
_INDEX_CHECK_BYTES = 64 << 20


class FileStore(Store):
    """One published store file.

    Opening maps the file and reads no record. Nothing is copied: columns and records are views of
    the map, shared with every other process that has the file open, and keep the map alive after
    ``close``. A store pickles as its path.

    Args:
        path: the LMDB file.

    Raises:
        StoreNotFoundError, StoreFormatError, StoreDamagedError: see ``dali_lmdb.errors``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        pages = PageFile(path)
        meta_extent = pages.find(layout.META_KEY)
        index_extent = pages.find(layout.INDEX_KEY)
        if meta_extent is None or index_extent is None:
            raise StoreFormatError(
                f"{path}: an LMDB file, but not a finished store of dali_lmdb; "
                "make one with: dali-lmdb convert SOURCE STORE"
            )
        self.meta = layout.Meta.from_bytes(bytes(pages.view(meta_extent)), path=path)
        index = pages.view(index_extent)
        if len(index) <= _INDEX_CHECK_BYTES and layout.index_checksums(index) != self.meta.index_crc32:
            raise StoreDamagedError(f"{path}: damaged: __index__ has a wrong checksum; convert it again")
        self._columns = layout.index_from_ipc(index, num_records=self.meta.num_records, path=path)
        self._pages = pages
        self._data = pages.data
        self._names: pa.Array | None = None
        self._offsets: npt.NDArray[np.uint64] = self._columns["file_offset"]
        if pages.txnid != self.meta.txnid or self._moved():
            # Rewritten after it was published, for instance by a compacting copy.
            self._offsets, _ = pages.record_extents(len(self))

    def __len__(self) -> int:
        return self.meta.num_records

    @property
    def classes(self) -> list[str]:
        return self.meta.classes

    @property
    def fingerprint(self) -> str:
        return self.meta.fingerprint

    def column(self, name: str) -> npt.NDArray[Any]:
        return self._columns[name]

    def gather(self, name: str, records: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        return self._columns[name][records]

    def extents(self, records: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        """Where the bytes of some records lie in the file.

        Args:
            records: record indices, int64 of shape (n,).

        Returns:
            (offsets, lengths): uint64 and uint32 of shape (n,), in bytes, inside the file.

        Raises:
            IndexError: no such record.
            StoreDamagedError: the index points outside the file.
        """
        if len(records) and not 0 <= records.min() <= records.max() < len(self):
            raise IndexError(
                f"{self.path}: records {records.min()} to {records.max()}, expected 0 to {len(self) - 1}"
            )
        offsets = self._offsets[records]
        lengths = self._columns["num_bytes"][records]
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
        return self.names()[self._checked(index)].as_py()

    def names(self) -> pa.Array:
        """All names, an Arrow array of strings on the map.

        Raises:
            StoreDamagedError: the names were altered.
        """
        if self._names is None:
            extent = self._pages.find(layout.NAMES_KEY)
            if extent is None:
                raise StoreDamagedError(f"{self.path}: damaged: no __names__; convert it again")
            self._names = layout.names_from_ipc(
                self._pages.view(extent),
                num_records=len(self),
                crc32=self.meta.names_crc32,
                path=self.path,
            )
        return self._names

    def _moved(self) -> bool:
        """Whether the first or last record is not where the index says."""
        ends = (0, len(self) - 1) if len(self) else ()
        return any(self._offsets[i] not in (0, self._find(i).offset) for i in ends)

    def _find(self, index: int) -> Extent:
        extent = self._pages.find(layout.record_key(index))
        if extent is None or extent.length != int(self._columns["num_bytes"][index]):
            raise StoreDamagedError(f"{self.path}: damaged: record {index} is missing; convert it again")
        return extent
