"""Sums over an image's pixels, from which mean and standard deviation follow."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dali_lmdb.images.opening import crop, open_image, to_rgb

__all__ = ["channel_sums"]

_LONG, _KEPT = 32, 4  # multiples of the shorter side


def channel_sums(
    data: bytes | memoryview, *, resize: int, size: int, max_pixels: int | None
) -> tuple[list[int], list[int]]:
    """Sums of an image's pixels after torchvision's ``Resize(resize)`` and ``CenterCrop(size)``.

    Args:
        resize: length of the shorter side, in pixels; at least ``size``.
        size: height and width of the part that counts, in pixels.
        max_pixels: of ``open_image``.

    Returns:
        (sums, squares): the sum of the pixels and of their squares, for R, G and B in 0 to 255.

    Raises:
        BadImageError: it cannot be decoded.
    """
    image = to_rgb(open_image(data, max_pixels=max_pixels))
    short = min(image.size)
    if max(image.size) > _LONG * short:  # resized as a whole, 1 x 60,000 pixels would take 12 GB
        width, height = (min(side, _KEPT * short) for side in image.size)
        top, left = (image.height - height) // 2, (image.width - width) // 2
        image = crop(image, top=top, left=left, height=height, width=width)
    width, height = (resize * side // short for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = round((height - size) / 2), round((width - size) / 2)
    pixels = np.asarray(crop(resized, top=top, left=left, height=size, width=size)).reshape(-1, 3)
    sums = pixels.sum(axis=0, dtype=np.int64)
    squares = np.square(pixels, dtype=np.int64).sum(axis=0)
    return sums.tolist(), squares.tolist()
