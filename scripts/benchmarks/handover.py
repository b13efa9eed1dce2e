"""Measure records/s handed over to DALI on one core, from memory, without decoding: ``handover.py STORE``.

This is all that Python does for a batch: plan, crops, checking the page cache, the prefetcher's thread, wrapping,
handing over. If it is faster than a GPU decodes, one process can keep one GPU busy.

The records are first read into the page cache. Then this thread and those that it starts (the prefetcher's and
DALI's) are bound to one core. The first window is a warm-up and does not count.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import numpy as np
from nvidia.dali import Pipeline, fn
from reading import ReadingSettings, reading_options, shuffled_part

from dali_lmdb.cli import Command, print_progress, print_result
from dali_lmdb.compare.report import Measured, machine, spread, versions
from dali_lmdb.loaders.external_source import InFlight, fields_of
from dali_lmdb.loaders.pipeline import feed_without_copy, source_arguments
from dali_lmdb.loaders.prefetch import Prefetcher
from dali_lmdb.loaders.run import Run
from dali_lmdb.plan.augment import TrainTransform, Transform
from dali_lmdb.plan.batches import Planner
from dali_lmdb.plan.order import StepPlan
from dali_lmdb.plan.sampling import Listed
from dali_lmdb.store import Store, open_store
from dali_lmdb.store.readahead import Readahead

__all__ = ["Handover", "HandoverRound", "define_handover", "main", "measure_handover"]


@dataclass(frozen=True, kw_only=True)
class HandoverRound:
    """One window's result."""

    number: int
    """0 for the warm-up, then from 1."""
    num_records: int
    elapsed_s: float
    cpu_s: float
    """CPU time of this process; less than ``elapsed_s`` if other processes used the core too."""

    @property
    def records_per_s(self) -> float:
        return self.num_records / self.elapsed_s

    @property
    def records_per_cpu_s(self) -> float:
        """Records/s if nothing else had used the core."""
        return self.num_records / max(self.cpu_s, 1e-9)


@dataclass(frozen=True, kw_only=True)
class Handover(Measured):
    """The result of ``measure_handover``."""

    settings: ReadingSettings
    rounds: list[HandoverRound]
    cold: float
    """Fraction of the bytes missing from the page cache when they were needed; ideally 0."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return self._described(
            records_per_s=spread([one.records_per_s for one in self.rounds]),
            records_per_cpu_s=spread([one.records_per_cpu_s for one in self.rounds]),
            cold=self.cold,
        )


def measure_handover(
    store: str | os.PathLike[str],
    *,
    settings: ReadingSettings | None = None,
    progress: Callable[[HandoverRound], None] | None = None,
) -> Handover:
    """Measure how many records a second one core hands over to DALI.

    Args:
        store: a store.
        settings: by default ``ReadingSettings()``.
        progress: called after every window.

    Raises:
        StoreError: the store cannot be opened.
    """
    opened = open_store(store)
    settings = (settings or ReadingSettings()).fitted_to(opened)
    part = shuffled_part(opened, settings.records)
    planner = Planner(
        opened,
        transform=TrainTransform(),
        steps=StepPlan(num_positions=settings.records, batch_size=settings.batch_size),
        sampling=part,
        seed=0,
    )
    _warm_page_cache(opened, part)
    prefetcher = Prefetcher(planner, partial(feed_without_copy, planner=planner), epoch=0, start=0)
    try:
        with _one_core():
            rounds = _windows(prefetcher, settings, progress)
    finally:
        prefetcher.close()
    assert prefetcher.readahead is not None
    sizes = opened.gather("num_bytes", part.records(np.arange(settings.records), epoch=0))
    handed_over = sizes.mean() * sum(one.num_records for one in rounds)
    return Handover(
        store=str(store),
        num_records=len(opened),
        image_bytes=int(opened.column("num_bytes").sum(dtype=np.int64)),
        settings=settings,
        rounds=rounds[1:],
        cold=prefetcher.readahead.bytes_read / max(handed_over, 1),
        versions=versions(),
        machine=machine("cpu"),
    )


def _warm_page_cache(store: Store, part: Listed) -> None:
    readahead = Readahead(store)
    try:
        readahead.wait(part.records(np.arange(part.num_positions), epoch=0))
    finally:
        readahead.close()


@contextmanager
def _one_core() -> Iterator[None]:
    """Bind this thread, and the threads that it starts, to one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _windows(
    prefetcher: Prefetcher, settings: ReadingSettings, progress: Callable[[HandoverRound], None] | None
) -> list[HandoverRound]:
    transform = TrainTransform()
    define = partial(define_handover, transform=transform, batch_size=settings.batch_size)
    run = Run(prefetcher, define, next_place=(0, 0), num_inputs=len(fields_of(transform)))
    rounds = []
    for number in range(settings.rounds + 1):
        num_records = 0
        begin, cpu_begin = time.perf_counter(), time.process_time()
        while time.perf_counter() - begin < settings.seconds:
            batch, _ = run.next(lambda plan, feed: InFlight(plan, feed, num_substituted=0))
            num_records += len(batch.plan.records)
        one = HandoverRound(
            number=number,
            num_records=num_records,
            elapsed_s=time.perf_counter() - begin,
            cpu_s=time.process_time() - cpu_begin,
        )
        rounds.append(one)
        if progress is not None:
            progress(one)
    return rounds


def define_handover(source: Callable[[Any], Any], *, transform: Transform, batch_size: int) -> Pipeline:
    """Define a graph with the inputs of ``define_pipeline`` that decodes nothing, to measure the source alone.

    Outputs: labels, as there; then the shapes of the other inputs, so that these are used too.
    """
    pipeline = Pipeline(batch_size=batch_size, num_threads=1, device_id=None)
    with pipeline:
        encoded, labels, *numbers = fn.external_source(source, **source_arguments(fields_of(transform)))
        pipeline.set_outputs(labels, *(given.shape() for given in (encoded, *numbers)))
    return pipeline


@click.command(cls=Command)
@reading_options
def main(store: str, *, batch_size: int, rounds: int, seconds: float, records: int, as_json: bool) -> None:
    """Measure the records per second that one core hands over to DALI from memory, without decoding."""
    settings = ReadingSettings(batch_size=batch_size, rounds=rounds, seconds=seconds, records=records)
    found = measure_handover(store, settings=settings, progress=_report)
    print_result(json.dumps(found.to_dict()) if as_json else _table(found))


def _report(done: HandoverRound) -> None:
    name = f"round {done.number}" if done.number else "warm-up"
    print_progress(f"{name}: {done.records_per_s:,.0f} records/s")


def _table(result: Handover) -> str:
    settings = result.settings
    head = result.heading(
        f"handover, {settings.records:,} records in random order, batches of {settings.batch_size}, one core, "
        f"{settings.rounds} rounds of {settings.seconds:g} s",
    )
    columns = f"{'':9}{'records/s':>10}{'min':>9}{'max':>9}"
    rows = [
        f"{name:<9}{found['median']:>10,.0f}{found['min']:>9,.0f}{found['max']:>9,.0f}"
        for name, found in (
            ("elapsed", spread([one.records_per_s for one in result.rounds])),
            ("cpu", spread([one.records_per_cpu_s for one in result.rounds])),
        )
    ]
    notes = [
        "elapsed  per second of wall time",
        "cpu      per second of CPU time: the rate if nothing else had used the core",
    ]
    if result.cold > 0.01:
        notes += [
            "",
            f"NOT WARM: {result.cold:.0%} of the bytes had to be read from storage; use fewer --records.",
        ]
    return "\n".join([head, columns, *rows, "", *notes])


if __name__ == "__main__":
    main()
