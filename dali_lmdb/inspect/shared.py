"""Images that two stores share, such as a validation set that leaked into training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dali_lmdb.inspect.records import runs
from dali_lmdb.store import Store, open_store

__all__ = ["MOST_COMPARED", "SharedImage", "SharedImages", "shared_images"]

MOST_COMPARED = 10_000
"""Pairs whose bytes are compared. Two images have the same checksum and length by chance once in 2^32 pairs of one
length, so more pairs than that are no chance."""


class SharedImage(NamedTuple):
    """An image of one store that is also in the other; both may hold it several times."""

    name: str
    other_name: str
    """Of the first record there with these bytes."""


@dataclass(frozen=True, kw_only=True)
class SharedImages:
    """The result of ``shared_images``."""

    store: str
    other: str
    images: Sequence[SharedImage]
    """In the order of ``store``."""
    compared: bool
    """Whether the bytes were compared, not only their checksums and lengths."""
    changed: int
    """Number of records of the two stores that a converter re-encoded or resized: copies of their originals have
    other bytes, and are not found."""


def shared_images(path: str | os.PathLike[str], other_path: str | os.PathLike[str]) -> SharedImages:
    """Find the images of a store whose bytes are also in another one.

    The checksums and lengths in the indices are compared, and the bytes too, if at most ``MOST_COMPARED`` images
    agree. An image that was re-encoded or resized has other bytes, and is not found.

    Raises:
        StoreNotFoundError, StoreFormatError, StoreDamagedError: see ``dali_lmdb.errors``.
    """
    with open_store(path) as store, open_store(other_path) as other:
        keys, other_keys = _keys(store), _keys(other)
        first_keys, first_records = np.unique(other_keys, return_index=True)
        places = np.minimum(np.searchsorted(first_keys, keys), max(0, len(first_keys) - 1))
        is_shared = first_keys[places] == keys if len(first_keys) else np.zeros(len(keys), np.bool_)
        records = np.flatnonzero(is_shared)
        others = first_records[places[records]]
        compared = len(records) <= MOST_COMPARED
        if compared:
            same = _same_bytes(store, records, other, others)
            records, others = records[same], others[same]
        names, other_names = store.names().take(records), other.names().take(others)
        images = [SharedImage(*pair) for pair in zip(names.to_pylist(), other_names.to_pylist(), strict=True)]
        changed = sum(int(np.count_nonzero(one.column("change"))) for one in (store, other))
        return SharedImages(
            store=str(path), other=str(other_path), images=images, compared=compared, changed=changed
        )


def _keys(store: Store) -> npt.NDArray[np.uint64]:
    """Checksum and length of each record's bytes in one number, of shape (len(store),)."""
    return store.column("crc32").astype(np.uint64) << np.uint64(32) | store.column("num_bytes").astype(np.uint64)


def _same_bytes(
    store: Store, records: npt.NDArray[np.int64], other: Store, others: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    same = np.zeros(len(records), np.bool_)
    for run in runs(len(records)):
        ours, theirs = (
            one.arrays(chosen[run.start : run.stop]) for one, chosen in ((store, records), (other, others))
        )
        same[run.start : run.stop] = [np.array_equal(*pair) for pair in zip(ours, theirs, strict=True)]
        store.release_pages()
        other.release_pages()
    return same
