"""The index of a database that has none of its own, saved beside it as ``NAME.dali-index``.

One Arrow IPC stream of ``layout.INDEX_SCHEMA``; its metadata identifies the database (size and modification
time) and holds the columns' checksum. It is only a cache: a stale or damaged one is ignored, and failing to write
it is not an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from dali_lmdb.errors import StoreFormatError
from dali_lmdb.store.checksum import crc32
from dali_lmdb.store.encoding import columns_of, from_ipc, write_ipc
from dali_lmdb.store.layout import INDEX_SCHEMA
from dali_lmdb.store.regular import check_regular

__all__ = ["Columns", "Stamp", "load", "one_at_a_time", "save", "sidecar_path"]

_VERSION = 2  # to be raised whenever the same database would get different columns
_STAMP_KEY, _CRC_KEY = b"made_from", b"crc32"
_log = logging.getLogger(__name__)

Columns = dict[str, npt.NDArray[Any]]


class Stamp(NamedTuple):
    """Identifies the contents of a database and how its columns are computed."""

    size: int
    mtime_ns: int
    num_records: int
    version: int = _VERSION

    def to_bytes(self) -> bytes:
        return json.dumps(self._asdict(), sort_keys=True).encode()


def sidecar_path(database: Path) -> Path:
    """Path of the index of a database."""
    return database.with_name(database.name + ".dali-index")


def load(database: Path, stamp: Stamp) -> Columns | None:
    """Map the columns saved beside a database; None unless they are intact and match ``stamp``."""
    try:
        check_regular(sidecar_path(database), error=StoreFormatError)
        with open(sidecar_path(database), "rb") as file:
            map_ = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, StoreFormatError) as error:  # ValueError: an empty file
        _log.info("ignoring %s: %s", sidecar_path(database), error)
        return None
    batch = from_ipc(map_, INDEX_SCHEMA, num_records=stamp.num_records)
    metadata = {} if batch is None else batch.schema.metadata or {}
    if batch is None or metadata.get(_STAMP_KEY) != stamp.to_bytes():
        return None
    columns = columns_of(batch)
    return columns if metadata.get(_CRC_KEY) == _checksum(columns) else None


def save(database: Path, stamp: Stamp, columns: Columns) -> bool:
    """Save columns beside a database; return False if they cannot be written."""
    metadata = {_STAMP_KEY: stamp.to_bytes(), _CRC_KEY: _checksum(columns)}
    path = sidecar_path(database)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a process that was killed and had the same number
        with open(partial, "xb") as file:
            write_ipc(file, columns, INDEX_SCHEMA.with_metadata(metadata))
        os.replace(partial, path)
    except OSError as error:
        _log.info("%s cannot be written: %s", path, error.strerror)
        with contextlib.suppress(OSError):
            partial.unlink()
        return False
    return True


@contextlib.contextmanager
def one_at_a_time(database: Path) -> Iterator[None]:
    """Let one process build the index while the others wait for it, if it can be saved at all."""
    if not os.access(database.parent, os.W_OK):
        yield
        return
    with open(database, "rb") as file:
        with contextlib.suppress(OSError):  # a file system without locks: each process builds its own
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Closing is not enough: a process forked meanwhile would keep holding the lock.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


def _checksum(columns: Columns) -> bytes:
    crc = 0
    for field in INDEX_SCHEMA:
        crc = crc32(columns[field.name].tobytes(), crc)
    return str(crc).encode()
