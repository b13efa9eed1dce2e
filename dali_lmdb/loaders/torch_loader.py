"""``TorchLoader``: batches from a store or an image folder, decoded by Pillow in ``DataLoader`` workers."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Listener
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from dali_lmdb.errors import RecordError
from dali_lmdb.loaders.bad import OnBad, nothing_decodes
from dali_lmdb.loaders.base import Batch, Loader
from dali_lmdb.loaders.dataset import ImageFolderLMDB, store_of
from dali_lmdb.loaders.folder import open_data
from dali_lmdb.loaders.normalize import Normalize
from dali_lmdb.loaders.pillow_batches import DecodedBatch, PlannedBatches
from dali_lmdb.loaders.settings import Device, Dtype, Layout, LoaderSettings
from dali_lmdb.plan.augment import Transform
from dali_lmdb.plan.batches import BatchPlan, Planner
from dali_lmdb.plan.order import LastBatch, Shuffle
from dali_lmdb.store import Store
from dali_lmdb.threads import threads_per_rank

__all__ = ["TorchLoader"]

# A terminal, `timeout` and SLURM send them to all processes of a run. Workers leave them to their parent, which
# may still need batches, and end when it ends.
_SIGNALS_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class _Steps:
    """The sampler of a ``DataLoader``: planned batches, remembered until they come back decoded.

    Attributes:
        in_flight: plans of batches that have not come back yet, in order.
        error: an error in planning, to be raised after the last good batch.
    """

    def __init__(self) -> None:
        self.begin(iter(()))

    def begin(self, plans: Iterator[BatchPlan]) -> None:
        """Yield these plans next."""
        self._plans = plans
        self.in_flight: deque[BatchPlan] = deque()
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[BatchPlan]:
        try:
            for plan in self._plans:
                self.in_flight.append(plan)
                yield plan
        except Exception as error:
            self.error = error


class _Run:
    """Workers, and the planned batches that they decode ahead, within one epoch."""

    def __init__(self, images: PlannedBatches, *, num_workers: int, pin_memory: bool) -> None:
        self.steps = _Steps()
        self._loader: DataLoader[DecodedBatch] = DataLoader(
            images,
            batch_size=None,
            sampler=self.steps,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
        )
        self._decoded: Iterator[Any] = iter(())
        self._workers: list[BaseProcess] = []
        self._next_place: tuple[int, int] | None = None

    def seek(self, planner: Planner, epoch: int, position: int) -> None:
        """Make the step at a place the next one."""
        if self._next_place != (epoch, position):
            self.steps.begin(planner.plans(epoch, position))
            self._decoded = iter(self._loader)
            self._workers = list(getattr(self._decoded, "_workers", ()))
            _alive.update(self._workers)

    def next(self) -> tuple[BatchPlan, DecodedBatch]:
        """The next planned batch, decoded."""
        try:
            decoded = next(self._decoded)
        except StopIteration:  # an iterator may not raise it in the middle of an epoch
            raise self.steps.error or RuntimeError("the DataLoader ended, though the epoch did not") from None
        plan = self.steps.in_flight.popleft()
        self._next_place = (plan.epoch, plan.end)
        return plan, decoded

    def close(self) -> None:
        """Stop the workers. Dropping the iterator is not enough: a traceback may hold it, too."""
        stop = getattr(self._decoded, "_shutdown_workers", None)
        if stop is not None:
            stop()
        _kill(self._workers)


class TorchLoader(Loader):
    """The interface, order, crops and flips of ``DaliLoader``, decoded by Pillow in ``DataLoader`` workers.

    Args:
        data: a store or its path, an ``ImageFolderLMDB``, whose transform is not used, or the path of an image
            folder with one folder for each class.
        num_workers: worker processes; 0 decodes in the calling process; by default the cores shared by the
            node's ranks.
        device: where images and labels are moved to, as in ``DaliLoader``; a GPU normalises the images.
        transform, batch_size, rank, world_size, seed, shuffle, sampler, weights, last_batch, dtype, layout,
            on_bad, quarantine, return_index: as ``DaliLoader``.

    Raises:
        StoreError, SourceError: the data cannot be opened.
        DeviceError: ``device="cuda"`` without a usable GPU.
        ValueError: an argument is out of range, there are too few records for one step, or worker processes cannot
            make sockets in ``TMPDIR``.
    """

    def __init__(
        self,
        data: Store | ImageFolderLMDB | str | os.PathLike[str],
        *,
        transform: Transform,
        batch_size: int,
        device: Device | str | torch.device = "cpu",
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        shuffle: Shuffle | bool | None = None,
        sampler: Iterable[int] | None = None,
        weights: Sequence[float] | npt.NDArray[np.float64] | None = None,
        last_batch: LastBatch | None = None,
        dtype: Dtype = "float32",
        layout: Layout = "NCHW",
        on_bad: OnBad = "raise",
        quarantine: str | os.PathLike[str] | None = None,
        num_workers: int | None = None,
        return_index: bool = False,
    ) -> None:
        store = store_of(data, open_path=open_data)
        settings = LoaderSettings(
            transform=transform,
            batch_size=batch_size,
            device=device,
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle=shuffle,
            sampler=sampler,
            weights=weights,
            last_batch=last_batch,
            dtype=dtype,
            layout=layout,
            on_bad=on_bad,
            quarantine=quarantine,
            return_index=return_index,
        )
        super().__init__(store, settings)
        self.device = torch.device("cpu" if settings.device_id is None else f"cuda:{settings.device_id}")
        self.num_workers = threads_per_rank() if num_workers is None else num_workers
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}, expected at least 0")
        if self.num_workers:
            _check_temporary_folder()
        # A quarter of the bytes to move to a GPU, which then normalises them.
        moved: Dtype = "uint8" if settings.device == "cuda" else dtype
        self._normalize = None
        if moved != dtype:
            self._normalize = Normalize(
                transform.mean, transform.std, dtype=getattr(torch, dtype), device=self.device
            )
        self._planned_batches = PlannedBatches(self.planner, moved, layout, on_bad)
        self._run: _Run | None = None

    def _batch_at(self, epoch: int, position: int) -> Batch:
        # Taken out until the step is complete, so that an exception in the middle of it cannot leave workers whose
        # place is unknown.
        run, self._run = self._run, None
        if run is None:
            run = _Run(self._planned_batches, num_workers=self.num_workers, pin_memory=self.device.type == "cuda")
        try:
            run.seek(self.planner, epoch, position)
            plan, decoded = run.next()
        except BaseException:
            run.close()
            raise
        assert (plan.epoch, plan.start) == (epoch, position)
        self._run = run
        if decoded.images is None and self.bad.on_bad == "substitute":  # only the parent knows what follows
            decoded = self._planned_batches.decode(plan, following=self.planner.following(plan))
        try:
            self.bad.report(decoded.failed)
            if decoded.images is None:
                raise decoded.error or nothing_decodes(self.store)
        except RecordError as error:
            error.end = plan.end
            raise
        self.bad.num_substituted += int((decoded.records.numpy() != plan.records).sum())
        images = decoded.images.to(self.device, non_blocking=True)
        if self._normalize is not None:
            images = self._normalize(images)
        labels = decoded.labels.to(self.device, non_blocking=True)
        return Batch(images, labels, decoded.records, plan.end, decoded.num_bytes)

    def _queue_fill(self) -> int:
        return len(self._run.steps.in_flight) if self._run is not None else 0

    def close(self) -> None:
        """Stop the workers."""
        super().close()
        run, self._run = self._run, None
        if run is not None:
            run.close()


_alive: WeakSet[BaseProcess] = WeakSet()  # workers of this process's loaders


def _kill(workers: Iterable[BaseProcess]) -> None:
    """End workers that are still there: they ignore SIGTERM, by which torch and multiprocessing end processes."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


def _kill_at_exit() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes it for a failure
    _kill(list(_alive))


# Before multiprocessing waits for all processes, however long that takes.
Finalize(None, _kill_at_exit, exitpriority=1)


def _check_temporary_folder() -> None:
    """Check that workers can make the sockets that hand over their batches; otherwise the parent waits forever.

    The path of a Unix socket has at most 107 bytes, and some network file systems have no sockets.
    """
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        raise ValueError(
            f"TMPDIR is {tempfile.gettempdir()}, where worker processes cannot make their sockets "
            f"({error.strerror or error}); set TMPDIR to a short path on a local disk, such as /tmp"
        ) from error


def _start_worker(_: int) -> None:
    """Runs in each worker."""
    sys.excepthook = _show_unless_parent_is_gone
    for number in _SIGNALS_TO_END:
        signal.signal(number, signal.SIG_IGN)


def _show_unless_parent_is_gone(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """If the parent is interrupted while it takes a batch, show no error of the thread that hands it over."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)
