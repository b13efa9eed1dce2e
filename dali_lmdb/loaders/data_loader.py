"""What a loader has of a ``DataLoader``'s interface, so that training scripts can ask it the same questions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch.utils.data import BatchSampler, SequentialSampler

from dali_lmdb.loaders.dataset import ImageFolderLMDB
from dali_lmdb.plan.batches import Planner
from dali_lmdb.plan.order import StepPlan

__all__ = ["DataLoaderInterface", "RankSampler"]

_WORKERS = (
    "TorchLoader(num_workers=) sets the number of worker processes, DaliLoader(num_threads=) that of threads"
)
_SEED = "seed= and set_epoch decide the order and the augmentation"

ABSENT = {
    "collate_fn": "batches come as tensors; change them in the loop, or use a DataLoader over loader.dataset",
    "generator": _SEED,
    "worker_init_fn": _SEED,
    "multiprocessing_context": _WORKERS,
    "persistent_workers": _WORKERS,
    "prefetch_factor": "DaliLoader(prefetch_queue_depth=) sets how many batches are made ahead",
    "pin_memory_device": "device= says where the batches are",
    "timeout": "there is none: an image that takes too long counts as one that cannot be decoded",
    "in_order": "batches always come in order",
}
"""Attributes of a ``DataLoader`` that a loader cannot have, and what to use instead."""


class RankSampler(SequentialSampler):
    """The records of one rank's epoch, in order.

    A ``SequentialSampler`` by type, since Lightning's ``overfit_batches`` would otherwise replace it.

    Attributes:
        num_replicas, rank: those of a ``DistributedSampler``.
    """

    def __init__(self, loader: DataLoaderInterface) -> None:
        super().__init__(loader.dataset)
        self._loader = loader
        self.num_replicas, self.rank = loader.world_size, loader.rank

    def __len__(self) -> int:
        """Number of this rank's records in an epoch.

        With ``last_batch="short"``, if ranks differ by one record, the larger number: so on every rank
        ``len(sampler) * world_size`` is less than ``len(dataset)`` only if records are left out.
        """
        return self._loader.steps.num_records()

    def __iter__(self) -> Iterator[int]:
        """Record indices of the current epoch, or of the next one between epochs."""
        steps, epoch, start = self._loader.steps, self._loader.epoch, 0
        while (positions := steps.positions(start)) is not None:
            yield from self._loader.planner.sampling.records(positions, epoch=epoch).tolist()
            start = steps.end_of_step(start)

    def set_epoch(self, epoch: int) -> None:
        """The loader's ``set_epoch``."""
        self._loader.set_epoch(epoch)


class DataLoaderInterface:
    """The attributes of a ``DataLoader``, as far as they mean something.

    Attributes:
        num_workers: worker processes that decode; 0 with ``DaliLoader``, which has threads.
        pin_memory: False, since batches are on their device already.
    """

    planner: Planner
    num_workers: int = 0
    pin_memory: bool = False

    @property
    def epoch(self) -> int:
        """Number of the current epoch, or of the next one between epochs."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Begin epoch ``epoch`` next."""
        raise NotImplementedError

    @cached_property
    def dataset(self) -> ImageFolderLMDB:
        """The data as a map-style data set without transform, with ``classes``, ``targets`` and ``samples``."""
        return ImageFolderLMDB(self.planner.store)

    @property
    def steps(self) -> StepPlan:
        """How the records of an epoch are divided among steps and ranks."""
        return self.planner.steps

    @property
    def batch_size(self) -> int:
        """Images in one rank's step."""
        return self.steps.batch_size

    @property
    def drop_last(self) -> bool:
        """Whether records that do not fill a step of all ranks are left out."""
        return self.steps.last_batch == "drop"

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self.steps.rank

    @property
    def world_size(self) -> int:
        """Number of ranks that share the records."""
        return self.steps.world_size

    @property
    def sampler(self) -> RankSampler:
        """This rank's records; Lightning and many scripts call its ``set_epoch`` before each epoch."""
        return RankSampler(self)

    @property
    def batch_sampler(self) -> BatchSampler:
        """Lists of this rank's records, one for each of its steps."""
        return BatchSampler(self.sampler, self.batch_size, self.drop_last)

    def __getattr__(self, name: str) -> Any:
        where = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(f"{where}: {ABSENT[name]}" if name in ABSENT else where, name=name, obj=self)
