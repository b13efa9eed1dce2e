"""What DALI calls for bytes: an endless sequence of planned batches, zero-copy from the store's map."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dali_lmdb.loaders.reader import BatchReader, Feed
from dali_lmdb.plan.augment import Transform
from dali_lmdb.plan.batches import BatchPlan, Planner

__all__ = ["Field", "Source", "feed_of", "fields_of"]


Repair = Callable[[BatchPlan, Feed], tuple[BatchPlan, Feed]]


class Field(NamedTuple):
    """One of the arrays that DALI is given for a batch."""

    name: str
    dtype: type[np.generic]
    ndim: int
    """Of one sample."""


_ALWAYS = (
    Field("encoded", np.uint8, 1),
    Field("labels", np.int64, 0),
    Field("records", np.int64, 0),
    Field("anchors", np.int32, 1),
    Field("shapes", np.int32, 1),
    Field("roi_start", np.float32, 1),
    Field("roi_end", np.float32, 1),
    Field("size", np.float32, 1),
    Field("mirror", np.int32, 0),
)
_COLOR = tuple(Field(name, np.float32, 0) for name in ("hue", "saturation", "brightness", "contrast"))
_ERASE = (Field("erase_anchor", np.float32, 1), Field("erase_shape", np.float32, 1))


def fields_of(transform: Transform) -> tuple[Field, ...]:
    """What DALI is given for a batch, in this order; names after ``records`` are those of ``Augmentation``."""
    return _ALWAYS + _COLOR * transform.changes_color + _ERASE * transform.erases


def feed_of(plan: BatchPlan, planner: Planner) -> Feed:
    """A planned batch as the arrays of ``fields_of``, each with the batch as its outer dimension."""
    augmentation = planner.augment(plan)._asdict()
    names = [field.name for field in fields_of(planner.transform)[3:]]
    encoded = planner.store.arrays(plan.records)
    return encoded, planner.labels(plan), plan.records, *(augmentation[name] for name in names)


class Source:
    """The callback of ``fn.external_source(batch=True, batch_info=True)``.

    It never stops: DALI prefetches past the end of an epoch, so the source goes on with the next one, and
    the loader counts. Every batch given to DALI is kept in ``in_flight`` until the loader takes it out
    again: that says which records a failed batch held, and keeps their bytes alive, since DALI reads them
    in place (``no_copy``).

    DALI calls it batches ahead of the loader, so an error of the reader would come too early, and cost the good
    batches in flight. While there are some, it is kept instead, and DALI is given the last batch again, as
    often as it asks; such a stand-in is not in flight.

    Args:
        reader: where batches come from.
        repair: called with each batch; returns it, or another one in its place.

    Attributes:
        in_flight: batches given to DALI, in order.
        error: what the reader raised; due when ``in_flight`` is empty.
    """

    def __init__(self, reader: BatchReader, repair: Repair) -> None:
        self._batches: tuple[BatchReader, Repair] | None = (reader, repair)
        self.in_flight: deque[tuple[BatchPlan, Feed]] = deque()
        self.error: Exception | None = None
        self._stand_in: Feed | None = None

    def __call__(self, batch_info: object) -> Feed:
        """The next batch; ``batch_info`` is DALI's and not needed.

        Raises:
            Exception: of the reader, if nothing is in flight.
        """
        assert self._batches is not None
        reader, repair = self._batches
        if self.error is None:
            try:
                batch = repair(*reader.next())
            except Exception as error:
                if not self.in_flight:
                    raise
                self.error, self._stand_in = error, self.in_flight[-1][1]
            else:
                self.in_flight.append(batch)
                return batch[1]
        if not self.in_flight or self._stand_in is None:
            raise self.error
        return self._stand_in

    def stop(self) -> None:
        """Give no more batches; those in flight stay, for a pipeline that may be at work on them."""
        self._batches = None
        # Its traceback leads back to here, and so would keep the pipeline until the collector comes by.
        self.error = None

    def close(self) -> None:
        """Let go of the data. DALI's operators refer to one another and to this, until the collector comes by."""
        self.stop()
        self.in_flight.clear()
        self._stand_in = None
