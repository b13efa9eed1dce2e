"""A thread that plans batches and reads their bytes ahead of DALI, into a bounded queue."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from dali_lmdb.plan.batches import BatchPlan, Planner
from dali_lmdb.store.readahead import Readahead

__all__ = ["READAHEAD_BYTES", "Feed", "Prefetcher"]

Feed = tuple[Any, ...]
"""DALI's input for one batch, see ``external_source.fields_of``."""

READAHEAD_BYTES = 128 << 20
"""Enough to keep a device of 1 GB/s busy with a latency of 100 ms, higher than that of disks and most network file
systems."""

# A limit for small batches: planning more of them would only delay the first one.
_AHEAD_BATCHES = 64
_QUEUE_BATCHES = 2  # ready to be handed over; DALI's own prefetch queue comes on top


class Prefetcher:
    """One rank's batches from a place on, in order, epoch after epoch without end.

    Args:
        planner: plans this rank's steps; there must be one at the first place.
        feed_of: makes DALI's input from a plan; called in the thread, with the plan and ``is_stopped``, a function
            that says whether anybody still waits for it.
        epoch, start: the place of the first batch.
        readahead_bytes: bytes requested from cold storage ahead of the batch that is needed next; 0 turns reading
            ahead off.

    The thread starts with the first ``next``, when there is an owner to close it, and runs until ``close``. It
    shares nothing with its consumer but queues with atomic operations, so a signal that interrupts the consumer
    cannot leave a lock held.
    """

    def __init__(
        self,
        planner: Planner,
        feed_of: Callable[..., Feed],
        *,
        epoch: int,
        start: int,
        readahead_bytes: int = READAHEAD_BYTES,
    ) -> None:
        self._planner, self._feed_of = planner, feed_of
        self._readahead_bytes = readahead_bytes
        self.readahead = Readahead(planner.store) if readahead_bytes else None
        self._ready = SimpleQueue[tuple[BatchPlan, Feed] | BaseException]()
        self._room = SimpleQueue[None]()  # one token for each free place in `_ready`
        for _ in range(_QUEUE_BATCHES):
            self._room.put(None)
        self._closed = False
        self._thread = threading.Thread(
            target=self._run, args=(epoch, start), name="dali_lmdb prefetcher", daemon=True
        )

    def next(self) -> tuple[BatchPlan, Feed]:
        """The next batch; waits for it.

        Raises:
            BaseException: what the thread raised; again on every further call.
            RuntimeError: the prefetcher is closed, or was while this waited.
        """
        item = self._take(wait=True)
        if isinstance(item, BaseException):
            raise item
        return item

    def next_if_ready(self) -> tuple[BatchPlan, Feed] | None:
        """The next batch; None if it is not ready, or if it is an error, which ``next`` raises."""
        try:
            item = self._take(wait=False)
        except Empty:
            return None
        return None if isinstance(item, BaseException) else item

    def _take(self, *, wait: bool) -> tuple[BatchPlan, Feed] | BaseException:
        if self._thread.ident is None:
            self._thread.start()
        item = self._ready.get(block=wait)
        if isinstance(item, BaseException):
            self._ready.put(item)  # the thread has ended: nothing else will come
        else:
            self._room.put(None)
        return item

    @property
    def fill(self) -> int:
        """Number of batches that are ready."""
        return self._ready.qsize()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._closed = True
        self._room.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        if self.readahead is not None:
            self.readahead.close()
        while not self._ready.empty():
            self._ready.get()
        self._ready.put(RuntimeError("the prefetcher is closed; make a new loader"))

    def _run(self, epoch: int, start: int) -> None:
        try:
            self._produce(epoch, start)
        except BaseException as error:  # handed to the consumer, whatever it is
            self._ready.put(error)

    def _produce(self, epoch: int, start: int) -> None:
        """Batches from a place on, until ``close``."""
        plans = self._planner.plans_from(epoch, start)
        ahead: deque[tuple[BatchPlan, int]] = deque()
        ahead_bytes = 0
        error: Exception | None = None
        while not self._closed:
            while error is None and (
                not ahead
                or (self._is_cold() and ahead_bytes < self._readahead_bytes and len(ahead) < _AHEAD_BATCHES)
            ):
                try:
                    ahead.append(self._announce(next(plans)))
                except Exception as raised:  # it belongs to a later batch: those before it come first
                    error = raised
                else:
                    ahead_bytes += ahead[-1][1]
            if error is not None and not ahead:
                raise error
            plan, num_bytes = ahead.popleft()
            ahead_bytes -= num_bytes
            if self.readahead is not None:
                self.readahead.wait(plan.records)
            feed = self._feed_of(plan, is_stopped=lambda: self._closed)
            self._room.get()
            if not self._closed:
                self._ready.put((plan, feed))

    def _announce(self, plan: BatchPlan) -> tuple[BatchPlan, int]:
        """Ask the kernel to read a plan's bytes; return the plan and their number, 0 if nothing was asked."""
        if self.readahead is None or not self.readahead.cold:
            return plan, 0
        num_bytes = int(self._planner.store.gather("num_bytes", plan.records).sum(dtype=np.int64))
        self.readahead.announce(plan.records)
        return plan, num_bytes

    def _is_cold(self) -> bool:
        return self.readahead is not None and self.readahead.cold
