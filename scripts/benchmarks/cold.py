"""Measure records/s read in random order from storage, with a cold page cache: ``cold.py STORE``.

Each round measures every way of reading (see ``COLD_WAYS``) in a window of its own, in an order that is reversed
from round to round. Every window of a round reads the same records in the same order; before each, the store's
pages are dropped from the page cache, and the part that stays cached is measured and reported. A window begins
with the first request and ends when all records are read or its time is over.

``loader`` is the part of ``DaliLoader`` before DALI: plan, crops, readahead, prefetcher. It returns views of bytes
in the page cache, which is checked at the end of the window; ``get`` touches every page of such views, ``pread``
copies.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import page_cache
from liblmdb import plain_reading
from reading import ReadingSettings, reading_options, shuffled_part

from dali_lmdb.cli import Command, print_progress, print_result
from dali_lmdb.compare.report import Measured, machine, spread, versions
from dali_lmdb.loaders.external_source import feed_of
from dali_lmdb.loaders.prefetch import Prefetcher
from dali_lmdb.plan.augment import TrainTransform
from dali_lmdb.plan.batches import Planner
from dali_lmdb.plan.order import StepPlan
from dali_lmdb.plan.sampling import Listed
from dali_lmdb.store import Store, open_store

__all__ = ["COLD_WAYS", "ColdComparison", "ColdRound", "ColdWindow", "compare_cold", "main"]

_PREAD_THREADS = 16
COLD_WAYS = {
    "get": "liblmdb, one txn.get after another",
    "pread": f"exact ranges, {_PREAD_THREADS} threads of pread",
    "loader": "the loader's prefetcher, with readahead",
}
"""The ways that are measured, in the order of the table."""

_PAGE_BYTES = 4096
_MAX_WARM = 0.01  # fraction of the records that may be cached: some share pages with what opening the store reads


@dataclass(frozen=True, kw_only=True)
class ColdWindow:
    """One way's window of one round."""

    num_records: int
    elapsed_s: float
    used_bytes: int
    """Size of the records."""
    read_bytes: int | None
    """Bytes that this process read from storage, with readahead; None if the kernel does not report it."""
    warm_before: float
    """Fraction of the records in the page cache before, by their first and last pages; ideally 0."""
    warm_after: float
    """Fraction of the records read that are in the page cache afterwards; ideally 1."""

    @property
    def records_per_s(self) -> float:
        return self.num_records / self.elapsed_s

    @property
    def read_per_used(self) -> float | None:
        """Bytes read from storage over bytes of the records."""
        return None if self.read_bytes is None else self.read_bytes / max(self.used_bytes, 1)


@dataclass(frozen=True, kw_only=True)
class ColdRound:
    """One round's result, passed to the ``progress`` callback."""

    number: int
    """Number of the round, from 1."""
    windows: dict[str, ColdWindow]
    """Windows by way."""


@dataclass(frozen=True, kw_only=True)
class ColdComparison(Measured):
    """The result of ``compare_cold``."""

    settings: ReadingSettings
    rounds: list[ColdRound]

    @property
    def is_cold(self) -> bool:
        """True if dropping the page cache worked, so that the figures measure storage."""
        return self.warm_before <= _MAX_WARM

    @property
    def warm_before(self) -> float:
        """Fraction of the records in the page cache before the worst window; ideally 0."""
        return max(window.warm_before for one in self.rounds for window in one.windows.values())

    def speeds(self, way: str) -> list[float]:
        """Records/s of each round."""
        return [one.windows[way].records_per_s for one in self.rounds]

    def ratios(self, way: str, *, to: str) -> list[float]:
        """Records/s divided by those of another way in the same round, for each round."""
        return [one.windows[way].records_per_s / one.windows[to].records_per_s for one in self.rounds]

    def read_per_used(self, way: str) -> float | None:
        """Median over the rounds."""
        found = [one.windows[way].read_per_used for one in self.rounds]
        known = [value for value in found if value is not None]
        return statistics.median(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return self._described(
            is_cold=self.is_cold,
            warm_before=self.warm_before,
            ways={way: self._way(way) for way in COLD_WAYS},
        )

    def _way(self, way: str) -> dict[str, Any]:
        return {
            "records_per_s": spread(self.speeds(way)),
            "ratio_to_get": spread(self.ratios(way, to="get")),
            "ratio_to_pread": spread(self.ratios(way, to="pread")),
            "read_per_used": self.read_per_used(way),
            "warm_after": min(one.windows[way].warm_after for one in self.rounds),
        }


def compare_cold(
    store: str | os.PathLike[str],
    *,
    settings: ReadingSettings | None = None,
    progress: Callable[[ColdRound], None] | None = None,
) -> ColdComparison:
    """Measure the records/s that each way reads from storage.

    Args:
        store: one file or shards; no other process should have it open, or its pages stay in the page cache.
        settings: by default ``ReadingSettings()``.
        progress: called after every round.

    Raises:
        StoreError: the store cannot be opened, or is a classic database.
    """
    opened = open_store(store)
    with plain_reading(opened):  # refuses what it cannot read before anything is measured
        settings = (settings or ReadingSettings()).fitted_to(opened)
    part = shuffled_part(opened, settings.records)
    rounds = []
    for number in range(1, settings.rounds + 1):
        records = part.records(np.arange(settings.records), epoch=number)
        windows = {}
        for way in reversed(COLD_WAYS) if number % 2 else COLD_WAYS:
            windows[way] = _window(way, opened, records, settings)
        rounds.append(ColdRound(number=number, windows=windows))
        if progress is not None:
            progress(rounds[-1])
    return ColdComparison(
        store=str(store),
        num_records=len(opened),
        image_bytes=int(opened.column("num_bytes").sum(dtype=np.int64)),
        settings=settings,
        rounds=rounds,
        versions=versions(),
        machine=machine("cpu"),
    )


def _window(way: str, store: Store, records: npt.NDArray[np.int64], settings: ReadingSettings) -> ColdWindow:
    for path, _, _ in store.byte_ranges(records):
        page_cache.drop(path)
    warm_before = _warm(store, records)
    with _OPENERS[way](store, records, settings.batch_size) as read:
        read_before = page_cache.bytes_from_device()
        begin = time.perf_counter()
        num_records = read(begin + settings.seconds)
        elapsed_s = time.perf_counter() - begin
    read_after = page_cache.bytes_from_device()
    done = records[:num_records]
    return ColdWindow(
        num_records=num_records,
        elapsed_s=elapsed_s,
        used_bytes=int(store.gather("num_bytes", done).sum(dtype=np.int64)),
        read_bytes=None if read_before is None or read_after is None else read_after - read_before,
        warm_before=warm_before,
        warm_after=_warm(store, done),
    )


def _warm(store: Store, records: npt.NDArray[np.int64]) -> float:
    """Fraction of some records in the page cache, by their first and last pages."""
    return float(np.concatenate([page_cache.is_cached(*part) for part in store.byte_ranges(records)]).mean())


def _touch(values: memoryview) -> None:
    """Read a byte of every page."""
    bytes(values[::_PAGE_BYTES])
    bytes(values[-1:])


Read = Callable[[float], int]
"""Read records until all are read or a deadline (``time.perf_counter``); return their number, at least 1."""


@contextmanager
def _get(store: Store, records: npt.NDArray[np.int64], batch_size: int) -> Iterator[Read]:
    indices = records.tolist()
    with plain_reading(store) as get:

        def read(deadline: float) -> int:
            count = 0
            while count < len(indices) and (count == 0 or time.perf_counter() < deadline):
                _touch(get(indices[count]))
                count += 1
            return count

        yield read


@contextmanager
def _pread(store: Store, records: npt.NDArray[np.int64], batch_size: int) -> Iterator[Read]:
    with ExitStack() as stack:
        ranges = deque(_ranges(store, records, stack))

        def work(deadline: float) -> None:
            while ranges:
                try:
                    descriptor, offset, length = ranges.popleft()
                except IndexError:  # another thread was faster
                    return
                os.pread(descriptor, length, offset)
                if time.perf_counter() >= deadline:
                    return

        def read(deadline: float) -> int:
            threads = [threading.Thread(target=work, args=(deadline,)) for _ in range(_PREAD_THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return len(records) - len(ranges)

        yield read


def _ranges(store: Store, records: npt.NDArray[np.int64], stack: ExitStack) -> list[tuple[int, int, int]]:
    """(descriptor, offset, length) of each record, in the order given, whatever file it is in."""
    descriptors: dict[Path, int] = {}
    ranges = []
    for record in records:
        [(path, offsets, lengths)] = store.byte_ranges(np.array([record]))
        if path not in descriptors:
            descriptors[path] = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptors[path])
            os.posix_fadvise(descriptors[path], 0, 0, os.POSIX_FADV_RANDOM)
        ranges.append((descriptors[path], int(offsets[0]), int(lengths[0])))
    return ranges


@contextmanager
def _load(store: Store, records: npt.NDArray[np.int64], batch_size: int) -> Iterator[Read]:
    # A separate store: mapped pages stay in the page cache until the map is closed.
    planner = Planner(
        open_store(store.path),
        transform=TrainTransform(),
        steps=StepPlan(num_positions=len(records), batch_size=batch_size, last_batch="short"),
        sampling=Listed(records, seed=0, shuffle="none"),
        seed=0,
    )
    with ExitStack() as stack:

        def read(deadline: float) -> int:
            prefetcher = Prefetcher(planner, partial(feed_of, planner=planner), epoch=0, start=0)
            stack.callback(prefetcher.close)
            count = prefetcher.next()[0].end
            while count < len(records) and time.perf_counter() < deadline:
                count = prefetcher.next()[0].end
            return count

        yield read


_OPENERS: dict[str, Callable[[Store, npt.NDArray[np.int64], int], AbstractContextManager[Read]]] = {
    "get": _get,
    "pread": _pread,
    "loader": _load,
}


@click.command(cls=Command)
@reading_options
def main(store: str, *, batch_size: int, rounds: int, seconds: float, records: int, as_json: bool) -> None:
    """Measure the records per second read from storage in random order.

    The page cache is dropped before each window. The records are read one by one through liblmdb, by 16 threads
    that know the records' offsets, and by the loader's readahead.
    """
    settings = ReadingSettings(batch_size=batch_size, rounds=rounds, seconds=seconds, records=records)
    found = compare_cold(store, settings=settings, progress=_report)
    print_result(json.dumps(found.to_dict()) if as_json else _table(found))


def _report(done: ColdRound) -> None:
    speeds = [f"{way} {done.windows[way].records_per_s:,.0f}" for way in COLD_WAYS]
    print_progress(f"round {done.number}: {'  '.join(speeds)} records/s")


def _table(result: ColdComparison) -> str:
    settings = result.settings
    head = result.heading(
        f"cold, {settings.records:,} records in random order, batches of {settings.batch_size}, "
        f"{settings.rounds} rounds of at most {settings.seconds:g} s",
    )
    columns = f"{'':9}{'records/s':>10}{'min':>9}{'max':>9}{'x get':>8}{'min':>7}{'max':>7}"
    columns += f"{'x pread':>9}{'min':>7}{'max':>7}{'read/used':>11}"
    rows = []
    for way in COLD_WAYS:
        speed, to_get = spread(result.speeds(way)), spread(result.ratios(way, to="get"))
        to_pread, read = spread(result.ratios(way, to="pread")), result.read_per_used(way)
        rows.append(
            f"{way:<9}{speed['median']:>10,.0f}{speed['min']:>9,.0f}{speed['max']:>9,.0f}"
            f"{to_get['median']:>8.1f}{to_get['min']:>7.1f}{to_get['max']:>7.1f}"
            f"{to_pread['median']:>9.2f}{to_pread['min']:>7.2f}{to_pread['max']:>7.2f}"
            f"{'unknown' if read is None else f'{read:.2f}':>11}"
        )
    notes = [f"{way:<9}{meaning}" for way, meaning in COLD_WAYS.items()]
    notes.append("read/used: bytes read from storage per byte of the records")
    if not result.is_cold:
        notes += [
            "",
            f"NOT COLD: {result.warm_before:.0%} of the records were in the page cache before they were read,",
            "although the kernel was asked to drop them: the file system is in memory (tmpfs), another process",
            "has the store open, or you do not own the file, so that the kernel does not report it.",
        ]
    return "\n".join([head, columns, *rows, "", *notes])


if __name__ == "__main__":
    main()
