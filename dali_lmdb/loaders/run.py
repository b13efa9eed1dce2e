"""A running DALI pipeline, whose finished batches never wait for one that is still being read.

On the CPU DALI usually only decodes, and a ``Finisher`` does the rest: it works on a batch while DALI decodes the
next ones.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from nvidia.dali import Pipeline
from nvidia.dali.backend import TensorGPU
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dali_lmdb.loaders.external_source import InFlight
from dali_lmdb.loaders.finishing import Finisher, Unfinished
from dali_lmdb.loaders.prefetch import Feed, Prefetcher
from dali_lmdb.plan.batches import BatchPlan

__all__ = ["MAX_DECODED", "Run", "as_torch"]

MAX_DECODED = 2
"""Number of batches that the finisher works on: the next one, and the one after it."""

Prepare = Callable[[BatchPlan, Feed], InFlight]
"""Called with each batch before DALI gets it; may substitute records."""


class _Decoded(NamedTuple):
    """A batch that DALI has decoded."""

    batch: InFlight
    images: Unfinished
    labels: Tensor


class Run:
    """A pipeline and the batches that it works on.

    DALI is given a batch only when the prefetcher has one, so that a slow disk does not delay a batch that DALI
    already has. All of it happens in the consumer's thread: DALI's executor must not be used by two.

    Args:
        prefetcher: gives the batches; the run closes it.
        num_inputs: number of the inputs of a batch that DALI gets, the first ones.
        define: defines the pipeline, given the callback of ``fn.external_source``. As many batches are in flight
            as its ``prefetch_queue_depth`` says, if they are ready.
        next_place: initial value of the attribute.
        finisher: finishes the windows that the pipeline decodes; the run closes it. None if nothing is left to do.
        on_change: called with the plans of the batches in flight whenever they change, before DALI gets a new one.

    Attributes:
        in_flight: batches given to DALI, in order. The first one is the one that failed if ``next`` raises a
            ``RuntimeError`` of DALI. Keeps their bytes alive, since DALI reads them in place (``no_copy``).
        next_place: (epoch, position) of the batch that ``next`` gives next.
    """

    def __init__(
        self,
        prefetcher: Prefetcher,
        define: Callable[[Callable[[Any], Feed]], Pipeline],
        *,
        next_place: tuple[int, int],
        num_inputs: int,
        finisher: Finisher | None = None,
        on_change: Callable[[Iterable[BatchPlan]], None] | None = None,
    ) -> None:
        self._on_change = on_change
        self._num_inputs, self._finisher = num_inputs, finisher
        self._decoded: deque[_Decoded] = deque()  # before `in_flight`
        self._failure: RuntimeError | None = None  # of DALI, about the first batch in flight
        self.in_flight: deque[InFlight] = deque()
        self.next_place = next_place
        self._planned: tuple[BatchPlan, Feed] | None = None  # taken from the prefetcher, not yet given to DALI
        self._source = _Source()
        self._take_from(prefetcher)
        try:
            self._pipeline: Pipeline | None = define(self._source)
            self._pipeline.build()
        except BaseException:
            self.stop()
            raise

    def _take_from(self, prefetcher: Prefetcher) -> None:
        self._prefetcher = prefetcher
        # Ends the thread of a run that is dropped without close(); the thread does not refer to the run.
        self._close_prefetcher = weakref.finalize(self, prefetcher.close)

    def continue_at(self, epoch: int, position: int, prefetcher: Prefetcher) -> Run | None:
        """Drop the batches in flight and continue from another place; return None if only a new run can."""
        self._close_prefetcher()
        self._planned = None
        self._decoded.clear()
        self._take_from(prefetcher)
        if self._failure is not None:  # DALI has nothing more to give: it would raise StopIteration
            self.stop()
            return None
        try:
            while self.in_flight:
                self._wait()
                self._take_first()
        except RuntimeError:  # a bad record of an epoch that was left early does not matter
            self.stop()
            return None
        self.next_place = epoch, position
        return self

    def next(self, prepare: Prepare) -> tuple[InFlight, list[Tensor]]:
        """The next batch and the pipeline's outputs for it, which share DALI's memory.

        Raises:
            RuntimeError: of DALI, about the first batch in flight.
            Exception: of the prefetcher or ``prepare``, when there is no batch in flight before it.
        """
        if self._finisher is None:
            self._top_up(prepare, wait=True)
            outputs = self._wait()
            batch = self._take_first()
            self._top_up(prepare, wait=False)
            return batch, outputs
        self._decode_ahead(self._finisher, prepare)
        batch, unfinished, labels = self._decoded[0]
        images = unfinished.result()
        self._decoded.popleft()
        self._tell()
        return batch, [images, labels]

    def _decode_ahead(self, finisher: Finisher, prepare: Prepare) -> None:
        """Give the finisher the next batch, and the one after it too if DALI works on it already.

        So it has work while the consumer has not asked for the next batch. That one may still be being decoded,
        which this waits for; but never for one that is still being read.
        """
        while len(self._decoded) < MAX_DECODED and self._failure is None:
            self._top_up(prepare, wait=not self._decoded)
            if not self.in_flight:
                break
            try:
                windows, labels = self._wait()
            except RuntimeError as error:
                self._failure = error.with_traceback(None)  # which holds the run
                break
            batch = self.in_flight[0]
            self._decoded.append(_Decoded(batch, finisher.begin(batch.plan, batch.feed, windows), labels))
            self.in_flight.popleft()
            self._tell()
        if not self._decoded:
            assert self._failure is not None, "nothing is decoded, and nothing has failed"
            raise self._failure
        if self._failure is None:
            self._top_up(prepare, wait=False)

    def _wait(self) -> list[Any]:
        """DALI's outputs for the first batch in flight, as tensors; waits for them.

        For a finisher the first one is DALI's list of windows, which differ in size.
        """
        assert self._pipeline is not None, "a stopped run is asked for a batch"
        # Without a stream they are complete when this returns, as with DALI's own iterator.
        lists = self._pipeline.share_outputs()
        num_lists = 0 if self._finisher is None else 1
        outputs = [*lists[:num_lists], *(as_torch(output.as_tensor()) for output in lists[num_lists:])]
        self._pipeline.release_outputs()  # frees a place in the queue; lists and tensors keep the memory
        return outputs

    def _top_up(self, prepare: Prepare, *, wait: bool) -> None:
        """Give DALI the batches that are ready; with ``wait``, at least one must be in flight afterwards."""
        assert self._pipeline is not None, "a stopped run is asked for a batch"
        while len(self.in_flight) < self._pipeline.prefetch_queue_depth:
            needed = wait and not self.in_flight
            if self._planned is None:
                self._planned = self._prefetcher.next() if needed else self._prefetcher.next_if_ready()
            if self._planned is None:
                return
            try:
                batch = prepare(*self._planned)
            except Exception:
                if needed:
                    raise
                return  # tried again when it is needed: the batches before it come first
            self._planned = None
            self.in_flight.append(batch)
            self._tell()
            self._source.feed = batch.feed[: self._num_inputs]
            # The first call asks for as many batches as the queue holds, unless the source ends; reset() then
            # makes the next call a first one again.
            self._pipeline.schedule_run()
            self._pipeline.reset()

    def _take_first(self) -> InFlight:
        batch = self.in_flight.popleft()
        self._tell()
        return batch

    def _tell(self) -> None:
        if self._on_change is not None:
            decoded = [decoded.batch for decoded in self._decoded]  # the finisher may decode some, too
            self._on_change([batch.plan for batch in (*decoded, *self.in_flight)])

    @property
    def fill(self) -> int:
        """Number of batches in flight, decoded or ready for DALI."""
        return len(self._decoded) + len(self.in_flight) + (self._planned is not None) + self._prefetcher.fill

    def stop(self) -> None:
        """Drop the pipeline but not the bytes that it reads: a traceback may keep it alive."""
        self._close_prefetcher()
        if self._finisher is not None:
            self._finisher.close()
        self._decoded.clear()
        self._pipeline = self._planned = self._source.feed = self._failure = None

    def close(self) -> None:
        """Drop the pipeline and the bytes."""
        self.stop()
        self.in_flight.clear()
        self._tell()


def as_torch(tensor: Any) -> Tensor:
    """DALI's ``TensorCPU`` or ``TensorGPU`` as torch's, on the same memory; on a GPU, ready for torch's stream.

    torch gets the capsule rather than the tensor: given a tensor, it compares DALI's type of device with its own,
    and pybind11 (in DALI 2.4) swallows an exception that a signal handler raises during that comparison. One
    Ctrl-C in a hundred did nothing.
    """
    is_gpu = isinstance(tensor, TensorGPU)
    if is_gpu:
        stream = torch.cuda.current_stream(tensor.device_id()).cuda_stream
        return from_dlpack(tensor.__dlpack__(stream=stream or 1))  # 1: the legacy default stream, torch's 0
    return from_dlpack(tensor.__dlpack__())


class _Source:
    """DALI's callback: gives the batch put into it, once. DALI's operators keep it until garbage collection."""

    feed: Feed | None = None

    def __call__(self, batch_info: object) -> Feed:
        """The batch; ``batch_info`` comes from DALI and is not needed.

        Raises:
            StopIteration: there is none.
        """
        feed, self.feed = self.feed, None
        if feed is None:
            raise StopIteration
        return feed
