"""One LMDB file of raw image bytes with an index: format, reading, writing."""

from dali_lmdb.store.base import Store
from dali_lmdb.store.layout import Change, Kind, Meta
from dali_lmdb.store.reader import FileStore, open_store

__all__ = ["Change", "FileStore", "Kind", "Meta", "Store", "open_store"]
