"""Normalising on the device: a batch of uint8 is a quarter of the bytes of float32 to move there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dali_lmdb.plan.augment import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["Normalize"]


class Normalize(torch.nn.Module):
    """Normalise batches that a loader with ``dtype="uint8"`` gives, on the device that they are on.

    ``Normalize(device="cuda")(images)``, or the first module of a model. It has no parameters and adds nothing to
    a ``state_dict``. The result is that of a loader with this ``dtype``, except for rounding.

    Args:
        mean, std: of each channel, RGB in [0, 1], as in ``TrainTransform``.
        dtype: of the result; the arithmetic is in float32, also in a model that is made ``half()``.
        memory_format: of the result, ``torch.contiguous_format`` or ``torch.channels_last``; by default that of
            the images.
        device: where the images will be; ``to`` moves it, as any module.

    Raises:
        ValueError: ``mean`` or ``std`` is not three numbers, or a standard deviation is not above 0.
    """

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        *,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.preserve_format,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {tuple(mean)}, std {tuple(std)}: expected three numbers each, std above 0")
        self.dtype, self.memory_format = dtype, memory_format
        self._values = {"mean": tuple(mean), "std": tuple(std)}
        for name in self._values:
            self.register_buffer(name, self._pixels(name, device), persistent=False)
        self.mean: torch.Tensor
        self.std: torch.Tensor

    def _pixels(self, name: str, device: torch.device | str | None) -> torch.Tensor:
        return 255 * torch.tensor(self._values[name], dtype=torch.float32, device=device).reshape(3, 1, 1)

    def _apply(self, *args: Any, **options: Any) -> Normalize:
        super()._apply(*args, **options)  # type: ignore[no-untyped-call]
        for name in self._values:
            buffer = getattr(self, name)
            if buffer.dtype is not torch.float32:  # rounded, with the model's parameters
                setattr(self, name, self._pixels(name, buffer.device))
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images.

        Args:
            images: uint8 (n, 3, height, width), from 0 to 255.

        Returns:
            The same shape, of ``dtype`` and in ``memory_format``.

        Raises:
            TypeError: the images are not uint8: they may be normalised already.
        """
        if images.dtype is not torch.uint8:
            raise TypeError(
                f"images are {images.dtype}, expected torch.uint8 (make the loader with dtype='uint8')"
            )
        normalised = images.to(torch.float32, memory_format=self.memory_format).sub_(self.mean).div_(self.std)
        return normalised.to(self.dtype)
