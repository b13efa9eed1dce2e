"""Several store files read as one: the shards of a set, in order."""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dali_lmdb.disk import describe_os_error, ensure_descriptors
from dali_lmdb.errors import StoreError, StoreFormatError, StoreNotFoundError
from dali_lmdb.store import layout
from dali_lmdb.store.base import Store
from dali_lmdb.store.fingerprint import fingerprint
from dali_lmdb.store.pages import is_lmdb
from dali_lmdb.store.reader import FileStore

__all__ = [
    "RESERVED_SUFFIXES",
    "ShardName",
    "ShardedStore",
    "set_files",
    "shard_files",
    "shard_name",
    "shard_path",
]

RESERVED_SUFFIXES = (".partial", ".partial-journal", ".bad.tsv", ".dali-index")
"""Suffixes of the files kept beside a store; no store's own name has one."""
_MAX_SHOWN = 5  # files in a message
_SHARD = re.compile(r"(.*[^.].*)-([0-9]{5})-of-([0-9]{5})(\.[^.]*)?", re.DOTALL)


def shard_path(store: Path, index: int, count: int) -> Path:
    """Path of a shard of a store: ``NAME-00000-of-00004.lmdb`` for ``NAME.lmdb``."""
    return store.with_name(f"{store.stem}-{index:05d}-of-{count:05d}{store.suffix}")


class ShardName(NamedTuple):
    """The parts of a shard's file name; sorts shards by set and position."""

    set_name: str
    """The conversion's output name, such as ``train.lmdb``."""
    num_shards: int
    position: int

    def pattern(self) -> str:
        """A glob pattern that matches the shards of this set and no others."""
        path = Path(self.set_name)
        return f"{glob.escape(path.stem)}-?????-of-{self.num_shards:05d}{glob.escape(path.suffix)}"


def shard_name(file: str | os.PathLike[str]) -> ShardName | None:
    """The inverse of ``shard_path``; None for a file that is not named like a shard."""
    match = _SHARD.fullmatch(os.path.basename(file))
    if match is None:
        return None
    stem, index, count, suffix = match.groups(default="")
    return ShardName(stem + suffix, int(count), int(index)) if int(index) < int(count) else None


def set_files(path: Path) -> list[Path]:
    """The shards of all sets with the name ``path``, whatever their number; empty if there are none.

    Raises:
        OSError: the folder cannot be listed.
        StoreError: a shard cannot be read.
    """
    return _shards_in(path.parent, set_name=path.name)


def shard_files(path: str | os.PathLike[str]) -> list[Path] | None:
    """The files of the set that ``path`` names, in order; None if it does not name a set.

    A set may be given by the name it was converted to (``train.lmdb`` for ``train-00000-of-00004.lmdb`` ...), by a
    glob pattern (``train-*.lmdb``), or by the folder that holds its shards and no other store. If a folder or
    pattern matches more than that, all of it is returned, and ``ShardedStore`` rejects it.

    Raises:
        StoreError: a folder cannot be listed, or a file cannot be read.
    """
    path = Path(path)
    try:
        if os.path.isdir(path):
            return _with_other_stores(path, _shards_in(path)) or None
        if os.path.lexists(path):
            return None
        found = set_files(path)
    except (FileNotFoundError, NotADirectoryError):  # the folder may be a pattern, too
        found = []
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # so it does not exist
            return None
        raise StoreError(describe_os_error(path.parent, "cannot be listed", error)) from error
    if not found and glob.has_magic(str(path)):
        matches = (Path(file) for file in glob.glob(str(path)) if not file.endswith(RESERVED_SUFFIXES))
        found = sorted(matches, key=_sort_key)
    return found or None


def _shards_in(folder: Path, *, set_name: str | None = None) -> list[Path]:
    """The shards in a folder, by set and position: all, or those of sets with one name.

    Parquet shards are named in the same way, so a set without any LMDB file is left out.
    """
    names = (name for name in os.listdir(folder) if not name.endswith(RESERVED_SUFFIXES))
    named = [(shard, folder / name) for name in names if (shard := shard_name(name))]
    sets = [
        [file for _, file in one]
        for (found, _), one in groupby(sorted(named), key=lambda pair: pair[0][:2])
        if set_name in (None, found)
    ]
    return [file for files in sets if any(map(is_lmdb, files)) for file in files]


def _with_other_stores(folder: Path, shards: list[Path]) -> list[Path]:
    """Shards, then all other LMDB files in their folder; there should be no others."""
    suffixes = {".mdb", *(file.suffix for file in shards)}
    others = {folder / name for name in os.listdir(folder) if os.path.splitext(name)[1] in suffixes}
    return shards and shards + sorted(filter(is_lmdb, others.difference(shards)))


def _sort_key(file: Path) -> tuple[ShardName, Path]:
    return shard_name(file) or ShardName("", 0, 0), file


class ShardedStore(Store):
    """All shards of one set; record indices continue from each shard to the next.

    Args:
        path: names the set, see ``shard_files``.

    Attributes:
        shards: the files' stores, in order.

    Raises:
        StoreNotFoundError: no shard there.
        StoreFormatError: a shard is missing, or belongs to another set; or the path names several sets.
        StoreError: a shard cannot be opened, or there are more than this process can open.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        files = shard_files(path)
        if not files:
            raise StoreNotFoundError(f"{path}: no shards there; expected files like NAME-00000-of-00004.lmdb")
        _check_one_set(self.path, files)
        lack = ensure_descriptors(len(files))  # a map keeps its file open
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

    @cached_property
    def fingerprint(self) -> str:
        # The same as for one file with these records: a run may be resumed with a set split differently.
        return fingerprint(zip(self.column_parts("label"), self.column_parts("crc32"), strict=True))

    def column(self, name: str) -> npt.NDArray[Any]:
        """A whole index column, concatenated from the shards."""
        return np.concatenate(list(self.column_parts(name)))

    def column_parts(self, name: str) -> Iterator[npt.NDArray[Any]]:
        for shard in self.shards:
            yield from shard.column_parts(name)

    def gather(self, name: str, records: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        result = np.empty(len(records), dtype=layout.INDEX_DTYPES[name])
        for shard, at, inside in self.split(records):
            result[at] = shard.gather(name, inside)
        return result

    def arrays(self, records: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
        result: list[Any] = [None] * len(records)
        for shard, at, inside in self.split(records):
            for row, array in zip(at.tolist(), shard.arrays(inside), strict=True):
                result[row] = array
        return result

    def byte_ranges(
        self, records: npt.NDArray[np.int64]
    ) -> list[tuple[Path, npt.NDArray[np.uint64], npt.NDArray[np.uint32]]]:
        return [part for shard, _, inside in self.split(records) for part in shard.byte_ranges(inside)]

    def names(self) -> pa.ChunkedArray:
        chunks = [chunk for shard in self.shards for chunk in shard.names().chunks]
        return pa.chunked_array(chunks, pa.large_string())

    def release_pages(self) -> None:
        for shard in self.shards:
            shard.release_pages()

    def split(
        self, records: npt.NDArray[np.int64]
    ) -> list[tuple[FileStore, npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Group records by shard: (shard, their rows in ``records``, their indices inside the shard)."""
        which = np.searchsorted(self._starts, records, side="right") - 1
        return [
            (self.shards[index], rows, records[rows] - self._starts[index])
            for index in np.unique(which)
            for rows in [np.flatnonzero(which == index)]
        ]

    def name(self, index: int) -> str:
        self._checked_index(index)
        shard, _, inside = self.split(np.array([index]))[0]
        return shard.name(int(inside[0]))


def _check_one_set(path: Path, files: Sequence[Path]) -> None:
    """Reject files whose names belong to several sets, or to a set and other stores."""
    first: dict[tuple[str, int] | None, Path] = {}
    for file in files:
        shard = shard_name(file)
        first.setdefault(None if shard is None else (shard.set_name, shard.num_shards), file)
    if len(first) > 1:
        shown = list(first.values())[:_MAX_SHOWN]
        found = " and ".join(file.name for file in shown)
        names = " or ".join(repr(_name_of_set(file)) for file in shown)
        raise StoreFormatError(f"{path}: matches {found}, expected the shards of one set; give {names}")


def _name_of_set(file: Path) -> str:
    """A path that matches only the set of this shard; the file itself if it is not a shard."""
    shard = shard_name(file)
    return str(file) if shard is None else os.path.join(glob.escape(str(file.parent)), shard.pattern())


def _check_set(path: Path, shards: Sequence[FileStore]) -> None:
    """Reject a set with a shard that is missing, renamed or of another conversion."""
    infos = [shard.meta.shard or {} for shard in shards]
    if {} in infos:
        alone = shards[infos.index({})].path
        raise StoreFormatError(f"{path}: {alone} is a store of its own, not a shard; open that file instead")
    for shard, info in zip(shards, infos, strict=True):
        if info["set"] != infos[0]["set"] or shard.classes != shards[0].classes:
            raise StoreFormatError(
                f"{path}: {shard.path.name} belongs to a different conversion from {shards[0].path.name}; "
                "keep only the shards of one conversion there"
            )
    indices, count = [info["index"] for info in infos], infos[0]["count"]
    if indices != list(range(len(shards))) or count != len(shards):
        missing = sorted(set(range(count)) - set(indices))
        what = f"missing: {missing[:_MAX_SHOWN]}" if missing else "their names do not match their contents"
        raise StoreFormatError(
            f"{path}: {len(shards)} shards, expected {count} in order; {what}; "
            "run the conversion again, or copy the missing files under their own names"
        )
