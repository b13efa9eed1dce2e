"""Classic databases of the folder2lmdb family, read in place, without conversion or liblmdb."""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dali_lmdb.errors import RecordError, StoreDamagedError, StoreFormatError, one_line
from dali_lmdb.images.header import MAX_PIXELS, read_header
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.opening import BadImageError
from dali_lmdb.store import layout, sidecar
from dali_lmdb.store.base import Store
from dali_lmdb.store.checksum import crc32
from dali_lmdb.store.fingerprint import fingerprint
from dali_lmdb.store.pages import Extent, PageFile
from dali_lmdb.store.payload import (
    Located,
    PayloadError,
    bytes_at,
    decode_keys,
    decode_length,
    locate_payload,
)
from dali_lmdb.store.values import read_values
from dali_lmdb.threads import threads_to_read

__all__ = ["ClassicStore", "database_file", "is_classic"]

LENGTH_KEY = b"__len__"
KEYS_KEY = b"__keys__"

# Labels index a list of classes, so a damaged one must not create a list that exhausts memory.
_MAX_CLASSES = 1 << 20
_MAX_PIXELS = 2 * MAX_PIXELS  # where Pillow raises an error; above MAX_PIXELS it only warns
_RECORDS_AT_ONCE = 64  # per task of a thread when the index is built
_WORTH_A_WARNING_BYTES = 1 << 30  # building the index then takes a while, so tell the user why
_MIN_NODE_BYTES = 8  # NODESIZE in mdb.c
_Decoded = TypeVar("_Decoded")
_log = logging.getLogger(__name__)

_EXTENSIONS = (
    (rb"\xff\xd8", ".jpg"),
    (rb"\x89PNG", ".png"),
    (rb"RIFF....WEBP", ".webp"),
    (rb"BM", ".bmp"),
    (rb"II\*\0|MM\0\*", ".tif"),
    (rb"P[25]\s", ".pgm"),
    (rb"P[36]\s", ".ppm"),
)
_TENSORPACK_KEY = b"00000000"  # of its first record; tensorpack/dataflow/serialize.py


def database_file(path: str | os.PathLike[str]) -> Path:
    """The LMDB file at ``path``: itself, or ``data.mdb`` in a folder made by LMDB."""
    inside = Path(path) / "data.mdb"
    return inside if os.path.isfile(inside) else Path(path)


def is_classic(pages: PageFile) -> bool:
    """Return whether an LMDB file has the keys of a classic database and not those of a store.

    Raises:
        StoreDamagedError: a page that was read is damaged.
    """
    if pages.find(layout.META_KEY) is not None:
        return False
    if pages.find(KEYS_KEY) is not None:
        return True
    if pages.find(LENGTH_KEY) is None:
        return False
    # __len__ may count the records of named databases, which are another layout.
    return pages.find(b"0") is not None or not pages.has_databases()


class ClassicStore(Store):
    """A database with keys ``b"0"``, ``b"1"``, ..., ``__keys__``, ``__len__`` and values ``(image, label)``.

    Values are packed by pickle, msgpack or ``pa.serialize`` (see ``payload``). Opening reads only the length.
    Such a database comes without an index of labels, sizes and checksums. One is built on first use, by reading
    the database once, and saved beside it as ``NAME.dali-index``, or kept in memory if the folder is not writable.

    Image bytes are slices of the map, except with pickle protocol 2, which stores them as text. Classes are named
    after their labels, ``"0"``, ``"1"``, ..., as the database has no names for them. Height and width are 0 if a
    value is not a readable image or has more than 178,956,970 pixels.

    Args:
        path: the LMDB file, or the folder with ``data.mdb`` in it.

    Raises:
        StoreNotFoundError: no file there.
        StoreFormatError: not a classic database.
        StoreDamagedError: truncated, or a damaged page.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.file = database_file(path)
        self._pages = PageFile(self.file)
        self._columns: sidecar.Columns | None = None
        self._is_saved = False
        self._num_records = self._length()
        self._check_tensorpack()
        status = os.stat(self.file)
        self._stamp = sidecar.Stamp(status.st_size, status.st_mtime_ns, self._num_records)

    def _check_tensorpack(self) -> None:
        """Refuse what tensorpack wrote, in the layout that this one comes from, unless its values are the same."""
        if self._num_records == 0 or self._pages.find(_TENSORPACK_KEY) is None:
            return
        try:
            self.peek(0)
        except RecordError as error:
            raise StoreFormatError(
                f"{self.path}: a tensorpack database (LMDBSerializer), whose values are not (image, label) as "
                "in a classic one; write its images into class folders with tensorpack, and convert those"
            ) from error

    def __len__(self) -> int:
        return self._num_records

    @cached_property
    def classes(self) -> list[str]:
        return [str(label) for label in range(int(self.labels.max(initial=-1)) + 1)]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint([(self.column("label"), self.column("crc32"))])

    def column(self, name: str) -> npt.NDArray[Any]:
        return self._index()[name]

    def gather(self, name: str, records: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        return self._index()[name][records]

    def byte_ranges(
        self, records: npt.NDArray[np.int64]
    ) -> list[tuple[Path, npt.NDArray[np.uint64], npt.NDArray[np.uint32]]]:
        return [(self.file, *self._extents(records))]

    def arrays(self, records: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
        if self._columns is None:  # one look-up costs less than building the index
            return [self._find_image(int(record)) for record in records]
        offsets, lengths = self._extents(records)
        data, places = self._pages.data, self.gather("file_offset", records).tolist()
        ends = (offsets + lengths).tolist()
        return [
            data[start:end] if place else self._find_image(int(record))
            for record, place, start, end in zip(records, places, offsets.tolist(), ends, strict=True)
        ]

    def name(self, index: int) -> str:
        """``LABEL/KEY.jpg``: such databases store no names."""
        return self.peek(index)[1]

    def peek(self, index: int) -> tuple[int, str]:
        """Read label and name of one record from the start and end of its value, without the index.

        Raises:
            IndexError: no such record.
            RecordError: its value is not ``(image, label)``.
        """
        view = self._pages.view(self._extent(self._checked_index(index)))
        image, label = self._locate(index, view)
        start = bytes(view[image.start : image.stop][:24])
        if image.is_text:
            start = start.decode("utf-8", "ignore").encode("latin-1", "ignore")
        matches = (extension for magic, extension in _EXTENSIONS if re.match(magic, start, re.DOTALL))
        return label, f"{label}/{self._key(index).decode('utf-8', 'backslashreplace')}{next(matches, '.jpg')}"

    def copies(self, records: range) -> Iterator[bytes]:
        for index in records:
            value = memoryview(self._copy_value(index, self._extent(index)))
            yield bytes(self._bytes_at(index, value, self._locate(index, value)))

    def release_pages(self) -> None:
        self._pages.release_pages()

    def where(self, index: int) -> str:
        return one_line(f"{self.path}: record {index} (key {self._key(index).decode('latin-1')!a})")

    def __reduce__(self) -> Any:
        # An index that could not be saved is pickled too, so that workers need not build it again.
        return type(self), (str(self.path),), None if self._is_saved else self._columns

    def __setstate__(self, columns: sidecar.Columns) -> None:
        self._columns = columns

    def _length(self) -> int:
        """Number of records, from ``__len__``, otherwise ``__keys__``."""
        count = self._unpacked(LENGTH_KEY, decode_length)
        if count is None:
            keys = self._listed_keys()
            if keys is None:
                raise StoreFormatError(
                    f"{self.path}: not a classic database, with {self._pages.describe()}; expected "
                    f"{LENGTH_KEY.decode()} or {KEYS_KEY.decode()}; if it is not a store either, unpack its "
                    "images into class folders and convert those"
                )
            count = len(keys)
        if count > min(self._pages.entries, len(self._pages.data) // _MIN_NODE_BYTES):
            raise StoreDamagedError(
                f"{self.path}: damaged: {LENGTH_KEY.decode()} says {count} records, but there are "
                f"{self._pages.entries} keys; rebuild the database"
            )
        return count

    def _unpacked(self, key: bytes, decode: Callable[[memoryview], _Decoded]) -> _Decoded | None:
        """Find and decode the value of ``__len__`` or ``__keys__``; None if there is no such key."""
        extent = self._pages.find(key)
        try:
            return None if extent is None else decode(self._pages.view(extent))
        except PayloadError as error:
            raise StoreFormatError(f"{self.path}: {key.decode()}: {error}; rebuild the database") from error

    def _listed_keys(self) -> list[bytes] | None:
        max_keys = self._pages.count_keys()
        return self._unpacked(KEYS_KEY, partial(decode_keys, max_keys=max_keys))

    @cached_property
    def _keys(self) -> list[bytes] | None:
        """Keys in record order; None if they are the usual ``b"0"``, ``b"1"``, ..."""
        keys = self._listed_keys()
        if keys is None:
            return None
        if len(keys) != self._num_records or len(set(keys)) != len(keys):
            raise StoreDamagedError(
                f"{self.path}: damaged: {KEYS_KEY.decode()} lists {len(set(keys))} keys, "
                f"{LENGTH_KEY.decode()} says {self._num_records}; rebuild the database"
            )
        return None if all(key == b"%d" % index for index, key in enumerate(keys)) else keys

    def _key(self, index: int) -> bytes:
        return b"%d" % index if self._keys is None else self._keys[index]

    def _extent(self, index: int) -> Extent:
        """Locate a record's value."""
        extent = self._pages.find(self._key(index))
        if extent is None:
            raise self._missing(index)
        return extent

    def _extents(self, records: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        """Locate the bytes of some records in the file; for an image stored as text, the whole value."""
        offsets = self.gather("file_offset", records)
        lengths = self.gather("num_bytes", records)
        for position in np.flatnonzero(offsets == 0):
            offsets[position], lengths[position] = self._extent(int(records[position]))
        size = len(self._pages.data)
        if ((offsets > size) | (lengths > size - np.minimum(offsets, size))).any():
            raise StoreDamagedError(
                f"{self.path}: {sidecar.sidecar_path(self.file)} does not match the database; remove it"
            )
        return offsets, lengths

    def _missing(self, index: int) -> StoreDamagedError:
        return StoreDamagedError(f"{self.where(index)}: damaged: its key is missing; rebuild the database")

    def _locate(self, index: int, value: memoryview) -> Located:
        try:
            located = locate_payload(value)
        except PayloadError as error:
            raise RecordError(f"{self.where(index)}: {error}; rebuild the database") from error
        if not self._labels_fit(located.label):
            raise RecordError(
                f"{self.where(index)}: its label is {located.label}, expected less than "
                f"{max(_MAX_CLASSES, len(self))}; rebuild the database"
            )
        return located

    def _bytes_at(self, index: int, value: memoryview, located: Located) -> memoryview:
        try:
            return bytes_at(value, located.image)
        except PayloadError as error:
            raise RecordError(f"{self.where(index)}: {error}; rebuild the database") from error

    def _find_image(self, index: int) -> npt.NDArray[np.uint8]:
        value = self._pages.view(self._extent(index))
        image = self._bytes_at(index, value, self._locate(index, value))
        return np.frombuffer(image, dtype=np.uint8)

    def _copy_value(self, index: int, extent: Extent) -> bytes:
        (value,) = read_values(self.file, np.array([extent.offset]), np.array([extent.length]))
        if isinstance(value, OSError):
            raise StoreDamagedError(
                f"{self.where(index)}: cannot be read: {value.strerror}; check the disk"
            ) from value
        if len(value) != extent.length:
            raise StoreDamagedError(f"{self.where(index)}: the file was truncated; copy it again")
        return value

    def _index(self) -> sidecar.Columns:
        if self._columns is None:
            self._columns = self._load_saved() or self._make_index()
        return self._columns

    def _load_saved(self) -> sidecar.Columns | None:
        columns = sidecar.load(self.file, self._stamp)
        if columns is None or not self._labels_fit(columns["label"]).all():
            return None
        self._is_saved = True
        return columns

    def _make_index(self) -> sidecar.Columns:
        path = one_line(str(self.path))
        with sidecar.one_at_a_time(self.file):
            columns = self._load_saved()  # another process may have built it meanwhile
            if columns is None:
                level = logging.WARNING if self._stamp.size > _WORTH_A_WARNING_BYTES else logging.INFO
                _log.log(level, "%s: a classic database without an index: reading it once to build one", path)
                columns = self._read_all()
                self._is_saved = sidecar.save(self.file, self._stamp, columns)
        return columns

    def _read_all(self) -> sidecar.Columns:
        """Build the index columns by reading every record's value in threads."""
        offsets, lengths = self._all_extents()
        columns: sidecar.Columns = {
            name: np.zeros(len(self), dtype=dtype) for name, dtype in layout.INDEX_DTYPES.items()
        }

        def fill_rows(start: int) -> None:
            for index in range(start, min(start + _RECORDS_AT_ONCE, len(self))):
                row = self._compute_row(index, Extent(int(offsets[index]), int(lengths[index])))
                for name, value in row.items():
                    columns[name][index] = value

        with ThreadPoolExecutor(threads_to_read()) as pool:
            # After an error, map cancels what has not begun.
            deque(pool.map(fill_rows, range(0, len(self), _RECORDS_AT_ONCE)), maxlen=0)
        for column in columns.values():
            column.flags.writeable = False
        return columns

    def _compute_row(self, index: int, extent: Extent) -> dict[str, int]:
        """Compute one row of the index; called in a thread."""
        value = memoryview(self._copy_value(index, extent))
        located = self._locate(index, value)
        data = bytes(self._bytes_at(index, value, located))
        try:
            kind, height, width = read_header(data, max_pixels=_MAX_PIXELS)
        except BadImageError:  # the decoder will report the cause
            kind, height, width = Kind.UNKNOWN, 0, 0
        return {
            "label": located.label,
            "height": height,
            "width": width,
            "num_bytes": len(data),
            "crc32": crc32(data),
            "file_offset": 0 if located.image.is_text else extent.offset + located.image.start,
            "kind": kind,
        }

    def _labels_fit(self, labels: Any) -> Any:
        return (labels >= 0) & (labels < max(_MAX_CLASSES, len(self)))

    def _all_extents(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        """Offsets and lengths of all values, uint64 and uint32 of shape (len(self),), in bytes."""
        offsets = np.zeros(len(self), dtype=np.uint64)
        lengths = np.zeros(len(self), dtype=np.uint32)
        listed = None if self._keys is None else {key: index for index, key in enumerate(self._keys)}
        for key, extent in self._pages.items():
            index = _number(key) if listed is None else listed.get(key)
            if index is not None and index < len(self):
                offsets[index], lengths[index] = extent
        missing = np.flatnonzero(offsets == 0)  # offset 0 is a meta page, so no value starts there
        if len(missing):
            raise self._missing(int(missing[0]))
        return offsets, lengths


def _number(key: bytes) -> int | None:
    """Parse a key like ``b"17"``; None unless it is a number in canonical form."""
    if not key.isdigit() or len(key) > 19 or (key[0] == ord("0") and len(key) > 1):
        return None
    return int(key)
