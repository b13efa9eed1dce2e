"""What DALI calls for bytes: an endless sequence of planned batches, zero-copy from the store's map."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dali_lmdb.loaders.pillow import REFUSED, encoded_for_dali
from dali_lmdb.loaders.prefetch import Feed, Prefetcher
from dali_lmdb.plan.augment import Transform
from dali_lmdb.plan.batches import BatchPlan, Planner

__all__ = ["ExternalSource", "Field", "InFlight", "feed_of", "fields_of"]


class Field(NamedTuple):
    """One of DALI's input arrays for a batch."""

    name: str
    dtype: type[np.generic]
    ndim: int
    """Number of dimensions of one sample."""


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
    """DALI's inputs for a batch, in order; names after ``records`` are those of ``Augmentation``."""
    return _ALWAYS + _COLOR * transform.changes_color + _ERASE * transform.erases


def feed_of(plan: BatchPlan, planner: Planner) -> Feed:
    """A planned batch as the arrays of ``fields_of``, each of shape (n, ...)."""
    augmentation = planner.augment(plan)._asdict()
    names = [field.name for field in fields_of(planner.transform)[3:]]
    encoded = encoded_for_dali(planner.store, plan.records)
    for place in np.flatnonzero((augmentation["shapes"] < 1).any(axis=1)):  # the index has no size of it
        encoded[place] = REFUSED
    return encoded, planner.labels(plan), plan.records, *(augmentation[name] for name in names)


class InFlight(NamedTuple):
    """A batch that DALI works on."""

    plan: BatchPlan
    feed: Feed
    num_substituted: int
    """Number of records shown in place of planned ones that cannot be decoded."""


class ExternalSource:
    """The callback of ``fn.external_source(batch=True, batch_info=True)``.

    It never stops: DALI prefetches past the end of an epoch, so the source continues with the next one, and the
    loader counts the steps.

    DALI calls it several batches ahead of the loader, so raising an error of the prefetcher at once would cost the
    good batches in flight. While there are some, the error takes the place of its batch in ``in_flight``, and DALI
    gets the last batch again.

    Args:
        prefetcher: gives the batches; the source closes it.
        prepare: called with each batch before DALI gets it; may substitute records.

    Attributes:
        in_flight: batches given to DALI, in order, and errors in place of failed ones; the loader removes each
            when DALI is done with it. It tells which records a failed batch held, and keeps their bytes alive,
            since DALI reads them in place (``no_copy``).
    """

    def __init__(self, prefetcher: Prefetcher, prepare: Callable[[BatchPlan, Feed], InFlight]) -> None:
        self.in_flight: deque[InFlight | Exception] = deque()
        self._prepare: Callable[[BatchPlan, Feed], InFlight] | None = prepare
        self._stand_in: Feed | None = None
        self._prefetcher: Prefetcher | None = prefetcher
        # So that a source dropped without close() ends the thread, which does not refer to it.
        self._close_prefetcher = weakref.finalize(self, prefetcher.close)

    def continue_with(self, prefetcher: Prefetcher) -> None:
        """Take the next batches from another prefetcher; those in flight stay."""
        self._close_prefetcher()
        self._prefetcher = prefetcher
        self._close_prefetcher = weakref.finalize(self, prefetcher.close)

    def __call__(self, batch_info: object) -> Feed:
        """The next batch; ``batch_info`` is DALI's and not needed.

        Raises:
            Exception: of the prefetcher, if nothing is in flight.
        """
        assert self._prefetcher is not None, "a dropped pipeline asks for a batch"
        assert self._prepare is not None
        try:
            batch = self._prepare(*self._prefetcher.next())
        except Exception as error:
            if not self.in_flight:
                raise
            last = self.in_flight[-1]
            if isinstance(last, InFlight):
                self._stand_in = last.feed
            assert self._stand_in is not None
            # Without the traceback's entry for this function, through which it would refer to itself.
            trace = error.__traceback__ and error.__traceback__.tb_next
            self.in_flight.append(error.with_traceback(trace))
            return self._stand_in
        self.in_flight.append(batch)
        return batch.feed

    @property
    def fill(self) -> int:
        """Number of batches in flight or ready for DALI."""
        return len(self.in_flight) + (self._prefetcher.fill if self._prefetcher is not None else 0)

    def stop(self) -> None:
        """Give no more batches; those in flight stay, since a pipeline may still be working on them."""
        self._close_prefetcher()
        self._prefetcher = self._prepare = None

    def close(self) -> None:
        """Release the data. DALI's operators refer to one another and to this until garbage collection."""
        self.stop()
        self.in_flight.clear()
        self._stand_in = None
