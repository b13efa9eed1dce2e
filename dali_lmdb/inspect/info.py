"""Describe a store from its index; the first bytes of records are read only if their kind requires it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dali_lmdb.errors import DaliLmdbError
from dali_lmdb.images.agreement import DALI_AGREES, dali_agrees
from dali_lmdb.images.kinds import DecoderCounts, Kind
from dali_lmdb.images.reencoding import Change
from dali_lmdb.inspect.records import runs
from dali_lmdb.store import FileStore, ShardedStore, Store, open_store
from dali_lmdb.store.classic import database_file

__all__ = ["Shard", "Spread", "StoreInfo", "class_records", "info"]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Minimum, median and maximum of some numbers."""

    min: int
    median: float
    max: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a store."""

    path: str
    records: int


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """The result of ``info``."""

    store: str
    format: int | None
    """Version of the store's format; None for a classic database."""
    records: int
    classes: int
    class_records: dict[str, int]
    """Number of records of each class, in label order."""
    per_class: Spread | None
    """Records per class; None without classes. The other spreads are None without records."""
    height: Spread | None
    """Height of the images as stored, in pixels."""
    width: Spread | None
    kinds: dict[str, int]
    """Number of records of each kind that occurs, most frequent first; names of ``images.kinds.Kind``."""
    decoders: DecoderCounts
    by_pillow: int
    """Number of records that ``DaliLoader`` decodes with Pillow, since DALI returns different pixels or none."""
    not_looked_at: int
    """Number of records stored uninspected (``--check none``): kind and size are unknown."""
    transcoded: int
    """Number of records that the converter re-encoded for the GPU."""
    resized: int
    """Number of records that the converter shrank."""
    num_bytes: int
    """Size of all records."""
    record_bytes: Spread | None
    file_bytes: int
    """Size of the store's files."""
    fingerprint: str
    made: dict[str, Any]
    """Version, time, source and settings of the conversion."""
    shards: tuple[Shard, ...]
    """The files, if there are several."""


def info(path: str | os.PathLike[str]) -> StoreInfo:
    """Describe a store.

    Raises:
        StoreNotFoundError, StoreFormatError, StoreDamagedError: see ``dali_lmdb.errors``.
    """
    with open_store(path) as store:
        parts: Sequence[Store] = store.shards if isinstance(store, ShardedStore) else [store]
        heights, widths = store.column("height"), store.column("width")
        kinds = store.column("kind")
        changes = store.column("change")
        num_bytes = store.column("num_bytes")
        uninspected = (kinds == Kind.UNKNOWN) & (heights == 0) & (widths == 0)
        records_per_class = class_records(store)
        first = parts[0]
        return StoreInfo(
            store=str(path),
            format=first.meta.format if isinstance(first, FileStore) else None,
            records=len(store),
            classes=len(store.classes),
            class_records=dict(zip(store.classes, records_per_class.tolist(), strict=True)),
            per_class=_spread(records_per_class),
            height=_spread(heights[~uninspected]),
            width=_spread(widths[~uninspected]),
            kinds=_kinds(kinds),
            decoders=DecoderCounts.of(kinds),
            by_pillow=sum(_by_pillow(part) for part in parts),
            not_looked_at=int(uninspected.sum()),
            transcoded=int(np.count_nonzero(changes & Change.TRANSCODED)),
            resized=int(np.count_nonzero(changes & Change.RESIZED)),
            num_bytes=int(num_bytes.sum(dtype=np.int64)),
            record_bytes=_spread(num_bytes),
            file_bytes=sum(_file_bytes(part) for part in parts),
            fingerprint=store.fingerprint,
            made=first.meta.made if isinstance(first, FileStore) else {},
            shards=tuple(Shard(path=str(part.path), records=len(part)) for part in parts)
            if len(parts) > 1
            else (),
        )


def class_records(store: Store) -> npt.NDArray[np.int64]:
    """Number of records of each class, int64 of shape (number of classes,)."""
    labels, num_classes = store.labels, len(store.classes)
    inside = labels[(labels >= 0) & (labels < num_classes)]  # `verify` reports others
    return np.bincount(inside, minlength=num_classes)


def _spread(values: npt.NDArray[Any]) -> Spread | None:
    if not len(values):
        return None
    return Spread(min=int(values.min()), median=float(np.median(values)), max=int(values.max()))


def _kinds(kinds: npt.NDArray[np.uint8]) -> dict[str, int]:
    counts = np.bincount(kinds, minlength=max(Kind) + 1)
    known = {kind.value: kind.name for kind in Kind}
    present = sorted(np.flatnonzero(counts).tolist(), key=lambda kind: (-counts[kind], kind))
    return {known.get(kind, f"kind {kind}"): int(counts[kind]) for kind in present}


_HEADER_BYTES = 4096  # a page


def _by_pillow(store: Store) -> int:
    """Count the readable records that Pillow decodes for DALI; for some kinds this depends on the image."""
    unclear = np.flatnonzero(~np.isin(store.column("kind"), [Kind.UNKNOWN, *DALI_AGREES]))
    count = 0
    for run in runs(len(unclear)):
        records = unclear[run.start : run.stop]
        with contextlib.suppress(DaliLmdbError):  # `verify` reports damage
            for path, offsets, _ in store.byte_ranges(records):
                with open(path, "rb") as file:  # many requests at once, for a cold page cache
                    for offset in offsets.tolist():
                        os.posix_fadvise(file.fileno(), offset, _HEADER_BYTES, os.POSIX_FADV_WILLNEED)
            count += sum(not dali_agrees(data) for data in store.arrays(records))
        store.release_pages()
    return count


def _file_bytes(part: Store) -> int:
    return database_file(part.path).stat().st_size
