"""One LMDB file of raw image bytes with an index: format, reading, writing."""

from dali_lmdb.store.base import Store
from dali_lmdb.store.meta import Meta
from dali_lmdb.store.opening import open_store
from dali_lmdb.store.reader import FileStore
from dali_lmdb.store.shards import ShardedStore

__all__ = ["FileStore", "Meta", "ShardedStore", "Store", "open_store"]
