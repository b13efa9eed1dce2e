"""Iterate over all records of a store in file order: in threads, with little memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dali_lmdb.store import FileStore, ShardedStore, Store

__all__ = [
    "Part",
    "Progress",
    "Values",
    "in_order",
    "names_of",
    "parts_of",
    "repeated",
    "runs",
    "values_of",
]

_RUN_RECORDS = 256  # 28 MB of ImageNet photos; a thread holds one record of them at a time
_ADVISED_SLACK_BYTES = 16 << 20

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


class Progress(NamedTuple):
    """Progress of a check or an export, passed to the ``progress`` callback."""

    phase: str
    done: int
    """Number of records done."""
    total: int
    num_bytes: int
    """Size of the records done."""


class Part(NamedTuple):
    """One file of a store."""

    first: int
    """Index of its first record in the whole store."""
    store: Store


def parts_of(store: Store) -> list[Part]:
    """The files that a store consists of, in record order; the store itself if it is one file."""
    parts, first = [], 0
    files: Sequence[Store] = store.shards if isinstance(store, ShardedStore) else [store]
    for shard in files:
        parts.append(Part(first, shard))
        first += len(shard)
    return parts


def names_of(store: Store) -> pa.ChunkedArray:
    """Names of all records, strings.

    Raises:
        StoreDamagedError: the names were altered.
    """
    chunks: list[pa.Array] = []
    for _, part in parts_of(store):
        if isinstance(part, FileStore):
            chunks += part.names().chunks
        else:
            chunks.append(pa.array([part.name(index) for index in range(len(part))], pa.large_string()))
    return pa.chunked_array(chunks, pa.large_string())


def repeated(names: pa.Array | pa.ChunkedArray) -> list[tuple[int, int]]:
    """(record, the earlier record) for each name that occurred before."""
    codes = names.dictionary_encode()
    chunks = codes.unify_dictionaries().chunks if isinstance(codes, pa.ChunkedArray) else [codes]
    indices = np.concatenate([chunk.indices.to_numpy() for chunk in chunks] or [np.empty(0, np.int32)])
    _, first, places = np.unique(indices, return_index=True, return_inverse=True)
    earlier = first[places]
    return [(int(record), int(earlier[record])) for record in np.flatnonzero(earlier != np.arange(len(indices)))]


def runs(num_records: int) -> Iterator[range]:
    """Yield all records in ranges of ``_RUN_RECORDS``."""
    for start in range(0, num_records, _RUN_RECORDS):
        yield range(start, min(start + _RUN_RECORDS, num_records))


class Values:
    """The values of consecutive records, read with ``pread`` and not through a map.

    Mapped pages add to RSS, and the stores' maps are advised for random access. The kernel is asked to read all
    values ahead.

    Args:
        path: the LMDB file.
        offsets, lengths: positions of the values, uint64 and uint32 of shape (n,), in bytes.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, offsets: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint32]) -> None:
        self._offsets, self._lengths = offsets.tolist(), lengths.tolist()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed by __exit__
        if self._offsets:
            start = min(self._offsets)
            stop = max(self._offsets) + self._lengths[int(np.argmax(offsets))]
            if stop - start <= 2 * sum(self._lengths) + _ADVISED_SLACK_BYTES:  # otherwise they are not contiguous
                os.posix_fadvise(self._file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def read(self, position: int) -> bytes:
        """Read one value; it is shorter than expected if the file ends there.

        Raises:
            OSError: it cannot be read.
        """
        return os.pread(self._file.fileno(), self._lengths[position], self._offsets[position])

    def __enter__(self) -> Values:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def values_of(store: Store, run: range) -> Iterator[bytes]:
    """Yield the values of consecutive records of one file.

    Raises:
        StoreDamagedError: the file is not what its index says.
        OSError: it cannot be read.
    """
    if isinstance(store, FileStore):
        with Values(store.path, *store.extents(np.arange(run.start, run.stop))) as values:
            for position in range(len(run)):
                yield values.read(position)
        return
    for record in run:
        yield store.copy(record)


def in_order(
    function: Callable[[_Task], _Result], tasks: Iterable[_Task], *, num_threads: int
) -> Iterator[_Result]:
    """Yield a function's results in the order of the tasks; threads work a few tasks ahead."""
    ahead: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for task in tasks:
                ahead.append(pool.submit(function, task))
                if len(ahead) > 2 * num_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
