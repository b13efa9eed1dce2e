"""The store's format: keys, index columns, kinds of image, versions. The only file that knows them.

==================  ==========================================================================
key                 value
==================  ==========================================================================
8 bytes big-endian  the image file's bytes, untouched; the key is the record's index
``__index__``       Arrow IPC stream, one row per record, columns of ``INDEX_SCHEMA``
``__names__``       Arrow IPC stream, one string per record: the path inside the source
``__meta__``        JSON, see ``Meta``
==================  ==========================================================================

Index and names hold the first ``PIECE_RECORDS`` records; further ones follow in pieces of as many,
``__index__/00000001``, ``__names__/00000001`` and so on, since LMDB holds a whole value in memory
until it is written.
"""

from __future__ import annotations

import enum
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
    "INDEX_SCHEMA",
    "MAX_RECORD_BYTES",
    "MAX_SHARDS",
    "META_KEY",
    "PIECE_RECORDS",
    "RESERVED_KEY",
    "Change",
    "Decoders",
    "Fingerprint",
    "Kind",
    "Meta",
    "fingerprint",
    "index_key",
    "names_key",
    "pieces_of",
    "record_key",
    "shard_path",
]

MAX_RECORD_BYTES = (1 << 32) - 1  # what LMDB holds, and the column num_bytes
FORMAT_VERSION = 3  # in 1 and 2, index and names were one value each
PIECE_RECORDS = 1 << 16
"""Records in one value of index (2 MB) and names (some 2.5 MB, written in five times as much memory)."""
_FINGERPRINT_RECORDS = 1 << 20  # hashed at a time, to need little memory
MAX_SHARDS = 99_999  # five digits in a name
META_KEY = b"__meta__"
RESERVED_KEY = b"__"
"""Keys that are not a record's begin so; they come after all records'."""


class Kind(enum.IntEnum):
    """What an image file is, as far as its decoder cares; the index column ``kind``."""

    UNKNOWN = 0
    """Not looked at, or nothing known decodes it."""
    JPEG_BASELINE = 1
    JPEG_EXTENDED = 2
    """Sequential, 8 bit, Huffman, but not baseline (SOF1)."""
    JPEG_PROGRESSIVE = 3
    JPEG_GRAYSCALE = 4
    """One component, baseline or extended."""
    JPEG_CMYK = 5
    """Four components."""
    JPEG_CPU_ONLY = 6
    """Arithmetic coding, 12 bit, lossless or two components: no GPU decoder takes it."""
    PNG = 7
    WEBP = 8
    BMP = 9
    TIFF = 10
    GIF = 11
    PNM = 12
    OTHER = 13
    """Pillow opens it; none of the above."""

    @property
    def is_jpeg(self) -> bool:
        """Whether it is a JPEG of any kind."""
        return Kind.JPEG_BASELINE <= self <= Kind.JPEG_CPU_ONLY

    @property
    def decodes_on_cpu(self) -> bool:
        """Whether a decoder on the CPU is needed for it: one of DALI's, or Pillow."""
        return self >= Kind.JPEG_CPU_ONLY

    @property
    def decodes_on_gpu(self) -> bool:
        """Whether nvJPEG decodes it with CUDA or in hardware (nvJPEG documentation, "supported formats")."""
        return Kind.JPEG_BASELINE <= self <= Kind.JPEG_CMYK


@dataclass(frozen=True)
class Decoders:
    """How many records are decoded where, by DALI."""

    gpu: int
    """By nvJPEG."""
    cpu: int
    """By a decoder on the CPU that it falls back to, or by Pillow in its place."""
    none: int
    """By nothing known, or not looked at."""

    @classmethod
    def of(cls, kinds: npt.NDArray[np.uint8]) -> Decoders:
        """Count an index column ``kind``."""
        gpu = int(np.isin(kinds, [kind for kind in Kind if kind.decodes_on_gpu]).sum())
        cpu = int(np.isin(kinds, [kind for kind in Kind if kind.decodes_on_cpu]).sum())
        return cls(gpu, cpu, len(kinds) - gpu - cpu)


class Change(enum.IntFlag):
    """What the converter did to the source's bytes; the index column ``change``."""

    NONE = 0
    TRANSCODED = 1
    RESIZED = 2


INDEX_SCHEMA = pa.schema(
    [
        pa.field("label", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),  # as stored, EXIF orientation not applied
        pa.field("width", pa.int32(), nullable=False),
        pa.field("num_bytes", pa.uint32(), nullable=False),
        pa.field("crc32", pa.uint32(), nullable=False),  # zlib.crc32 of the value
        # Where the value starts in the file; 0 where the writer could not know it (look it up).
        pa.field("file_offset", pa.uint64(), nullable=False),
        pa.field("kind", pa.uint8(), nullable=False),
        pa.field("change", pa.uint8(), nullable=False),
    ]
)
_NAMES_SCHEMA = pa.schema([pa.field("name", pa.large_string(), nullable=False)])


def shard_path(store: Path, index: int, count: int) -> Path:
    """Where a shard of a store lies: ``NAME-00000-of-00004.lmdb`` for ``NAME.lmdb``."""
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
    """All records, so many at a time; an empty store has one piece, without records."""
    starts = range(0, max(1, num_records), piece_records)
    return [range(start, min(start + piece_records, num_records)) for start in starts]


class Fingerprint:
    """Identity of a data set: SHA-256 (first 32 hex digits) over labels and CRCs in record order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, labels: npt.NDArray[np.int32], crc32: npt.NDArray[np.uint32]) -> None:
        """Take the next records, int32 and uint32 of shape (n,); how they are cut makes no difference."""
        for start in range(0, len(labels), _FINGERPRINT_RECORDS):
            run = slice(start, start + _FINGERPRINT_RECORDS)
            pairs = np.empty(len(labels[run]), dtype=[("label", "<i4"), ("crc32", "<u4")])
            pairs["label"], pairs["crc32"] = labels[run], crc32[run]
            self._digest.update(pairs.data)

    def hexdigest(self) -> str:
        """Of all records taken so far."""
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
    """LMDB's number of the transaction that wrote it. A rewritten copy has another one, and file
    offsets in the index then say nothing."""
    piece_records: int
    """Records in each piece of index and names but the last."""
    index_crc32: list[int]
    """``zlib.crc32`` of each piece of the index."""
    names_crc32: list[int]
    """``zlib.crc32`` of each piece of the names."""
    made: dict[str, Any] = field(default_factory=dict)
    """Version of the package, time, source and options."""
    shard: dict[str, Any] | None = None
    """``{"index", "count", "set"}`` in one shard of several: its place, how many, the set's name."""
    format: int = FORMAT_VERSION

    def pieces(self) -> list[range]:
        """The records of each piece of index and names."""
        return pieces_of(self.num_records, self.piece_records)

    def to_bytes(self) -> bytes:
        """JSON, ASCII; ``crc32`` is that of the JSON without it."""
        values = asdict(self)
        return _json({**values, "crc32": crc32(_json(values))})

    @classmethod
    def from_bytes(cls, raw: bytes, *, path: object) -> Meta:
        """Parse and check.

        Raises:
            StoreFormatError: a newer format.
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
    """The one batch of a stream, without a copy; None if it is anything else."""
    try:
        batch = pa.ipc.open_stream(pa.py_buffer(view)).read_next_batch()
        batch.validate(full=True)  # Arrow trusts the offsets of strings; 0.6 ms for 131,072 names
    except (pa.ArrowException, StopIteration, OSError, EOFError):
        return None
    if batch.schema != schema or batch.num_rows != num_records or any(c.null_count for c in batch.columns):
        return None
    return batch


def index_to_ipc(columns: dict[str, npt.NDArray[Any]]) -> pa.Buffer:
    """A piece of the index from columns named as in ``INDEX_SCHEMA``, each of shape (n,)."""
    arrays = [pa.array(columns[field.name], type=field.type) for field in INDEX_SCHEMA]
    return _to_ipc(pa.RecordBatch.from_arrays(arrays, schema=INDEX_SCHEMA))


def index_from_ipc(view: memoryview, *, num_records: int) -> dict[str, npt.NDArray[Any]] | None:
    """Columns of a piece of the index as arrays on the same memory; None if it is not one of ``num_records``."""
    batch = _from_ipc(view, INDEX_SCHEMA, num_records)
    if batch is None:
        return None
    return {name: batch.column(name).to_numpy(zero_copy_only=True) for name in batch.schema.names}


def names_to_ipc(names: pa.Array) -> pa.Buffer:
    """A piece of the names from strings."""
    return _to_ipc(pa.RecordBatch.from_arrays([names.cast(pa.large_string())], schema=_NAMES_SCHEMA))


def names_from_ipc(view: memoryview, *, num_records: int) -> pa.Array | None:
    """Strings of a piece of the names on the same memory; None if it is not one of ``num_records``."""
    batch = _from_ipc(view, _NAMES_SCHEMA, num_records)
    return None if batch is None else batch.column(0)
