"""Iterate over all records of a store in file order: in threads, with little memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

__all__ = [
    "Progress",
    "ProgressCallback",
    "duplicates",
    "in_order",
    "runs",
]

_RUN_RECORDS = 256  # 28 MB of ImageNet photos; a thread holds only one of them at a time

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


ProgressCallback = Callable[[Progress], None]


def duplicates(names: pa.Array | pa.ChunkedArray) -> list[tuple[int, int]]:
    """Find records that share a name with an earlier one: (record, first record with that name)."""
    codes = names.dictionary_encode()
    chunks = codes.unify_dictionaries().chunks if isinstance(codes, pa.ChunkedArray) else [codes]
    indices = np.concatenate([chunk.indices.to_numpy() for chunk in chunks] or [np.empty(0, np.int32)])
    _, first, groups = np.unique(indices, return_index=True, return_inverse=True)
    earlier = first[groups]
    return [(int(record), int(earlier[record])) for record in np.flatnonzero(earlier != np.arange(len(indices)))]


def runs(num_records: int) -> Iterator[range]:
    """Yield all records in ranges of ``_RUN_RECORDS``."""
    for start in range(0, num_records, _RUN_RECORDS):
        yield range(start, min(start + _RUN_RECORDS, num_records))


def in_order(
    function: Callable[[_Task], _Result],
    tasks: Iterable[_Task],
    *,
    num_threads: int,
    stop: Callable[[], None] | None = None,
) -> Iterator[_Result]:
    """Yield a function's results in the order of the tasks; threads work a few tasks ahead.

    Args:
        stop: called if not all tasks are done, so that those in work end soon.
    """
    ahead: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for task in tasks:
                ahead.append(pool.submit(function, task))
                if len(ahead) > 2 * num_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BaseException:
            if stop is not None:
                stop()
            raise
        finally:
            for future in ahead:
                future.cancel()
