"""The interface of all stores, whatever their file format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dali_lmdb.errors import RecordError, StoreDamagedError, StoreError, one_line
from dali_lmdb.store.checksum import crc32
from dali_lmdb.store.values import read_values

__all__ = ["Store"]


class Store(ABC):
    """Read-only records, each the bytes of an image file with a label; opened by ``open_store``.

    Attributes:
        path: the path that was opened, for messages.
    """

    path: Path

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Class names, indexed by label."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of the data set: records, labels and their order."""

    @abstractmethod
    def column(self, name: str) -> npt.NDArray[Any]:
        """A whole index column, of shape (len(self),): see ``layout.INDEX_SCHEMA``.

        A read-only view of the file if the column is stored in one piece, otherwise a copy; ``gather`` and
        ``column_parts`` never copy a whole column.
        """

    def column_parts(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """Yield an index column in parts of shape (n,), in record order."""
        yield self.column(name)

    @abstractmethod
    def gather(self, name: str, records: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """An index column's values for some records: shape (len(records),), the column's dtype."""

    @abstractmethod
    def arrays(self, records: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
        """The bytes of some records, each read-only, uint8 of shape (num_bytes,).

        Raises:
            StoreDamagedError: the file does not match its index.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """The record's path inside its source, ``class/file``.

        Raises:
            IndexError: no such record.
        """

    def names(self) -> pa.ChunkedArray:
        """Names of all records, strings.

        Raises:
            StoreDamagedError: the names were altered.
        """
        return pa.chunked_array([[self.name(index) for index in range(len(self))]], pa.large_string())

    def byte_ranges(
        self, records: npt.NDArray[np.int64]
    ) -> list[tuple[Path, npt.NDArray[np.uint64], npt.NDArray[np.uint32]]]:
        """Locate the bytes of some records, for reading ahead.

        Returns:
            (file, offsets, lengths) for each file involved, in bytes; empty if unknown.
        """
        return []

    @cached_property
    def labels(self) -> npt.NDArray[np.int32]:
        """Label of every record, int32 of shape (len(self),)."""
        return self.column("label")

    def read(self, index: int) -> memoryview:
        """The bytes of one record, read-only.

        Args:
            index: in [0, len(self)).

        Raises:
            IndexError: no such record.
            StoreDamagedError: the file does not match its index.
        """
        return self.arrays(np.array([self._checked_index(index)]))[0].data

    def copy(self, index: int) -> bytes:
        """A copy of one record's bytes, see ``copies``.

        Args:
            index: in [0, len(self)).

        Raises:
            IndexError: no such record.
        """
        return next(self.copies(range(self._checked_index(index), index + 1)))

    def copies(self, records: range) -> Iterator[bytes]:
        """Yield the bytes of consecutive records, read from the file rather than the map, to keep RSS low.

        Raises:
            StoreDamagedError: the file does not match its index, or cannot be read.
            RecordError: in a classic database, a value is not ``(image, label)``.
        """
        record = records.start
        for path, offsets, lengths in self.byte_ranges(np.arange(records.start, records.stop)):
            for value in read_values(path, offsets, lengths):
                if isinstance(value, OSError):
                    raise StoreDamagedError(
                        f"{self.where(record)}: cannot be read: {value.strerror}; check the disk"
                    ) from value
                yield value
                record += 1

    def checked_copies(self, records: range) -> Iterator[bytes]:
        """Yield what ``copies`` does, each record compared with its checksum.

        Raises:
            RecordError: the bytes differ from those that were written.
        """
        checksums = self.gather("crc32", np.arange(records.start, records.stop)).tolist()
        for record, checksum, data in zip(records, checksums, self.copies(records), strict=True):
            if crc32(data) != checksum:
                raise RecordError(
                    f"{self.where(record)}: wrong checksum; see what else is damaged with: "
                    f"dali-lmdb verify {self.path}"
                )
            yield data

    def where(self, index: int) -> str:
        """Name a record for the start of an error message: ``STORE: record 41 (n01440764/x.JPEG)``."""
        try:
            return one_line(f"{self.path}: record {index} ({self.name(index)})")
        except StoreError:
            return one_line(f"{self.path}: record {index}")

    def check(self, index: int) -> None:
        """Compare one record with its checksum.

        Raises:
            IndexError: no such record.
            RecordError: the bytes differ from those that were written.
        """
        next(self.checked_copies(range(self._checked_index(index), index + 1)))

    def _checked_index(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.path}: expected 0 to {len(self) - 1}")
        return index

    def release_pages(self) -> None:  # noqa: B027  not every store is mapped
        """Release the mapped pages that were read, to keep RSS low in a pass over all records."""

    def close(self) -> None:  # noqa: B027  most stores have nothing to do
        """Do nothing: nothing is buffered, and a memory map is released with its last view."""

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return type(self), (str(self.path),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} records, {len(self.classes)} classes)"
