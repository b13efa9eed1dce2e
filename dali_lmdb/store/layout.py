"""The store's format: keys, index columns, versions. The only module that knows them.

==================  ==========================================================================
key                 value
==================  ==========================================================================
8 bytes big-endian  the image file's bytes, unchanged; the key is the record's index
``__index__``       Arrow IPC stream, one row per record, columns of ``INDEX_SCHEMA``
``__names__``       Arrow IPC stream, one string per record: the path inside the source
``__meta__``        JSON, see ``Meta``
==================  ==========================================================================

``__index__`` and ``__names__`` hold the first ``PIECE_RECORDS`` records; the same number follows in
``__index__/00000001`` and ``__names__/00000001``, and so on, since LMDB keeps a whole value in memory
until it is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dali_lmdb.errors import StoreDamagedError, StoreFormatError
from dali_lmdb.store.checksum import crc32

__all__ = [
    "FORMAT_VERSION",
    "INDEX_DTYPES",
    "INDEX_SCHEMA",
    "MAX_RECORD_BYTES",
    "MAX_SHARDS",
    "META_KEY",
    "PIECE_RECORDS",
    "RESERVED_KEY",
    "Fingerprint",
    "Meta",
    "fingerprint",
    "index_key",
    "names_key",
    "pieces_of",
    "record_key",
    "shard_path",
]

MAX_RECORD_BYTES = (1 << 32) - 1  # limit of LMDB's values and of the column num_bytes
FORMAT_VERSION = 3  # in 1 and 2, index and names were one value each
PIECE_RECORDS = 1 << 16
"""Records in one piece of index (2 MB) and names (about 2.5 MB; writing it takes five times that memory)."""
_FINGERPRINT_RECORDS = 1 << 20  # hashed at a time, to limit memory
MAX_SHARDS = 99_999  # five digits in a name
META_KEY = b"__meta__"
RESERVED_KEY = b"__"
"""Prefix of all keys other than records'; it sorts after every record's key."""


INDEX_SCHEMA = pa.schema(
    [
        pa.field("label", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),  # as stored, EXIF orientation not applied
        pa.field("width", pa.int32(), nullable=False),
        pa.field("num_bytes", pa.uint32(), nullable=False),
        pa.field("crc32", pa.uint32(), nullable=False),  # zlib.crc32 of the value
        # Offset of the value in the file; 0 if the writer could not know it (look it up).
        pa.field("file_offset", pa.uint64(), nullable=False),
        pa.field("kind", pa.uint8(), nullable=False),
        pa.field("change", pa.uint8(), nullable=False),
    ]
)
INDEX_DTYPES: dict[str, np.dtype[Any]] = {field.name: np.dtype(str(field.type)) for field in INDEX_SCHEMA}
"""The columns' numpy dtypes, by name; Arrow's own conversion of types needs pandas before pyarrow 19."""
_NAMES_SCHEMA = pa.schema([pa.field("name", pa.large_string(), nullable=False)])


def shard_path(store: Path, index: int, count: int) -> Path:
    """Path of a shard of a store: ``NAME-00000-of-00004.lmdb`` for ``NAME.lmdb``."""
    return store.with_name(f"{store.stem}-{index:05d}-of-{count:05d}{store.suffix}")


def record_key(index: int) -> bytes:
    """The key of a record: its index in 8 bytes, big-endian, so that LMDB's order is the record order."""
    return index.to_bytes(8, "big")


def index_key(piece: int) -> bytes:
    """The key of a piece of the index."""
    return b"__index__" if piece == 0 else b"__index__/%08d" % piece


def names_key(piece: int) -> bytes:
    """The key of a piece of the names."""
    return b"__names__" if piece == 0 else b"__names__/%08d" % piece


def pieces_of(num_records: int, piece_records: int) -> list[range]:
    """Split all records into ranges of ``piece_records``; an empty store has one empty piece."""
    starts = range(0, max(1, num_records), piece_records)
    return [range(start, min(start + piece_records, num_records)) for start in starts]


class Fingerprint:
    """Identity of a data set: SHA-256 (first 32 hex digits) over labels and CRCs in record order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, labels: npt.NDArray[np.int32], crc32: npt.NDArray[np.uint32]) -> None:
        """Add the next records, int32 and uint32 of shape (n,); how many at a time makes no difference."""
        for start in range(0, len(labels), _FINGERPRINT_RECORDS):
            run = slice(start, start + _FINGERPRINT_RECORDS)
            pairs = np.empty(len(labels[run]), dtype=[("label", "<i4"), ("crc32", "<u4")])
            pairs["label"], pairs["crc32"] = labels[run], crc32[run]
            self._digest.update(pairs.data)

    def hexdigest(self) -> str:
        """The fingerprint of all records added so far."""
        return self._digest.hexdigest()[:32]


def fingerprint(parts: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32]]]) -> str:
    """The ``Fingerprint`` of (labels, crc32) of all records in order."""
    found = Fingerprint()
    for labels, checksums in parts:
        found.add(labels, checksums)
    return found.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The value of ``__meta__``."""

    num_records: int
    classes: list[str]
    fingerprint: str
    txnid: int
    """LMDB's number of the transaction that wrote this. If the file's last one differs, the file was
    rewritten and the offsets in the index are invalid."""
    piece_records: int
    """Number of records in each piece of index and names; the last piece may have fewer."""
    index_crc32: list[int]
    """``zlib.crc32`` of each piece of the index."""
    names_crc32: list[int]
    """``zlib.crc32`` of each piece of the names."""
    made: dict[str, Any] = field(default_factory=dict)
    """Version of the package, time, source and options of the conversion."""
    shard: dict[str, Any] | None = None
    """In a shard, ``{"index", "count", "set"}``: its position, the number of shards, the set's identifier."""
    format: int = FORMAT_VERSION

    def pieces(self) -> list[range]:
        """The records of each piece of index and names."""
        return pieces_of(self.num_records, self.piece_records)

    def to_bytes(self) -> bytes:
        """ASCII JSON; its ``crc32`` covers the JSON without that key."""
        values = asdict(self)
        return _json({**values, "crc32": crc32(_json(values))})

    @classmethod
    def from_bytes(cls, raw: bytes, *, path: object) -> Meta:
        """Parse and validate.

        Raises:
            StoreFormatError: another version of the format.
            StoreDamagedError: not the JSON that ``to_bytes`` writes.
        """
        try:
            values = json.loads(raw)
            version = values["format"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise StoreDamagedError(f"{path}: damaged: __meta__ is not JSON; convert it again") from None
        if version != FORMAT_VERSION:
            raise StoreFormatError(
                f"{path}: format {version!r}, this version reads {FORMAT_VERSION}; "
                "convert it again, or update dali_lmdb if the format is newer"
            )
        checksum = values.pop("crc32", None)
        try:
            meta = cls(**values)
        except TypeError:
            meta = None
        if meta is None or not _well_formed(meta) or checksum != crc32(_json(values)):
            raise StoreDamagedError(f"{path}: damaged: __meta__ has a wrong checksum; convert it again")
        return meta


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode()


def _well_formed(meta: Meta) -> bool:
    integers = (meta.num_records, meta.txnid, meta.piece_records)
    if not all(type(value) is int and 0 <= value < 1 << 63 for value in integers) or meta.piece_records == 0:
        return False
    num_pieces = max(1, -(-meta.num_records // meta.piece_records))
    return (
        all(
            isinstance(checksums, list)
            and len(checksums) == num_pieces
            and all(type(value) is int for value in checksums)
            for checksums in (meta.index_crc32, meta.names_crc32)
        )
        and isinstance(meta.fingerprint, str)
        and isinstance(meta.classes, list)
        and all(isinstance(name, str) for name in meta.classes)
        and isinstance(meta.made, dict)
        and (meta.shard is None or isinstance(meta.shard, dict))
    )


def _to_ipc(batch: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue()


def _from_ipc(view: memoryview, schema: pa.Schema, num_records: int) -> pa.RecordBatch | None:
    """Read the only batch of a stream without copying; None if it is anything else."""
    try:
        batch = pa.ipc.open_stream(pa.py_buffer(view)).read_next_batch()
        batch.validate(full=True)  # Arrow does not check strings' offsets otherwise; 0.6 ms for 131,072 names
    except (pa.ArrowException, StopIteration, OSError, EOFError):
        return None
    if batch.schema != schema or batch.num_rows != num_records or any(c.null_count for c in batch.columns):
        return None
    return batch


def index_to_ipc(columns: dict[str, npt.NDArray[Any]]) -> pa.Buffer:
    """Encode a piece of the index from columns named as in ``INDEX_SCHEMA``, each of shape (n,)."""
    arrays = [pa.array(columns[field.name], type=field.type) for field in INDEX_SCHEMA]
    return _to_ipc(pa.RecordBatch.from_arrays(arrays, schema=INDEX_SCHEMA))


def index_from_ipc(view: memoryview, *, num_records: int) -> dict[str, npt.NDArray[Any]] | None:
    """Decode a piece of the index to arrays on the same memory; None if it is not one of ``num_records``."""
    batch = _from_ipc(view, INDEX_SCHEMA, num_records)
    if batch is None:
        return None
    return {name: batch.column(name).to_numpy(zero_copy_only=True) for name in batch.schema.names}


def names_to_ipc(names: pa.Array) -> pa.Buffer:
    """Encode a piece of the names from strings."""
    return _to_ipc(pa.RecordBatch.from_arrays([names.cast(pa.large_string())], schema=_NAMES_SCHEMA))


def names_from_ipc(view: memoryview, *, num_records: int) -> pa.Array | None:
    """Decode a piece of the names to strings on the same memory; None if it is not one of ``num_records``."""
    batch = _from_ipc(view, _NAMES_SCHEMA, num_records)
    return None if batch is None else batch.column(0)
