"""A thread that plans batches and reads their bytes ahead of DALI, into a bounded queue."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from dali_lmdb.plan.batches import BatchPlan, Planner
from dali_lmdb.store.readahead import Readahead

__all__ = ["READAHEAD_BYTES", "BatchReader", "Feed"]

Feed = tuple[Any, ...]
"""What DALI is given for one batch, see ``source.fields_of``."""

READAHEAD_BYTES = 128 << 20
"""Keeps a device of 1 GB/s busy through 100 ms of waiting, which is more than disks and most network file systems
need."""

# However small the batches: planning more of them would only keep the first one waiting.
_AHEAD_BATCHES = 64
_QUEUE_BATCHES = 2  # ready to be handed over; DALI's own prefetch queue comes on top


class BatchReader:
    """Endless batches of one rank, in order, epoch after epoch.

    Args:
        planner: of this rank, with at least one step in an epoch.
        feed_of: makes what DALI is given from a plan; runs in the thread.
        readahead_bytes: bytes asked for ahead of the batch that is due; 0 turns reading ahead off.

    The thread starts with the first ``seek`` and stops with ``close``.
    """

    def __init__(self, planner: Planner, feed_of: Callable[[BatchPlan], Feed], *, readahead_bytes: int) -> None:
        self._planner, self._feed_of = planner, feed_of
        self._readahead_bytes = readahead_bytes
        self.readahead = Readahead(planner.store) if readahead_bytes else None
        self._changed = threading.Condition()
        self._queue: deque[tuple[BatchPlan, Feed] | BaseException] = deque()
        self._place: tuple[int, int] | None = None
        self._generation = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def seek(self, epoch: int, start: int) -> None:
        """Go on from position ``start`` of ``epoch``; what was read ahead is forgotten."""
        with self._changed:
            self._queue.clear()
            self._place = (epoch, start)
            self._generation += 1
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dali_lmdb reader", daemon=True)
        if self._thread.ident is None:
            self._thread.start()

    def next(self) -> tuple[BatchPlan, Feed]:
        """The next batch; waits for it.

        Raises:
            BaseException: what went wrong in the thread, again and again until ``seek`` starts it anew.
            RuntimeError: the reader is closed, or was while this waited.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                raise RuntimeError("the reader of batches is closed; make a new loader")
            item = self._queue[0]
            if isinstance(item, BaseException):
                raise item
            self._queue.popleft()
            self._changed.notify_all()
        return item

    @property
    def fill(self) -> int:
        """Batches that wait to be taken."""
        return len(self._queue)

    def close(self) -> None:
        """Stop the thread and wait for it."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self.readahead is not None:
            self.readahead.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._place is not None)
                if self._closed:
                    return
                assert self._place is not None
                (epoch, start), self._place = self._place, None
                generation = self._generation
            try:
                self._produce(epoch, start, generation)
            except BaseException as error:  # handed to the consumer, whatever it is
                self._put(error, generation)

    def _produce(self, epoch: int, start: int, generation: int) -> None:
        """Batches from a place on, until ``seek`` or ``close``."""
        plans = self._planner.plans_from(epoch, start)
        ahead: deque[tuple[BatchPlan, int]] = deque()
        ahead_bytes = 0
        error: Exception | None = None
        while generation == self._generation and not self._closed:
            while error is None and (
                not ahead
                or (self._reading_ahead() and ahead_bytes < self._readahead_bytes and len(ahead) < _AHEAD_BATCHES)
            ):
                try:
                    ahead.append(self._announced(next(plans)))
                except Exception as raised:  # of a later batch: those before it come first
                    error = raised
                else:
                    ahead_bytes += ahead[-1][1]
            if error is not None and not ahead:
                raise error
            plan, num_bytes = ahead.popleft()
            ahead_bytes -= num_bytes
            if self.readahead is not None:
                self.readahead.wait(plan.records)
            if not self._put((plan, self._feed_of(plan)), generation):
                return

    def _announced(self, plan: BatchPlan) -> tuple[BatchPlan, int]:
        """A plan with how many of its bytes the kernel was asked for."""
        if self.readahead is None or not self.readahead.cold:
            return plan, 0
        num_bytes = int(self._planner.store.gather("num_bytes", plan.records).sum(dtype=np.int64))
        self.readahead.announce(plan.records)
        return plan, num_bytes

    def _reading_ahead(self) -> bool:
        return self.readahead is not None and self.readahead.cold

    def _put(self, item: tuple[BatchPlan, Feed] | BaseException, generation: int) -> bool:
        """Queue an item when there is room; False if it is not wanted any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or generation != self._generation or len(self._queue) < _QUEUE_BATCHES
            )
            if self._closed or generation != self._generation:
                return False
            self._queue.append(item)
            self._changed.notify_all()
            return True
