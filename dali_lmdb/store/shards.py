"""Several store files that read as one: the shards of a set, in order."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dali_lmdb.disk import lack_of_descriptors
from dali_lmdb.errors import StoreError, StoreFormatError, StoreNotFoundError
from dali_lmdb.store import layout
from dali_lmdb.store.base import Store
from dali_lmdb.store.pages import is_lmdb
from dali_lmdb.store.reader import FileStore

__all__ = ["ShardedStore", "shard_files"]

_SHARD = re.compile(r".*-(\d{5})-of-(\d{5})(\.[^.]*)?")


def shard_files(path: str | os.PathLike[str]) -> list[Path] | None:
    """The files of the set that ``path`` names, sorted; None if it does not name a set.

    A set is named by a glob pattern (``train-*.lmdb``), by the folder that holds nothing but its shards, or by
    the name it was converted to (``train.lmdb`` for ``train-00000-of-00004.lmdb`` and so on).
    """
    path = Path(path)
    try:
        path.exists()
    except OSError:  # a name too long, a folder that may not be looked into: opening it will say so
        return None
    if path.is_dir():
        # Parquet and tar shards are named alike.
        found = [file for file in path.iterdir() if _SHARD.fullmatch(file.name) and is_lmdb(file)]
    elif path.exists():
        return None
    else:
        pattern = f"{glob.escape(path.stem)}-*-of-*{glob.escape(path.suffix)}"
        found = [file for file in path.parent.glob(pattern) if _SHARD.fullmatch(file.name)]
        if not found and glob.has_magic(str(path)):
            found = [Path(file) for file in glob.glob(str(path))]
    return sorted(found) or None


class ShardedStore(Store):
    """All shards of one set; record indices run through them in order.

    Args:
        path: what names the set, see ``shard_files``.

    Attributes:
        shards: the files' stores, in order.

    Raises:
        StoreNotFoundError: no shard there.
        StoreFormatError: a shard is missing, or belongs to another set.
        StoreError: a shard cannot be opened, or there are more than this process may open.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        files = shard_files(path)
        if not files:
            raise StoreNotFoundError(f"{path}: no shards there; expected files like NAME-00000-of-00004.lmdb")
        lack = lack_of_descriptors(len(files))  # a map keeps its file open
        if lack is not None:
            raise StoreError(f"{path}: a set of {len(files)} shards {lack}")
        self.shards = [FileStore(file) for file in files]
        _check_set(self.path, self.shards)
        self._starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def classes(self) -> list[str]:
        return self.shards[0].classes

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        # That of the same records in one file: a set may be split differently between two parts of a run.
        return layout.fingerprint(zip(self.column_parts("label"), self.column_parts("crc32"), strict=True))

    def column(self, name: str) -> npt.NDArray[Any]:
        """A whole index column, copied together from the shards."""
        return np.concatenate(list(self.column_parts(name)))

    def column_parts(self, name: str) -> Iterator[npt.NDArray[Any]]:
        for shard in self.shards:
            yield from shard.column_parts(name)

    def gather(self, name: str, records: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        result = np.empty(len(records), dtype=layout.INDEX_SCHEMA.field(name).type.to_pandas_dtype())
        for shard, places, inside in self.split(records):
            result[places] = shard.gather(name, inside)
        return result

    def arrays(self, records: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
        result: list[Any] = [None] * len(records)
        for shard, places, inside in self.split(records):
            for place, array in zip(places.tolist(), shard.arrays(inside), strict=True):
                result[place] = array
        return result

    def byte_ranges(
        self, records: npt.NDArray[np.int64]
    ) -> list[tuple[Path, npt.NDArray[np.uint64], npt.NDArray[np.uint32]]]:
        return [part for shard, _, inside in self.split(records) for part in shard.byte_ranges(inside)]

    def let_go(self) -> None:
        for shard in self.shards:
            shard.let_go()

    def split(
        self, records: npt.NDArray[np.int64]
    ) -> list[tuple[FileStore, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Records by shard: (shard, their places in ``records``, their indices inside the shard)."""
        which = np.searchsorted(self._starts, records, side="right") - 1
        return [
            (self.shards[index], places, records[places] - self._starts[index])
            for index in np.unique(which)
            for places in [np.flatnonzero(which == index)]
        ]

    def name(self, index: int) -> str:
        self._checked(index)
        shard, _, inside = self.split(np.array([index]))[0]
        return shard.name(int(inside[0]))


def _check_set(path: Path, shards: Sequence[FileStore]) -> None:
    """Refuse a set with a shard missing, doubled or of another set."""
    first = shards[0].meta.shard
    if first is None:
        raise StoreFormatError(
            f"{shards[0].path}: a store of its own, not a shard; name one file, or the shards of one set"
        )
    sets = {(shard.meta.shard or {}).get("set") for shard in shards}
    if len(sets) > 1 or any(shard.classes != shards[0].classes for shard in shards):
        odd = next((s for s in shards if (s.meta.shard or {}).get("set") != first.get("set")), shards[-1])
        raise StoreFormatError(
            f"{path}: {odd.path.name} belongs to another set than {shards[0].path.name}; name one set's shards"
        )
    indices = [(shard.meta.shard or {}).get("index") for shard in shards]
    count = first.get("count")
    if indices != list(range(len(shards))) or count != len(shards):
        missing = sorted(set(range(count if isinstance(count, int) else 0)) - set(indices))
        raise StoreFormatError(
            f"{path}: {len(shards)} shards, expected {count}; missing: {missing or 'none, one is there twice'}; "
            "run the conversion again or copy the missing files"
        )
