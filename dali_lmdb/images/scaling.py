"""JPEGs decoded at a fraction of their size, which skips most of the inverse DCT."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.opening import BadImageError, open_image, to_rgb

__all__ = ["denominators", "resized_part", "resized_rgb"]

_SCALED = (Kind.JPEG_BASELINE, Kind.JPEG_EXTENDED, Kind.JPEG_PROGRESSIVE, Kind.JPEG_GRAYSCALE)
_FILTERS = {"linear": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}

_ROUNDING = 0.01  # of a box in float32


def denominators(kinds: npt.NDArray[np.uint8], pixels_per_pixel: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """By how much n images may be reduced so that they are still not smaller than the output.

    Args:
        kinds: the index column ``kind``, uint8 of shape (n,).
        pixels_per_pixel: input pixels per output pixel along (y, x), of shape (n, 2).

    Returns:
        8, 4, 2 or 1, libjpeg's denominators, int64 of shape (n,); 1 for what is not a JPEG of 8 bits with a DCT.
    """
    steps = np.select([pixels_per_pixel.min(axis=1) >= step for step in (8, 4, 2)], [8, 4, 2], default=1)
    return np.where(np.isin(kinds, _SCALED), steps, 1)


def resized_rgb(
    data: bytes | memoryview,
    *,
    denominator: int,
    box: tuple[float, float, float, float],
    size: int,
    interpolation: Literal["linear", "cubic"],
    max_pixels: int | None,
) -> Image.Image:
    """Decode a JPEG to 1/denominator of its size, as ``convert("RGB")``, and resize a part of it.

    Args:
        denominator: of ``denominators``.
        box: (left, top, right, bottom) of the part, in pixels of the whole image.
        size: height and width of the output, in pixels.
        max_pixels: of ``open_image``, of the whole image.

    Raises:
        BadImageError: it cannot be decoded, or is smaller than the box.
    """
    image = open_image(data, max_pixels=max_pixels)
    width, height = image.size
    if box[2] > width + _ROUNDING or box[3] > height + _ROUNDING:
        raise BadImageError("the window is outside of the image, which has another size in the index")
    # Pillow takes the largest of 8, 4, 2 and 1 that is at most the ratio of the image's size to this one.
    image.draft("RGB", (max(1, width // denominator), max(1, height // denominator)))
    reduced = to_rgb(image)
    left, top, right, bottom = (value / denominator for value in box)
    return _resized(reduced, (left, top, right, bottom), size, interpolation)


def resized_part(
    pixels: npt.NDArray[np.uint8],
    box: tuple[float, float, float, float],
    size: int,
    interpolation: Literal["linear", "cubic"],
) -> npt.NDArray[np.uint8]:
    """Resize a part of an image of shape (height, width, 3); the arguments are those of ``resized_rgb``."""
    return np.asarray(_resized(Image.fromarray(pixels), box, size, interpolation))


def _resized(
    image: Image.Image,
    box: tuple[float, float, float, float],
    size: int,
    interpolation: Literal["linear", "cubic"],
) -> Image.Image:
    left, top, right, bottom = box
    inside = left, top, min(right, image.width), min(bottom, image.height)
    return image.resize((size, size), _FILTERS[interpolation], inside)
