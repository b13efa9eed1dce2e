"""What DALI calls for bytes: an endless sequence of planned batches, zero-copy from the store's map."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from dali_lmdb.plan.batches import BatchPlan, Planner

__all__ = ["FIELDS", "Feed", "Source", "feed_of"]

FIELDS: tuple[tuple[str, type[np.generic], int], ...] = (
    ("encoded", np.uint8, 1),
    ("labels", np.int64, 0),
    ("records", np.int64, 0),
    ("anchors", np.int32, 1),
    ("shapes", np.int32, 1),
    ("roi_start", np.float32, 1),
    ("roi_end", np.float32, 1),
    ("mirror", np.int32, 0),
)
"""(name, dtype, dimensions of one sample) of what ``Source`` returns, in this order."""

Feed = tuple[Any, ...]


def feed_of(plan: BatchPlan, planner: Planner) -> Feed:
    """A planned batch as the arrays of ``FIELDS``, each with the batch as its outer dimension."""
    return planner.store.arrays(plan.records), planner.labels(plan), plan.records, *planner.augment(plan)


class Source:
    """The callback of ``fn.external_source(batch=True, batch_info=True)``.

    It never stops: DALI prefetches past the end of an epoch, so the source goes on with the next one, and
    the loader counts. Every batch given to DALI is kept in ``in_flight`` until the loader takes it out
    again: that says which records a failed batch held, and keeps their bytes alive, since DALI reads them
    in place (``no_copy``).

    Args:
        planner: of this rank, with at least one step in an epoch.
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._epoch, self._start = 0, 0
        self.in_flight: deque[tuple[BatchPlan, Feed]] = deque()

    def seek(self, epoch: int, start: int) -> None:
        """Go on from position ``start`` of ``epoch`` with the next call."""
        self._epoch, self._start = epoch, start

    def __call__(self, batch_info: object) -> Feed:
        """The next batch; ``batch_info`` is DALI's and not needed."""
        plan = self._planner.plan(self._epoch, self._start)
        if plan is None:
            self._epoch, self._start = self._epoch + 1, 0
            plan = self._planner.plan(self._epoch, self._start)
            assert plan is not None, "a loader without steps must not ask for a batch"
        self._start = plan.end
        feed = feed_of(plan, self._planner)
        self.in_flight.append((plan, feed))
        return feed
