"""How far the images of two loaders are from each other, in grey levels: from 0 to 255, before normalising."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dali_lmdb.view.delivery import Pixels, Shown

__all__ = ["Parity", "Worst", "measure_parity"]

_NUM_WORST = 8


class Worst(NamedTuple):
    """One of the images that differ most."""

    mean: float
    """Mean absolute difference of its values."""
    record: int
    left: Pixels
    right: Pixels

    @property
    def difference(self) -> npt.NDArray[np.int64]:
        """Absolute difference of each value."""
        return _difference(self.left, self.right)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The result of ``measure_parity``."""

    records: npt.NDArray[np.int64]
    """The records that both have, of shape (n,)."""
    means: npt.NDArray[np.float64]
    """Mean absolute difference of each one's values."""
    maxima: npt.NDArray[np.int64]
    """Largest absolute difference of each one's values."""
    histogram: npt.NDArray[np.int64]
    """How many values differ by 0 to 255, of shape (256,)."""
    worst: list[Worst]
    """Those with the largest means above 0, the largest first."""
    only_left: dict[int, str]
    """Records that only the left one can decode, with the reason of the other."""
    only_right: dict[int, str]
    bad: dict[int, str]
    """Records that neither can decode."""

    @property
    def mean(self) -> float:
        """Mean absolute difference of all values."""
        total = self.histogram.sum()
        return float(self.histogram @ np.arange(256) / total) if total else 0.0

    def num_beyond(self, tolerance: float) -> int:
        """Number of images whose mean difference is larger, and of those that only one can decode."""
        return int((self.means > tolerance).sum()) + len(self.only_left) + len(self.only_right)


def measure_parity(
    left: Iterable[tuple[int, Shown]],
    right: Iterable[tuple[int, Shown]],
    *,
    each: Callable[[int, Pixels, Pixels], None] | None = None,
) -> Parity:
    """Compare images, record by record.

    Args:
        left, right: records, each once, with images or the reasons why there are none; in any order, but of what
            comes at different places one is kept until the other comes.
        each: called with each record that both have, and its images.

    Raises:
        ValueError: they do not have the same records, or images of different sizes.
    """
    rows: list[tuple[int, float, int]] = []
    histogram = np.zeros(256, np.int64)
    worst: list[tuple[float, int, Pixels, Pixels]] = []
    only_left, only_right, bad = dict[int, str](), dict[int, str](), dict[int, str]()
    for record, one, other in _pairs(left, right):
        if isinstance(one, str) and isinstance(other, str):
            bad[record] = one
        elif isinstance(one, str):
            only_right[record] = one
        elif isinstance(other, str):
            only_left[record] = other
        else:
            if one.shape != other.shape:
                raise ValueError(f"record {record}: images of shape {one.shape} and {other.shape}")
            counts = np.bincount(_difference(one, other).ravel(), minlength=256)
            mean, largest = float(counts @ np.arange(256) / one.size), int(np.flatnonzero(counts)[-1])
            rows.append((record, mean, largest))
            histogram += counts
            if mean > 0:
                # Record numbers differ, so images are never compared.
                heapq.heappush(worst, (mean, -record, one, other))
                if len(worst) > _NUM_WORST:
                    heapq.heappop(worst)
            if each is not None:
                each(record, one, other)
    return Parity(
        records=np.array([row[0] for row in rows], np.int64),
        means=np.array([row[1] for row in rows], np.float64),
        maxima=np.array([row[2] for row in rows], np.int64),
        histogram=histogram,
        worst=[Worst(mean, -record, one, other) for mean, record, one, other in sorted(worst, reverse=True)],
        only_left=only_left,
        only_right=only_right,
        bad=bad,
    )


def _difference(one: Pixels, other: Pixels) -> npt.NDArray[np.int64]:
    difference: npt.NDArray[np.int64] = np.abs(one.astype(np.int64) - other)
    return difference


def _pairs(
    left: Iterable[tuple[int, Shown]], right: Iterable[tuple[int, Shown]]
) -> Iterator[tuple[int, Shown, Shown]]:
    waiting: tuple[dict[int, Shown], dict[int, Shown]] = {}, {}
    for both in zip_longest(left, right):
        for side, item in enumerate(both):
            if item is None:
                continue
            record, shown = item
            if record not in waiting[1 - side]:
                waiting[side][record] = shown
            elif side:
                yield record, waiting[0].pop(record), shown
            else:
                yield record, shown, waiting[1].pop(record)
    alone = sorted([*waiting[0], *waiting[1]])
    if alone:
        raise ValueError(f"record {alone[0]} and {len(alone) - 1} more came from one side only")
