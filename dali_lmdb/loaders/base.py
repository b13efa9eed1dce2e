"""What every loader is: an iterable of epochs whose place in the data is a few integers."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed

from dali_lmdb.plan.augment import TrainTransform, Transform
from dali_lmdb.plan.batches import Planner
from dali_lmdb.plan.order import LastBatch, Shuffle, StepPlan
from dali_lmdb.plan.state import LoaderState
from dali_lmdb.store import Store

__all__ = ["Batch", "Dtype", "Layout", "Loader"]

Dtype = Literal["float32", "float16", "uint8"]
Layout = Literal["NCHW", "NHWC"]


class Batch(NamedTuple):
    """One step's images and where it ends in the epoch."""

    images: torch.Tensor
    labels: torch.Tensor
    records: torch.Tensor
    end: int


class Loader(ABC):
    """Base of ``DaliLoader`` and ``TorchLoader``; they document the arguments.

    Attributes:
        store: the data.
        planner: which records each step reads and how they are augmented.
        epoch: number of the epoch that runs, or that the next ``iter`` begins.
    """

    def __init__(
        self,
        store: Store,
        *,
        transform: Transform,
        batch_size: int,
        rank: int | None,
        world_size: int | None,
        seed: int,
        shuffle: Shuffle | None,
        last_batch: LastBatch | None,
        dtype: Dtype,
        layout: Layout,
        return_index: bool,
    ) -> None:
        training = isinstance(transform, TrainTransform)
        if dtype not in ("float32", "float16", "uint8"):
            raise ValueError(f"dtype is {dtype!r}, expected 'float32', 'float16' or 'uint8'")
        if layout not in ("NCHW", "NHWC"):
            raise ValueError(f"layout is {layout!r}, expected 'NCHW' or 'NHWC'")
        if rank is None or world_size is None:
            rank, world_size = _distributed_place()
        steps = StepPlan(
            num_positions=len(store),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            last_batch=last_batch or ("drop" if training else "short"),
        )
        if steps.last_batch == "drop" and len(store) < steps.global_batch_size:
            raise ValueError(
                f"{store.path}: {len(store)} records, fewer than batch_size {batch_size} x world_size "
                f"{world_size} = {steps.global_batch_size}; use a smaller batch_size or last_batch='short'"
            )
        self.store = store
        self.return_index = return_index
        self.dtype, self.layout = dtype, layout
        self.planner = Planner(
            store,
            transform=transform,
            steps=steps,
            seed=seed,
            shuffle=shuffle or ("full" if training else "none"),
        )
        self.epoch = 0
        self._position = 0
        self._under_way = False
        self._iteration = 0
        self._closed = False
        self._images = 0
        self._wait_s = 0.0
        self._busy_s = 0.0

    @property
    def num_records(self) -> int:
        """Records of the store, over all ranks."""
        return len(self.store)

    @property
    def classes(self) -> list[str]:
        """Class names; a label is a position in it."""
        return self.store.classes

    def __len__(self) -> int:
        """Steps of this rank in a whole epoch."""
        return self.planner.steps.num_steps()

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``iter`` begin epoch ``epoch`` from its first record."""
        self.epoch, self._position, self._under_way = epoch, 0, False
        self._iteration += 1

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, in plain types; valid after any step.

        What was handed out counts, not what was prefetched. It holds no rank, batch size or world size: any
        of them may differ when it is loaded.
        """
        return self._state(self.epoch, self._position).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``iter`` go on where ``state`` was taken, with exactly the records not yet seen.

        Raises:
            StateError: the state belongs to other data, another seed or another order.
        """
        loaded = LoaderState.from_dict(state)
        loaded.check_against(self._state(loaded.epoch, loaded.position), where=str(self.store.path))
        self.epoch, self._position, self._under_way = loaded.epoch, loaded.position, False
        self._iteration += 1

    def _state(self, epoch: int, position: int) -> LoaderState:
        return LoaderState(
            seed=self.planner.seed,
            epoch=epoch,
            position=position,
            shuffle=self.planner.shuffle,
            fingerprint=self.store.fingerprint,
            num_records=self.num_records,
        )

    def stats(self) -> dict[str, float]:
        """What this loader has done so far.

        Returns:
            ``images``: handed out; ``images_per_s``: over the time inside epochs; ``wait_s``: seconds the
            consumer waited for a batch; ``wait_fraction``: that time over the time inside epochs.
        """
        busy_s = max(self._busy_s, 1e-9)
        return {
            "images": self._images,
            "images_per_s": self._images / busy_s,
            "wait_s": self._wait_s,
            "wait_fraction": self._wait_s / busy_s,
        }

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """One epoch: the next one, or the rest of the one a loaded state was taken in."""
        if self._closed:
            raise RuntimeError(f"{type(self).__name__} is closed; make a new one")
        if self._under_way:  # an epoch that was left early is over
            self.epoch, self._position = self.epoch + 1, 0
        self._under_way = True
        self._iteration += 1
        return self._iterate(self._iteration)

    def _iterate(self, iteration: int) -> Iterator[tuple[torch.Tensor, ...]]:
        batches = self._batches(self.epoch, self._position)
        try:
            while True:
                begin = time.perf_counter()
                batch = next(batches, None)
                waited_s = time.perf_counter() - begin
                self._wait_s += waited_s
                if batch is None or iteration != self._iteration:
                    break
                self._position = batch.end
                self._images += len(batch.labels)
                yield (batch.images, batch.labels) + ((batch.records,) if self.return_index else ())
                self._busy_s += time.perf_counter() - begin
                if iteration != self._iteration:
                    break
        finally:
            batches.close()
        if iteration == self._iteration:
            self.epoch, self._position, self._under_way = self.epoch + 1, 0, False

    @abstractmethod
    def _batches(self, epoch: int, position: int) -> Any:
        """A generator of the epoch's batches from ``position`` on."""

    def close(self) -> None:
        """Free threads, processes and device memory; the loader cannot be used again."""
        self._closed = True
        self._iteration += 1

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _distributed_place() -> tuple[int, int]:
    """(rank, world size) of the process group, else of a single process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def default_num_threads() -> int:
    """CPU threads for one rank: the cores this process may use, shared with the node's other ranks."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // max(1, ranks_here))
