"""The store's format: keys, index columns, kinds of image, versions. The only file that knows them.

==================  ==========================================================================
key                 value
==================  ==========================================================================
8 bytes big-endian  the image file's bytes, untouched; the key is the record's index
``__index__``       Arrow IPC stream, one row per record, columns of ``INDEX_SCHEMA``
``__names__``       Arrow IPC stream, one string per record: the path inside the source
``__meta__``        JSON, see ``Meta``
==================  ==========================================================================
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dali_lmdb.errors import StoreDamagedError, StoreFormatError

__all__ = [
    "FORMAT_VERSION",
    "INDEX_KEY",
    "INDEX_SCHEMA",
    "MAX_SHARDS",
    "META_KEY",
    "NAMES_KEY",
    "Change",
    "Decoders",
    "Kind",
    "Meta",
    "fingerprint",
    "index_checksums",
    "record_key",
    "shard_path",
]

FORMAT_VERSION = 2  # 1 had one checksum for the whole index
_CHECKSUM_BYTES = 4 << 20
_FINGERPRINT_RECORDS = 1 << 20  # hashed at a time, to need little memory
MAX_SHARDS = 99_999  # five digits in a name
INDEX_KEY = b"__index__"
NAMES_KEY = b"__names__"
META_KEY = b"__meta__"


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
    def decodes_on_cpu(self) -> bool:
        """Whether DALI falls back to a decoder on the CPU for it (DALI documentation, "decoders.image")."""
        return self in (Kind.JPEG_CPU_ONLY, Kind.PNG, Kind.WEBP, Kind.BMP, Kind.TIFF, Kind.PNM)

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
    """By a decoder on the CPU that it falls back to."""
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


def fingerprint(*parts: tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32]]) -> str:
    """Identity of a data set: SHA-256 (first 32 hex digits) over labels and CRCs in record order.

    Args:
        parts: (labels, crc32) of the records in order, int32 and uint32 of shape (n,) each; how they are cut into
            parts makes no difference.
    """
    digest = hashlib.sha256()
    for labels, crc32 in parts:
        for start in range(0, len(labels), _FINGERPRINT_RECORDS):
            run = slice(start, start + _FINGERPRINT_RECORDS)
            pairs = np.empty(len(labels[run]), dtype=[("label", "<i4"), ("crc32", "<u4")])
            pairs["label"], pairs["crc32"] = labels[run], crc32[run]
            digest.update(pairs.data)
    return digest.hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The value of ``__meta__``."""

    num_records: int
    classes: list[str]
    fingerprint: str
    txnid: int
    """LMDB's number of the transaction that wrote it. A rewritten copy has another one, and file
    offsets in the index then say nothing."""
    index_crc32: list[int]
    """``index_checksums`` of ``__index__``."""
    names_crc32: int
    made: dict[str, Any] = field(default_factory=dict)
    """Version of the package, time, source and options."""
    shard: dict[str, Any] | None = None
    """``{"index", "count", "set"}`` in one shard of several: its place, how many, the set's name."""
    format: int = FORMAT_VERSION

    def to_bytes(self) -> bytes:
        """JSON, ASCII; ``crc32`` is that of the JSON without it."""
        values = asdict(self)
        return _json({**values, "crc32": zlib.crc32(_json(values))})

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
                "update dali_lmdb or convert it again"
            )
        checksum = values.pop("crc32", None)
        try:
            meta = cls(**values)
        except TypeError:
            meta = None
        if meta is None or not _well_formed(meta) or checksum != zlib.crc32(_json(values)):
            raise StoreDamagedError(f"{path}: damaged: __meta__ has a wrong checksum; convert it again")
        return meta


def index_checksums(stream: memoryview | pa.Buffer) -> list[int]:
    """CRC-32 of each ``_CHECKSUM_BYTES`` of ``__index__``, taken on all cores."""
    view = memoryview(stream)
    parts = [view[start : start + _CHECKSUM_BYTES] for start in range(0, len(view), _CHECKSUM_BYTES)]
    if len(parts) <= 1:
        return [zlib.crc32(part) for part in parts]
    with ThreadPoolExecutor(min(len(parts), len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(zlib.crc32, parts))


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode()


def _well_formed(meta: Meta) -> bool:
    integers = (meta.num_records, meta.txnid, meta.names_crc32)
    return (
        all(type(value) is int and value >= 0 for value in integers)
        and isinstance(meta.index_crc32, list)
        and isinstance(meta.fingerprint, str)
        and isinstance(meta.classes, list)
        and all(isinstance(name, str) for name in meta.classes)
        and isinstance(meta.made, dict)
        and (meta.shard is None or isinstance(meta.shard, dict))
    )


def _to_ipc(batch: pa.RecordBatch) -> pa.Buffer:
    """A stream of one batch, in a buffer of just its size that may be written to."""
    counter = pa.MockOutputStream()
    _write_ipc(batch, counter)
    # Of numpy, not of Arrow's pool, which keeps what is freed for later.
    buffer = pa.py_buffer(np.empty(counter.size(), dtype=np.uint8))
    _write_ipc(batch, pa.FixedSizeBufferWriter(buffer))
    return buffer


def _write_ipc(batch: pa.RecordBatch, sink: pa.NativeFile) -> None:
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)


def _inside(stream: pa.Buffer, part: pa.Buffer) -> npt.NDArray[np.uint8]:
    """A buffer of a stream's batch as bytes on the stream's memory, that can be written to if the stream can."""
    start = part.address - stream.address
    return np.frombuffer(stream, dtype=np.uint8)[start : start + part.size]


def _from_ipc(buffer: pa.Buffer, schema: pa.Schema, num_records: int) -> pa.RecordBatch | None:
    """The one batch of a stream, without a copy; None if it is anything else."""
    try:
        batch = pa.ipc.open_stream(buffer).read_next_batch()
        batch.validate(full=False)
    except (pa.ArrowException, StopIteration, OSError, EOFError):
        return None
    if batch.schema != schema or batch.num_rows != num_records or any(c.null_count for c in batch.columns):
        return None
    return batch


def index_to_ipc(columns: dict[str, npt.NDArray[Any]]) -> pa.Buffer:
    """``__index__`` from columns named as in ``INDEX_SCHEMA``, each of shape (n,)."""
    arrays = [pa.array(columns[field.name], type=field.type) for field in INDEX_SCHEMA]
    return _to_ipc(pa.RecordBatch.from_arrays(arrays, schema=INDEX_SCHEMA))


def new_index(num_records: int) -> tuple[pa.Buffer, dict[str, npt.NDArray[Any]]]:
    """``__index__`` of zeros, and its columns, each of shape (num_records,), to write into: nothing is copied."""
    columns = {field.name: np.zeros(num_records, field.type.to_pandas_dtype()) for field in INDEX_SCHEMA}
    stream = index_to_ipc(columns)
    batch = pa.ipc.open_stream(stream).read_next_batch()
    views = {name: _inside(stream, batch.column(name).buffers()[1]) for name in columns}
    return stream, {name: views[name].view(column.dtype)[:num_records] for name, column in columns.items()}


def index_from_ipc(view: memoryview, *, num_records: int, path: object) -> dict[str, npt.NDArray[Any]]:
    """Columns of ``__index__`` as arrays on the same memory.

    Raises:
        StoreDamagedError: not a stream of ``INDEX_SCHEMA`` with ``num_records`` rows.
    """
    batch = _from_ipc(pa.py_buffer(view), INDEX_SCHEMA, num_records)
    if batch is None:
        raise StoreDamagedError(f"{path}: damaged: __index__ is not readable; convert it again")
    return {name: batch.column(name).to_numpy(zero_copy_only=True) for name in batch.schema.names}


def names_to_ipc(chunks: Callable[[], Iterable[pa.Array]]) -> pa.Buffer:
    """``__names__`` from strings, with no more memory than it takes.

    Args:
        chunks: gives Arrow arrays of strings, in order; called twice, to count and to copy.
    """
    num_names = num_bytes = 0
    for starts, data in map(_text, chunks()):
        num_names, num_bytes = num_names + len(starts) - 1, num_bytes + len(data)
    ends = np.zeros(num_names + 1, dtype=np.int64)
    ends[-1] = num_bytes  # so that room is made for all of the text
    empty = [None, pa.py_buffer(ends), pa.py_buffer(np.zeros(num_bytes, dtype=np.uint8))]
    column = pa.Array.from_buffers(pa.large_string(), num_names, empty)
    stream = _to_ipc(pa.RecordBatch.from_arrays([column], schema=_NAMES_SCHEMA))
    _, offset_buffer, text_buffer = pa.ipc.open_stream(stream).read_next_batch().column(0).buffers()
    offsets, text = _inside(stream, offset_buffer).view(np.int64), _inside(stream, text_buffer)
    name = byte = 0
    for starts, data in map(_text, chunks()):
        offsets[name : name + len(starts)] = starts - starts[0] + byte
        text[byte : byte + len(data)] = data
        name, byte = name + len(starts) - 1, byte + len(data)
    return stream


def _text(strings: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """(n + 1 offsets, the bytes from the first to the last of them) of n strings."""
    strings = strings.cast(pa.large_string())
    _, offset_buffer, text_buffer = strings.buffers()
    if len(strings) == 0 or text_buffer is None:
        return np.zeros(len(strings) + 1, dtype=np.int64), np.empty(0, dtype=np.uint8)
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)[strings.offset :][: len(strings) + 1]
    return offsets, np.frombuffer(text_buffer, dtype=np.uint8)[offsets[0] : offsets[-1]]


def names_from_ipc(view: memoryview, *, num_records: int, crc32: int, path: object) -> pa.Array:
    """Names of all records, an Arrow array of strings on the same memory.

    Raises:
        StoreDamagedError: not the bytes that were written.
    """
    batch = None
    if zlib.crc32(view) == crc32:
        batch = _from_ipc(pa.py_buffer(view), _NAMES_SCHEMA, num_records)
    if batch is None:
        raise StoreDamagedError(f"{path}: damaged: __names__ is not readable; convert it again")
    return batch.column(0)
