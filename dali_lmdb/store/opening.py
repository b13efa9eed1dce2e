"""Open anything that holds records: a store, its shards, or a classic database."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from dali_lmdb.errors import StoreFormatError, StoreNotFoundError
from dali_lmdb.store.base import Store
from dali_lmdb.store.classic import ClassicStore, database_file, is_classic
from dali_lmdb.store.pages import PageFile
from dali_lmdb.store.reader import FileStore
from dali_lmdb.store.shards import ShardedStore, shard_files, shard_name

__all__ = ["open_store"]


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a store for reading.

    Args:
        path: a store or a classic database, as a file or a folder with ``data.mdb``; or a glob pattern, a folder
            or the common name of a set of shards.

    Raises:
        StoreNotFoundError, StoreFormatError, StoreDamagedError: see ``dali_lmdb.errors``.
    """
    if not os.fspath(path):
        raise StoreNotFoundError("the store's path is empty; expected a file, a folder of shards or a pattern")
    if shard_files(path):
        return ShardedStore(path)
    if glob.has_magic(os.fspath(path)) and not os.path.lexists(path):
        raise StoreNotFoundError(f"no store at {path}, and no file matches that pattern; give existing files")
    file = database_file(path)
    if is_classic(PageFile(file)):
        return ClassicStore(path)
    store = FileStore(file)
    if store.meta.shard is not None:
        shard = shard_name(path)
        advice = "restore its original name, then open the set"
        if shard is not None:
            advice = f"open the set: {Path(path).with_name(shard.set_name)}"
        raise StoreFormatError(f"{path}: one of {store.meta.shard['count']} shards; {advice}")
    return store
