"""The classic CPU path: ``ImageFolderLMDB`` for a ``DataLoader``, and ``TorchLoader`` over it."""

from __future__ import annotations

import contextlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from dali_lmdb.errors import RecordError
from dali_lmdb.loaders.base import Batch, Dtype, Layout, Loader, default_num_threads
from dali_lmdb.loaders.folder import FolderStore
from dali_lmdb.plan.augment import Augmentation, TrainTransform, Transform
from dali_lmdb.plan.batches import BatchPlan, Planner
from dali_lmdb.plan.order import LastBatch, Shuffle
from dali_lmdb.store import Store, open_store

__all__ = ["ImageFolderLMDB", "TorchLoader"]


class ImageFolderLMDB(Dataset[tuple[Any, Any]]):
    """A map-style data set over a store; takes the place of torchvision's ``ImageFolder``.

    Items are ``(image, label)``: a Pillow RGB image and an int, each after its transform; pixel for pixel
    what ``ImageFolder`` gives for the same files. Any process may use it, forked or spawned, before or
    after its parent has; it pickles as a path.

    Args:
        path: a store.
        transform: called with the Pillow image.
        target_transform: called with the label.

    Attributes:
        classes: class names, sorted.
        class_to_idx: class name to label.
        targets: label of every record, a list of ints.

    Raises:
        StoreError: the store cannot be opened.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.store = open_store(path)
        self.transform = transform
        self.target_transform = target_transform
        self.classes = list(self.store.classes)
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}

    @property
    def targets(self) -> list[int]:
        return [int(label) for label in self.store.labels]

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """``(image, label)`` of a record; negative indices count from the end.

        Raises:
            IndexError: no such record.
            RecordError: its bytes are not an image that Pillow decodes.
        """
        if index < 0:
            index += len(self)
        with _naming(self.store, index):
            image: Any = Image.open(io.BytesIO(self.store.read(index))).convert("RGB")
        label: Any = int(self.store.labels[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.store.path)!r}, {len(self)} records)"


_PILLOW_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@contextlib.contextmanager
def _naming(store: Store, index: int) -> Iterator[None]:
    """Turn what Pillow raises about a record into a RecordError that names it."""
    try:
        yield
    except _PILLOW_ERRORS as error:
        raise RecordError(
            f"{store.where(index)}: not an image that Pillow decodes: {error}; remove it and convert again"
        ) from error


class _PlannedImages(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Runs in the workers: a planned batch in, images and labels out."""

    def __init__(self, planner: Planner, dtype: Dtype, layout: Layout) -> None:
        self.planner, self.dtype, self.layout = planner, dtype, layout

    def __getitem__(self, plan: BatchPlan) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.stack(self._images(plan))
        if self.layout == "NHWC":
            images = images.contiguous(memory_format=torch.channels_last)
        return images, torch.from_numpy(self.planner.labels(plan))

    def _images(self, plan: BatchPlan) -> list[torch.Tensor]:
        store, transform = self.planner.store, self.planner.transform
        files = [_open_image(store, int(record)) for record in plan.records]
        # Opening reads the header only: the sizes, which an image folder has no index of.
        widths, heights = np.array([file.size for file in files], dtype=np.int32).T
        augmentation = transform.augment(plan.records, heights, widths, seed=self.planner.seed, epoch=plan.epoch)
        images = []
        for position, (record, file) in enumerate(zip(plan.records.tolist(), files, strict=True)):
            with _naming(store, record):
                image = file.convert("RGB")
            images.append(self._to_tensor(_crop(image, transform, augmentation, position)))
        return images

    def _to_tensor(self, image: Image.Image) -> torch.Tensor:
        if self.dtype == "uint8":
            return F.pil_to_tensor(image)
        transform = self.planner.transform
        tensor = F.normalize(F.to_tensor(image), list(transform.mean), list(transform.std))
        return tensor.half() if self.dtype == "float16" else tensor


def _open_image(store: Store, index: int) -> Image.Image:
    with _naming(store, index):
        return Image.open(io.BytesIO(store.read(index)))


def _crop(image: Any, transform: Transform, augmentation: Augmentation, position: int) -> Image.Image:
    """Apply one image's augmentation with torchvision's functions."""
    size = [transform.size, transform.size]
    if not isinstance(transform, TrainTransform):
        return F.center_crop(F.resize(image, transform.resize), size)
    top, left = augmentation.anchors[position].tolist()
    height, width = augmentation.shapes[position].tolist()
    image = F.resized_crop(image, top, left, height, width, size)
    return F.hflip(image) if augmentation.mirror[position] else image


class _Steps:
    """The sampler: planned batches from a place on, remembered until they come back decoded."""

    def __init__(self) -> None:
        self.plans: Iterator[BatchPlan] = iter(())
        self.in_flight: deque[BatchPlan] = deque()

    def __iter__(self) -> Iterator[BatchPlan]:
        for plan in self.plans:
            self.in_flight.append(plan)
            yield plan


class TorchLoader(Loader):
    """The interface, order, crops and flips of ``DaliLoader``, decoded by Pillow in ``DataLoader`` workers.

    Args:
        data: a store, its path, or an image folder with one folder for each class.
        num_workers: worker processes; 0 decodes in the calling process; by default the cores shared by the
            node's ranks.
        device: where images and labels are moved to, ``"cpu"`` or ``"cuda"``.
        transform, batch_size, rank, world_size, seed, shuffle, last_batch, dtype, layout, return_index: as
            ``DaliLoader``.

    Raises:
        StoreError, SourceError: the data cannot be opened.
        ValueError: an argument is out of range, or there are too few records for one step.
    """

    def __init__(
        self,
        data: Store | str | os.PathLike[str],
        *,
        transform: Transform,
        batch_size: int,
        device: str = "cpu",
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        shuffle: Shuffle | None = None,
        last_batch: LastBatch | None = None,
        dtype: Dtype = "float32",
        layout: Layout = "NCHW",
        num_workers: int | None = None,
        return_index: bool = False,
    ) -> None:
        super().__init__(
            data if isinstance(data, Store) else open_data(data),
            transform=transform,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle=shuffle,
            last_batch=last_batch,
            dtype=dtype,
            layout=layout,
            return_index=return_index,
        )
        self.device = torch.device(device)
        self._steps = _Steps()
        workers = default_num_threads() if num_workers is None else num_workers
        self._data_loader: DataLoader[Any] | None = DataLoader(
            _PlannedImages(self.planner, dtype, layout),
            batch_size=None,
            sampler=self._steps,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
        )

    def _batches(self, epoch: int, position: int) -> Iterator[Batch]:
        assert self._data_loader is not None
        if self.planner.steps.num_steps(position) == 0:
            return
        self._steps.plans = self.planner.plans(epoch, position)
        self._steps.in_flight.clear()
        for images, labels in self._data_loader:
            plan = self._steps.in_flight.popleft()
            yield Batch(
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
                torch.from_numpy(plan.records),
                plan.end,
            )

    def close(self) -> None:
        """Stop the workers."""
        super().close()
        self._data_loader = None


def open_data(path: str | os.PathLike[str]) -> Store:
    """A store, or an image folder read as one.

    Raises:
        StoreError, SourceError: neither can be opened.
    """
    return FolderStore(path) if Path(path).is_dir() else open_store(path)
