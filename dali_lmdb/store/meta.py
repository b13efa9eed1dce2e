"""The metadata of a store file: the value of ``__meta__``."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from dali_lmdb.errors import StoreDamagedError, StoreFormatError
from dali_lmdb.store.checksum import crc32
from dali_lmdb.store.layout import FORMAT_VERSION, MAX_SHARDS, pieces_of

__all__ = ["Meta"]

# Parsed, JSON takes up to 24 times its bytes in empty lists and objects, of which ours has few.
_MAX_CONTAINERS = 10_000
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON's escapes allow them, UTF-8 does not


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The value of ``__meta__``."""

    num_records: int
    classes: list[str]
    fingerprint: str
    txnid: int
    """Number of the LMDB transaction that wrote this. If the file's last transaction has another number, the
    file was rewritten and the offsets in the index are invalid."""
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
        """Encode as ASCII JSON; its key ``crc32`` is the checksum of the JSON without that key."""
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
            if raw.count(b"[") + raw.count(b"{") > _MAX_CONTAINERS:  # class names may hold brackets, too
                bare = _STRING.sub(b"", raw)
                if bare.count(b"[") + bare.count(b"{") > _MAX_CONTAINERS:
                    raise ValueError
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
        and not any(map(_SURROGATE.search, meta.classes))
        and isinstance(meta.made, dict)
        and (meta.shard is None or _is_shard(meta.shard))
    )


def _is_shard(shard: Any) -> bool:
    return (
        isinstance(shard, dict)
        and type(index := shard.get("index")) is int
        and type(count := shard.get("count")) is int
        and 0 <= index < count <= MAX_SHARDS
        and isinstance(shard.get("set"), str)
    )
