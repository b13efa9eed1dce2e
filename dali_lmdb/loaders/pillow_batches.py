"""Planned batches decoded by Pillow and augmented by torchvision, in the workers of ``TorchLoader``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import functional as F

from dali_lmdb.errors import DaliLmdbError, RecordError
from dali_lmdb.images.opening import BadImageError, crop, open_image, to_rgb
from dali_lmdb.loaders.bad import OnBad, substituted
from dali_lmdb.loaders.color import color_maps
from dali_lmdb.loaders.pillow import pixel_limits
from dali_lmdb.loaders.settings import Dtype, Layout
from dali_lmdb.plan.augment import Augmentation, TrainTransform, Transform
from dali_lmdb.plan.batches import BatchPlan, Planner

__all__ = ["DecodedBatch", "PlannedBatches"]

_INTERPOLATIONS = {
    "nearest": F.InterpolationMode.NEAREST,
    "linear": F.InterpolationMode.BILINEAR,
    "cubic": F.InterpolationMode.BICUBIC,
    "lanczos": F.InterpolationMode.LANCZOS,
}


class DecodedBatch(NamedTuple):
    """A planned batch, decoded by a worker."""

    images: torch.Tensor | None
    """None if the batch failed."""
    labels: torch.Tensor
    """Empty if ``error`` is set."""
    records: torch.Tensor
    failed: dict[int, str]
    """Causes by record index, in the batch's order."""
    num_bytes: int
    """Size of the files that were read."""
    error: DaliLmdbError | None
    """Why the batch failed, if not because of ``failed`` alone. Returned, not raised: a ``DataLoader`` replaces
    the message of a worker's exception with a traceback."""


class PlannedBatches(Dataset[DecodedBatch]):
    """Runs in the workers: a planned batch in, images and labels out.

    It is pickled for each worker (with the start methods ``spawn`` and ``forkserver``), so it holds nothing of the
    sampler, which belongs to the parent process.
    """

    def __init__(self, planner: Planner, dtype: Dtype, layout: Layout, on_bad: OnBad) -> None:
        self.store, self.transform, self.seed = planner.store, planner.transform, planner.seed
        self.dtype, self.layout, self.on_bad = dtype, layout, on_bad

    def __getitem__(self, plan: BatchPlan) -> DecodedBatch:
        return self.decode(plan, following=())

    def decode(self, plan: BatchPlan, *, following: Iterable[int]) -> DecodedBatch:
        """Decode a batch; ``following`` are records to substitute if all of its own fail."""
        images, failed = dict[int, Image.Image](), dict[int, str]()
        shown, error, num_bytes = plan, None, 0
        try:
            while True:
                found, causes, read_bytes = self._images(
                    plan.epoch, [r for r in shown.records.tolist() if r not in images]
                )
                images |= found
                failed |= causes
                num_bytes += read_bytes
                if not causes or self.on_bad == "raise":
                    break
                replaced = substituted(plan, failed, following=following)
                if replaced is None:
                    break
                shown = replaced
            labels = torch.from_numpy(self.store.gather("label", shown.records).astype(np.int64))
        except DaliLmdbError as raised:
            error, labels = raised, torch.empty(0, dtype=torch.int64)
        records = torch.from_numpy(shown.records)
        if error is not None or not images.keys() >= set(shown.records.tolist()):
            return DecodedBatch(None, labels, records, failed, num_bytes, error)
        collated = self._collate([images[record] for record in shown.records.tolist()])
        return DecodedBatch(collated, labels, records, failed, num_bytes, error)

    def _images(self, epoch: int, wanted: list[int]) -> tuple[dict[int, Image.Image], dict[int, str], int]:
        """Decode and augment: (images by record index, causes of failures in the order requested, bytes read)."""
        store, transform = self.store, self.transform
        images, failed, files = dict[int, Image.Image](), dict[int, str](), dict[int, Image.Image]()
        num_bytes = 0
        for record, limit in zip(wanted, pixel_limits(store, np.array(wanted, dtype=np.int64)), strict=True):
            try:
                raw = store.read(record)
                num_bytes += len(raw)
                files[record] = open_image(raw, max_pixels=limit)
            except (BadImageError, RecordError) as error:
                failed[record] = str(error)
        # Sizes come from the header, which opening reads: an image folder has no index of them.
        records = np.array(list(files), dtype=np.int64)
        widths, heights = np.array([file.size for file in files.values()], dtype=np.int32).reshape(-1, 2).T
        augmentation = transform.augment(records, heights, widths, seed=self.seed, epoch=epoch)
        for position, (record, file) in enumerate(files.items()):
            try:
                image = to_rgb(file)
            except BadImageError as error:
                failed[record] = str(error)
            else:
                images[record] = _augmented(image, transform, augmentation, position)
        return images, {record: failed[record] for record in wanted if record in failed}, num_bytes

    def _collate(self, images: list[Image.Image]) -> torch.Tensor:
        """Normalise images of one size into a batch, with the operations of ``to_tensor`` and ``normalize``."""
        width, height = images[0].size
        batch = _empty((len(images), height, width, 3), self.layout, getattr(torch, self.dtype))
        if self.dtype == "uint8":
            for image, pixels in zip(images, batch, strict=True):
                pixels.copy_(_pixels(image))
            return batch
        mean, std = (
            torch.tensor(values, dtype=torch.float32).view(3, 1, 1)
            for values in (self.transform.mean, self.transform.std)
        )
        scratch = torch.empty_like(batch[0], dtype=torch.float32)
        for image, pixels in zip(images, batch, strict=True):
            normalised = pixels if self.dtype == "float32" else scratch
            normalised.copy_(_pixels(image)).div_(255).sub_(mean).div_(std)
            if normalised is scratch:
                pixels.copy_(scratch)
        return batch


def _empty(shape: tuple[int, int, int, int], layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """A batch of shape (n, channels, height, width) for the parent process, in shared memory if this is a worker.

    Otherwise the worker would copy it there, and touch twice as many new pages.

    Args:
        shape: (n, height, width, channels).
    """
    n, height, width, channels = shape
    stored = shape if layout == "NHWC" else (n, channels, height, width)
    if get_worker_info() is None:
        batch = torch.empty(stored, dtype=dtype)
    else:  # as torch's default_collate does
        num_bytes = math.prod(stored) * dtype.itemsize
        storage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
        strides = torch.empty(stored, device="meta").stride()
        batch = torch.empty(0, dtype=dtype).set_(storage, 0, stored, strides)
    return batch.permute(0, 3, 1, 2) if layout == "NHWC" else batch


def _pixels(image: Image.Image) -> torch.Tensor:
    """uint8 of shape (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _augmented(image: Any, transform: Transform, augmentation: Augmentation, position: int) -> Image.Image:
    """Crop, colour, erase and flip one image, with torchvision's functions where it has them."""
    size = augmentation.size[position].astype(int).tolist()
    interpolation = _INTERPOLATIONS[transform.interpolation]
    if not isinstance(transform, TrainTransform):
        cropped: Image.Image = F.center_crop(F.resize(image, transform.resize, interpolation), size)
        return cropped
    top, left = augmentation.anchors[position].tolist()
    height, width = augmentation.shapes[position].tolist()
    image = F.resize(crop(image, top=top, left=left, height=height, width=width), size, interpolation)
    if transform.changes_color:
        image = _twist_color(image, augmentation, position)
    if transform.erases:
        top, left = augmentation.erase_anchor[position].astype(int).tolist()
        height, width = augmentation.erase_shape[position].astype(int).tolist()
        image.paste(transform.erased_color, (left, top, left + width, top + height))
    flipped: Image.Image = F.hflip(image) if augmentation.mirror[position] else image
    return flipped


def _twist_color(image: Image.Image, augmentation: Augmentation, position: int) -> Image.Image:
    one = slice(position, position + 1)
    (matrix,), (offset,) = color_maps(
        hue=augmentation.hue[one],
        saturation=augmentation.saturation[one],
        brightness=augmentation.brightness[one],
        contrast=augmentation.contrast[one],
    )
    pixels = np.asarray(image, dtype=np.float32) @ matrix.T
    pixels += offset
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
