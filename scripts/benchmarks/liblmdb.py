"""Read records through liblmdb: the baseline of ``cold.py``."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import lmdb

from dali_lmdb.disk import describe_os_error
from dali_lmdb.errors import StoreError, StoreFormatError
from dali_lmdb.store import layout
from dali_lmdb.store.base import Store
from dali_lmdb.store.reader import FileStore
from dali_lmdb.store.shards import ShardedStore

__all__ = ["plain_reading"]


@contextmanager
def plain_reading(store: Store) -> Iterator[Callable[[int], memoryview]]:
    """Yield a function that reads one record with ``txn.get``; the files are closed on exit.

    It returns views of liblmdb's map, which must be dropped before the exit. liblmdb trusts the pages that it
    maps: do not use this on a file that may be damaged.

    Raises:
        StoreFormatError: a classic database, not a store.
        StoreError: liblmdb cannot open the file.
    """
    if isinstance(store, ShardedStore):
        shards = store.shards
    elif isinstance(store, FileStore):
        shards = [store]
    else:
        raise StoreFormatError(f"{store.path}: a classic database, expected a store; convert it first")
    starts = [0]
    for shard in shards:
        starts.append(starts[-1] + len(shard))
    with ExitStack() as stack:
        transactions = [stack.enter_context(_transaction(shard.path)) for shard in shards]

        def get(index: int) -> memoryview:
            shard = bisect.bisect_right(starts, index) - 1
            value = transactions[shard].get(layout.record_key(index - starts[shard]))
            assert isinstance(value, memoryview), "every index below len(store) has a record"
            return value

        yield get


@contextmanager
def _transaction(path: Path) -> Iterator[lmdb.Transaction]:
    """Open a read transaction that returns views, without the kernel's readahead: access is random."""
    try:
        environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        code = getattr(error, "code", 0)  # the system's errno; LMDB's own are negative, py-lmdb's are 0
        if code > 0:
            cause = OSError(code, os.strerror(code))
            raise StoreError(describe_os_error(path, "liblmdb cannot open it", cause)) from error
        raise StoreError(f"{path}: liblmdb cannot open it: {error}; close it elsewhere in this process") from error
    try:
        with environment.begin(buffers=True) as transaction:
            yield transaction
    finally:
        environment.close()
