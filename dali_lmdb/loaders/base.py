"""Base of the loaders: each pass over one is an epoch, and its place in the data is a few integers."""

from __future__ import annotations

import operator
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from dali_lmdb.errors import RecordError
from dali_lmdb.loaders.accelerate import add_loader, remove_loader
from dali_lmdb.loaders.bad import BadRecord, BadRecords
from dali_lmdb.loaders.data_loader import DataLoaderInterface
from dali_lmdb.loaders.group import check_device, process_group, warn_without_group
from dali_lmdb.loaders.settings import LoaderSettings
from dali_lmdb.plan.batches import Planner
from dali_lmdb.plan.order import LastBatch, StepPlan
from dali_lmdb.plan.sampling import sampling_of
from dali_lmdb.plan.state import LoaderState
from dali_lmdb.store import Store

__all__ = ["Batch", "Loader"]


class _Pass:
    """One iterator's pass over an epoch, shared by loader and iterator so that they form no reference cycle.

    Attributes:
        cut_short: why the pass ended before its last step; None if it did not.
    """

    cut_short: str | None = None


class _EpochIterator(Iterator[tuple[torch.Tensor, ...]]):
    """The batches of one epoch, which begins when the first one is requested.

    After a ``RecordError`` it continues with the next step, after any other exception with the same one.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader, self._pass = loader, _Pass()
        self._is_over = False

    def __next__(self) -> tuple[torch.Tensor, ...]:
        if self._is_over:
            raise StopIteration
        # Not StopIteration: the loop over this iterator would end as if it had seen the whole epoch.
        if self._pass.cut_short is not None:
            raise RuntimeError(self._pass.cut_short)
        tensors = self._loader._advance(self._pass)
        if tensors is None:
            self._is_over = True
            raise StopIteration
        return tensors


class _Place(NamedTuple):
    """A loader's place in its data. It is replaced as a whole, so an interrupt cannot leave it half changed."""

    epoch: int
    position: int
    """Positions of the epoch consumed, over all ranks."""
    running: _Pass | None
    """The pass under way; None between epochs and after the place was set."""


class Batch(NamedTuple):
    """One rank's step, as a backend delivers it."""

    images: torch.Tensor
    labels: torch.Tensor
    records: torch.Tensor
    end: int
    """The position of the epoch after the step."""
    num_bytes: int
    """Total size of the image files."""


class Loader(DataLoaderInterface, ABC):
    """Base of ``DaliLoader`` and ``TorchLoader``; they document the arguments.

    Attributes:
        store: the data.
        settings: the arguments that all loaders share.
        planner: which records each step reads and how they are augmented.
        gpu_memory_bytes: estimate of the GPU memory that DALI holds while batches are made; 0 where it holds none.
        end_of_dataloader: whether the last batch was its epoch's last one; Accelerate's name.
        remainder: number of different records in that one over all ranks, if they do not fill it; else 0.
    """

    gpu_memory_bytes: int = 0
    end_of_dataloader: bool = False
    remainder: int = 0

    def __init__(self, store: Store, settings: LoaderSettings) -> None:
        default_last_batch: LastBatch = "drop" if settings.is_training else "short"
        sampling = sampling_of(
            len(store),
            sampler=settings.sampler,
            weights=settings.weights,
            seed=settings.seed,
            shuffle=settings.shuffle,
            default_shuffle="full" if settings.is_training else "none",
        )
        steps = StepPlan(
            num_positions=sampling.num_positions,
            batch_size=settings.batch_size,
            rank=0 if settings.rank is None else settings.rank,
            world_size=1 if settings.world_size is None else settings.world_size,
            last_batch=default_last_batch if settings.last_batch is None else settings.last_batch,
        )
        self.store, self.settings = store, settings
        self.bad = BadRecords(store, on_bad=settings.on_bad, quarantine=settings.quarantine)
        self.planner = Planner(
            store, transform=settings.transform, steps=steps, sampling=sampling, seed=settings.seed
        )
        self._is_divided, self._is_older_than_group = False, process_group() is None
        _check_num_records(store, self.steps)
        self._place = _Place(epoch=0, position=0, running=None)
        self._closed = False
        self._images = 0
        self._bytes_read = 0
        self._pid: int | None = None  # of the first process to use it; a fork lacks its threads
        self._wait_s = 0.0
        self._busy_s = 0.0
        self._handed_out_at: float | None = None

    @property
    def epoch(self) -> int:
        """Number of the current epoch, or of the next one between epochs."""
        return self._place.epoch

    @property
    def steps(self) -> StepPlan:
        """How the records of an epoch are divided among steps and ranks.

        If rank and world size were not given, they are those of the process group now, which may be younger than
        the loader, until the first batch divides the records for good.
        """
        steps, group = self.planner.steps, process_group()
        if self.settings.rank is None and group is not None and not self._is_divided:
            self.planner.steps = steps = replace(steps, rank=group[0], world_size=group[1])
        return steps

    @property
    def num_records(self) -> int:
        """Records of the store, over all ranks."""
        return len(self.store)

    @property
    def classes(self) -> list[str]:
        """Class names; a label is a position in it."""
        return self.store.classes

    @property
    def bad_records(self) -> list[BadRecord]:
        """Every record that could not be decoded, in the order they were met."""
        return list(self.bad.met.values())

    def __len__(self) -> int:
        """Number of this rank's steps in a whole epoch."""
        return self.steps.num_steps()

    def set_epoch(self, epoch: int) -> None:
        """Begin epoch ``epoch`` next, from its first record.

        Right after ``load_state_dict``, setting the epoch of the state keeps its position: the usual loop, which
        sets each epoch, needs no special case for a resumed one.

        Raises:
            ValueError: ``epoch`` is below 0.
        """
        epoch = operator.index(epoch)
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, expected at least 0")
        if epoch != self.epoch or self._place.running is not None:
            self._go_to(_Place(epoch, 0, None), because=f"set_epoch({epoch}) was called; call it between epochs")

    def state_dict(self) -> dict[str, Any]:
        """The loader's place, in plain types; valid after any step.

        It counts the batches handed out, not those prefetched, and holds no rank, batch size or world size: any of
        them may differ when it is loaded.
        """
        return self._state(self._place.epoch, self._place.position).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iterator continue where ``state`` was taken, with exactly the records not yet seen.

        Raises:
            StateError: the state belongs to other data, another seed or another order.
        """
        loaded = LoaderState.from_dict(state)
        loaded.check_against(self._state(loaded.epoch, loaded.position), where=str(self.store.path))
        place = _Place(loaded.epoch, loaded.position, None)
        self._go_to(place, because="load_state_dict was called; make a new iterator after it")

    def _go_to(self, place: _Place, *, because: str) -> None:
        """Move to another place and cut the running pass short; its iterator will say why."""
        epoch, position, running = self._place
        if running is not None:
            running.cut_short = (
                f"{type(self).__name__}: epoch {epoch} was cut short at position {position} of "
                f"{self.planner.steps.num_positions}: {because}"
            )
        self._place = place

    def _state(self, epoch: int, position: int) -> LoaderState:
        return LoaderState(
            seed=self.planner.seed,
            epoch=epoch,
            position=position,
            order=self.planner.sampling.identity,
            fingerprint=self.store.fingerprint,
            num_positions=self.planner.steps.num_positions,
        )

    def stats(self) -> dict[str, float]:
        """Counters since the loader was made.

        Returns:
            ``images``: images handed out; ``images_per_s``: images per second of time inside epochs;
            ``bytes_read``: size of their files; ``wait_s``: seconds the consumer waited for batches;
            ``wait_fraction``: ``wait_s`` divided by the time inside epochs; ``queue_fill``: batches ready or in
            progress for the next steps; ``bad_records``: number of distinct bad records met; ``substituted``:
            number of substitutions; ``gpu_memory_bytes``: the loader's attribute. ``DaliLoader`` adds
            ``late_bytes``: bytes missing from the page cache when their batch was needed, read synchronously.
        """
        busy_s = max(self._busy_s, 1e-9)
        return {
            "images": self._images,
            "images_per_s": self._images / busy_s,
            "bytes_read": self._bytes_read,
            "wait_s": self._wait_s,
            "wait_fraction": self._wait_s / busy_s,
            "queue_fill": self._queue_fill(),
            "bad_records": len(self.bad.met),
            "substituted": self.bad.num_substituted,
            "gpu_memory_bytes": self.gpu_memory_bytes,
        }

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Iterate over one epoch: the next one, or the rest of the one that a loaded state was taken in.

        The epoch begins with its first batch, so an unused iterator has no effect. Once another iterator has
        begun, an older one that has not reached its end raises ``RuntimeError``.
        """
        self._check_open()
        return _EpochIterator(self)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{type(self).__name__} is closed; make a new one")

    def _advance(self, requester: _Pass) -> tuple[torch.Tensor, ...] | None:
        """The next step's tensors, for the iterator of a pass; None at the end of the epoch."""
        begin = time.perf_counter()
        self._check_open()
        self._check_process()
        is_first = self._place.running is not requester
        if self._handed_out_at is not None and not is_first:  # time between epochs does not count
            self._busy_s += begin - self._handed_out_at
        self._handed_out_at = None
        if is_first:
            self._divide()
            self._begin_pass(requester)
        epoch, position, _ = self._place
        if self.planner.steps.positions(position) is None:
            self._place = _Place(epoch + 1, 0, None)
            self.end_of_dataloader = False
            remove_loader(self)
            return None
        try:
            batch = self._batch_at(epoch, position)
        except RecordError as error:
            if error.end is not None:
                self._set_position(error.end)
            raise
        self._images += len(batch.labels)
        self._bytes_read += batch.num_bytes
        self._handed_out_at = time.perf_counter()
        self._wait_s += self._handed_out_at - begin
        self._busy_s += self._handed_out_at - begin
        tensors = (batch.images, batch.labels) + ((batch.records,) if self.settings.return_index else ())
        self._note_end(position, batch.end)
        self._set_position(batch.end)
        return tensors

    def _divide(self) -> None:
        """Divide the records among ranks for good, before the first batch of a pass.

        Raises:
            RuntimeError: they were divided before the process group existed.
        """
        steps, group = self.steps, process_group()
        if self.settings.rank is None:
            if group is None and not self._is_divided:
                warn_without_group()
            if group is not None and group != (steps.rank, steps.world_size):
                raise RuntimeError(
                    f"this {type(self).__name__} has given batches as rank {steps.rank} of {steps.world_size}, "
                    f"but this process is now rank {group[0]} of {group[1]}; make a new loader"
                )
            if group is not None and self._is_older_than_group and not self._is_divided:
                check_device(self.settings)
        _check_num_records(self.store, steps)
        self._is_divided = True

    def _note_end(self, start: int, end: int) -> None:
        """Tell Accelerate whether the step between two positions is this rank's last one of the epoch."""
        steps = self.planner.steps
        self.end_of_dataloader = steps.positions(end) is None
        left = steps.num_positions - start
        self.remainder = left if self.end_of_dataloader and left < steps.global_batch_size else 0
        add_loader(self)  # for each batch, since another loader's pass may have been abandoned

    def _begin_pass(self, new: _Pass) -> None:
        epoch, position, running = self._place
        if running is None:
            place = _Place(epoch, position, new)
        else:  # the running pass is abandoned, and its epoch with it
            place = _Place(epoch + 1, 0, new)
        self._go_to(
            place,
            because=f"another iterator began epoch {place.epoch}; use one iterator at a time, and a separate "
            "loader to inspect single batches",
        )

    def _set_position(self, position: int) -> None:
        self._place = self._place._replace(position=position)

    def _check_process(self) -> None:
        """Refuse to continue in a forked process, where it would wait for threads that do not exist."""
        if self._pid is None:
            self._pid = os.getpid()
        if self._pid != os.getpid():
            raise RuntimeError(
                f"this {type(self).__name__} was used in process {self._pid}; this process is a fork without its "
                "threads; make a new loader here"
            )

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a {type(self).__name__} holds threads and memory maps and cannot be pickled or copied; make one in "
            "each process"
        )

    @abstractmethod
    def _queue_fill(self) -> int:
        """Number of batches ready or in progress for the next steps."""

    @abstractmethod
    def _batch_at(self, epoch: int, position: int) -> Batch:
        """The batch of this rank's step at a place where there is one.

        Steps are usually requested in order, so a backend works ahead; if another place is requested, it drops
        what it has prepared. After any exception it must be able to give the same step again.

        Raises:
            RecordError: with ``end``, if records of the step cannot be decoded.
        """

    def release_memory(self) -> None:  # nothing to release unless a loader says so
        """Release the GPU memory that ``gpu_memory_bytes`` estimates, until the next batch needs it again.

        Nothing else changes: the same batches follow.
        """

    def close(self) -> None:
        """Release threads, processes and device memory; the loader cannot be used again."""
        self._closed = True
        remove_loader(self)
        self._go_to(self._place._replace(running=None), because="the loader was closed")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_num_records(store: Store, steps: StepPlan) -> None:
    if steps.last_batch == "drop" and steps.num_positions < steps.global_batch_size:
        raise ValueError(
            f"{store.path}: {steps.num_positions} records, fewer than batch_size {steps.batch_size} x "
            f"world_size {steps.world_size} = {steps.global_batch_size}; use a smaller batch_size or "
            "last_batch='short'"
        )
