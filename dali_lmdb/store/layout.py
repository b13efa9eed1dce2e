"""The store's format: keys, index columns, version. Other modules take them from here.

==================  ==========================================================================
key                 value
==================  ==========================================================================
8 bytes big-endian  the image file's bytes, unchanged; the key is the record's index
``__index__``       Arrow IPC stream, one row per record, columns of ``INDEX_SCHEMA``
``__names__``       Arrow IPC stream, one string per record: the path inside the source
``__meta__``        JSON, see ``meta.Meta``
==================  ==========================================================================

LMDB keeps a whole value in memory until it is written, so index and names are stored in pieces:
``__index__`` and ``__names__`` hold those of the first ``PIECE_RECORDS`` records, ``__index__/00000001``
and ``__names__/00000001`` those of the next ones, and so on.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

__all__ = [
    "FORMAT_VERSION",
    "INDEX_DTYPES",
    "INDEX_SCHEMA",
    "MAX_RECORD_BYTES",
    "MAX_SHARDS",
    "META_KEY",
    "NAMES_SCHEMA",
    "PIECE_RECORDS",
    "RESERVED_KEY",
    "index_key",
    "names_key",
    "pieces_of",
    "record_key",
]

MAX_RECORD_BYTES = (1 << 32) - 1  # limit of LMDB's values and of the column num_bytes
FORMAT_VERSION = 3  # in 1 and 2, index and names were one value each
PIECE_RECORDS = 1 << 16
"""Records in one piece of index (2 MB) and names (about 2.5 MB; writing it takes five times that memory)."""
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
INDEX_DTYPES = {field.name: np.dtype(field.type.to_pandas_dtype()) for field in INDEX_SCHEMA}
"""The columns' numpy dtypes, by name."""
NAMES_SCHEMA = pa.schema([pa.field("name", pa.large_string(), nullable=False)])


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
