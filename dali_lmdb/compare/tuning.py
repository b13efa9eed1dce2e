"""Search for the arguments of ``DaliLoader`` that are fastest on this machine.

Successive halving (Jamieson and Talwalkar 2016): all candidates get a short window each, the better half of them
one twice as long, and so on. What is left then takes turns with the defaults, and is only recommended if it is
faster with 99 % confidence: the best of many measurements is partly the luckiest.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dali_lmdb.compare.confidence import Interval, interval_of
from dali_lmdb.compare.report import Measured, machine, versions
from dali_lmdb.compare.settings import CompareSettings
from dali_lmdb.compare.throughput import open_dali, repeated, resolve
from dali_lmdb.compare.window import Window, measure
from dali_lmdb.loaders.settings import DaliSettings
from dali_lmdb.store import Store, open_store

__all__ = ["Tuning", "tune"]

_SEARCH_SHARE = 0.6  # of the time; the rest compares what was found with the defaults
_FIRST_WINDOW_S = 1.0  # or less, if there is little time
_RUNGS = 3
_OVERHEAD = 1.5  # a measurement's time, with opening and warming up, as a multiple of its window
_LEAST_PAIRS = 5
_LEAST_CANDIDATES = 4

Values = dict[str, Any]
"""Arguments of ``DaliLoader`` that are not at their defaults."""


@dataclass(frozen=True, kw_only=True)
class Tuning(Measured):
    """The result of ``tune``."""

    settings: CompareSettings
    tried: list[tuple[Values, float]]
    """Each candidate and its images/s in its last window of the search, the fastest first."""
    best: Values
    """The candidate that the search has found, the defaults apart."""
    default_windows: list[Window]
    best_windows: list[Window]
    """Of turns; of each pair the first or the second is the default's."""

    @property
    def interval(self) -> Interval:
        """Where the ratio of the best one's images/s to the defaults' lies, with 99 % confidence."""
        pairs = zip(self.best_windows, self.default_windows, strict=True)
        return interval_of([best.images_per_s / default.images_per_s for best, default in pairs])

    @property
    def chosen(self) -> Values:
        """The best candidate if it is faster than the defaults, else nothing: the defaults."""
        return self.best if self.interval.low > 1 else {}

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return self._described(
            chosen=self.chosen,
            best=self.best,
            ratio_low=self.interval.low,
            ratio_high=self.interval.high,
            figures={
                name: _figures(windows)
                for name, windows in (("defaults", self.default_windows), ("best", self.best_windows))
            },
            tried=[{"values": values, "images_per_s": speed} for values, speed in self.tried],
        )


def tune(
    store: str | os.PathLike[str],
    *,
    minutes: float = 3.0,
    settings: CompareSettings | None = None,
    progress: Callable[[str], None] | None = None,
) -> Tuning:
    """Search for the fastest arguments of ``DaliLoader``.

    Args:
        store: the store that is read.
        minutes: how long to search, roughly.
        settings: task, batch size, image size and device; ``seconds`` is not used.
        progress: is given a line now and then.

    Raises:
        StoreError, RecordError, DeviceError: as ``compare_throughput``.
        ValueError: ``minutes`` is not above 0, or infinite.
    """
    if not 0 < minutes < math.inf:
        raise ValueError(f"minutes is {minutes}, expected a finite number of more than 0")
    begin, say = time.monotonic(), progress or (lambda line: None)
    opened = open_store(store)
    settings = resolve(replace(settings or CompareSettings(), arch=None), opened)
    data = repeated(opened, settings)
    total_s = 60 * minutes
    search_s = _SEARCH_SHARE * total_s
    measurements = search_s / _RUNGS / _OVERHEAD  # of one second, in a rung
    first_s = min(_FIRST_WINDOW_S, measurements / _LEAST_CANDIDATES)
    candidates = _candidates(settings, limit=max(_LEAST_CANDIDATES, int(measurements / first_s)))
    _window(data, settings, {}, seconds=first_s)  # warms up the page cache and the processor
    # A batch of large photos takes longer than a window should.
    search_s = min(search_s, total_s - 2 * _LEAST_PAIRS * (time.monotonic() - begin))

    speeds: dict[int, float] = {}
    running = list(range(len(candidates)))
    for rung in range(_RUNGS):
        end = begin + search_s * (rung + 1) / _RUNGS
        for place in running:
            if len(speeds) >= _LEAST_CANDIDATES and time.monotonic() > end:
                break
            window = _window(data, settings, candidates[place], seconds=first_s * 2**rung)
            speeds[place] = window.images_per_s
        running = sorted(set(running) & speeds.keys(), key=lambda place: -speeds[place])
        say(f"{len(running)} candidates: {speeds[running[0]]:,.0f} to {speeds[running[-1]]:,.0f} images/s")
        running = running[: max(2, len(running) // 2)]  # of two, one at least is not the defaults
    best = candidates[next(place for place in running if candidates[place])]

    defaults, bests = list[Window](), list[Window]()
    turn_s = 2 * first_s
    while len(bests) < _LEAST_PAIRS or time.monotonic() - begin < total_s - 2 * turn_s:
        order = [(defaults, {}), (bests, best)]
        for windows, values in reversed(order) if len(bests) % 2 else order:
            windows.append(_window(data, settings, values, seconds=turn_s))
    return Tuning(
        store=str(store),
        num_records=len(opened),
        image_bytes=int(opened.column("num_bytes").sum(dtype=np.int64)),
        settings=settings,
        versions=versions(),
        machine=machine(settings.device),
        tried=sorted(((candidates[place], speed) for place, speed in speeds.items()), key=lambda pair: -pair[1]),
        best=best,
        default_windows=defaults,
        best_windows=bests,
    )


def _candidates(settings: CompareSettings, *, limit: int) -> list[Values]:
    """The defaults, then each single change of them, then combinations in random order, the same on each call."""
    assert settings.workers is not None
    cores = settings.workers
    choices: dict[str, list[Any]] = {
        "num_threads": sorted({max(1, cores // 2), cores + 1, 3 * cores // 2, 2 * cores} - {cores}),
        "prefetch_queue_depth": [1, 3, 4],
        "readahead_bytes": [0, 4 * DaliSettings.readahead_bytes],
    }
    if settings.device == "cuda":
        choices |= {"decode_device": ["cpu"], "hw_decoder_load": [0.0, 0.25, 0.5, 0.8, 1.0]}
    single: list[Values] = [{name: value} for name, values in choices.items() for value in values]
    options = [[None, *values] for values in choices.values()]
    combined: list[Values] = [
        {name: value for name, value in zip(choices, combination, strict=True) if value is not None}
        for combination in itertools.product(*options)
    ]
    combined = [
        values
        for values in combined
        if len(values) > 1 and not {"decode_device", "hw_decoder_load"} <= set(values)
    ]
    order = np.random.default_rng(0).permutation(len(combined))
    return [{}, *single, *(combined[place] for place in order)][:limit]


def _window(data: Store, settings: CompareSettings, values: Values, *, seconds: float) -> Window:
    with open_dali(data, settings, replace(settings.dali, **values)) as loader:
        loader.set_epoch(0)
        return measure(loader, replace(settings, seconds=seconds), burst=1)


def _figures(windows: list[Window]) -> dict[str, float]:
    batches = np.concatenate([window.batch_s for window in windows])
    return {
        "images_per_s": float(np.median([window.images_per_s for window in windows])),
        "batch_ms_mean": 1000 * float(batches.mean()),
        "batch_ms_p99": 1000 * float(np.quantile(batches, 0.99)),
    }
