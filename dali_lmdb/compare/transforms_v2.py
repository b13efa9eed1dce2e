"""torchvision's ``decode_image`` and ``transforms.v2`` in DataLoader workers, on a store's bytes: a reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from dali_lmdb.loaders.settings import Device
from dali_lmdb.plan.augment import TrainTransform, Transform
from dali_lmdb.store import Store

__all__ = ["V2Loader"]


class V2Loader:
    """Batches as a training script makes them of torchvision's parts; its crops and flips are torch's own.

    Args:
        data: the store.
        transform: a ``TrainTransform`` without colour, erasing and schedule, or an ``EvalTransform``.
        batch_size, num_workers, seed: of the ``DataLoader``.
        device: where batches are delivered: float32 NCHW on the CPU, float16 channels-last on a GPU.

    Raises:
        RuntimeError: this torchvision has no decoder.
    """

    def __init__(
        self, data: Store, *, transform: Transform, batch_size: int, num_workers: int, seed: int, device: Device
    ) -> None:
        self._device = torch.device(device)
        self._batches: DataLoader[Any] = DataLoader(
            _Decoded(data, _decoder(), _steps(transform)),
            batch_size=batch_size,
            shuffle=isinstance(transform, TrainTransform),
            drop_last=True,
            num_workers=num_workers,
            persistent_workers=True,  # as TorchLoader's; what ended ones took could not be counted
            pin_memory=device == "cuda",
            worker_init_fn=_accept_deprecation,
            generator=torch.Generator().manual_seed(seed),
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in self._batches:
            if self._device.type == "cuda":
                images = images.to(self._device, torch.float16, non_blocking=True)
                images = images.contiguous(memory_format=torch.channels_last)
            yield images, labels.to(self._device, non_blocking=True)


def _decoder() -> Callable[[torch.Tensor], torch.Tensor]:
    try:
        from torchvision.io import ImageReadMode, decode_image
    except ImportError as error:  # deprecated since torchvision 0.29
        raise RuntimeError("this torchvision has no decode_image") from error
    return lambda encoded: decode_image(encoded, mode=ImageReadMode.RGB)


def _accept_deprecation(worker: int) -> None:
    del worker
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities", DeprecationWarning)


def _steps(transform: Transform) -> v2.Compose:
    if isinstance(transform, TrainTransform):
        crop = [
            v2.RandomResizedCrop(
                transform.size,
                scale=transform.scale,
                ratio=transform.ratio,
                interpolation=InterpolationMode.BILINEAR,
                antialias=True,
            ),
            v2.RandomHorizontalFlip(transform.flip),
        ]
    else:
        crop = [v2.Resize(transform.resize, antialias=True), v2.CenterCrop(transform.size)]
    scale = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([*crop, scale, v2.Normalize(transform.mean, transform.std)])


class _Decoded(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, data: Store, decode: Callable[[torch.Tensor], torch.Tensor], steps: v2.Compose) -> None:
        self._data, self._labels, self._decode, self._steps = data, data.labels, decode, steps

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        encoded = torch.frombuffer(bytearray(self._data.read(index)), dtype=torch.uint8)
        return self._steps(self._decode(encoded)), int(self._labels[index])
