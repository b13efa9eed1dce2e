"""How each image is cropped, resized and flipped: a pure function of (seed, epoch, record).

Windows are chosen on the host, from the heights and widths in the store's index, before anything is
decoded. So the same record gets the same window on CPU and GPU, at any batch size and world size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dali_lmdb.plan.random import key_of, uniform

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Augmentation", "EvalTransform", "TrainTransform", "Transform"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in [0, 1]; what torchvision's weights expect
IMAGENET_STD = (0.229, 0.224, 0.225)

_CROP_TRIES = 10  # torchvision RandomResizedCrop.get_params
# Each random number of a record has a place of its own, so that a new one changes no other.
_DRAWS_PER_TRY = 4  # area, aspect, y, x: draws 0 to 39
_DRAW_FLIP = 40

# An antialiased linear filter reaches one output pixel, that is `scale` input pixels, to each side; two more
# keep the edge of a partial JPEG decode, where chroma is upsampled from fewer neighbours, outside.
_FILTER_MARGIN = 2

Ints = npt.NDArray[np.int32]
Reals = npt.NDArray[np.float32]


class Augmentation(NamedTuple):
    """What happens to n images.

    An image is decoded inside its window only; of that, the region of interest is resized to the output's
    size and mirrored if asked.
    """

    anchors: Ints
    """Upper left corner (y, x) of the window to decode, in pixels, int32 of shape (n, 2)."""
    shapes: Ints
    """Height and width of the window to decode, in pixels, int32 of shape (n, 2)."""
    roi_start: Reals
    """Upper left corner (y, x) of the region of interest inside the window, in pixels, float32 of shape (n, 2)."""
    roi_end: Reals
    """Lower right corner (y, x), exclusive, likewise."""
    mirror: Ints
    """1 to flip horizontally, else 0; int32 of shape (n,)."""


@dataclass(frozen=True, kw_only=True)
class _Output:
    size: int = 224
    """Height and width of the output, in pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from each channel, RGB in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Then divides each channel, RGB in [0, 1]."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}, expected at least 1 pixel")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean}, std {self.std}: expected three numbers each, std above 0")


@dataclass(frozen=True, kw_only=True)
class TrainTransform(_Output):
    """Random resized crop and horizontal flip, as torchvision's RandomResizedCrop and RandomHorizontalFlip.

    Raises:
        ValueError: a setting is out of range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest part of the image's area that a crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop, before resizing."""
    flip: float = 0.5
    """Probability of a horizontal flip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale is {self.scale}, expected 0 < smallest <= largest")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {self.ratio}, expected 0 < smallest <= largest")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip}, expected a probability from 0 to 1")

    def augment(
        self, records: npt.NDArray[np.int64], heights: Ints, widths: Ints, *, seed: int, epoch: int
    ) -> Augmentation:
        """Choose window and flip of some records.

        Args:
            records: record indices, int64 of shape (n,); they key the randomness.
            heights, widths: size as stored, int32 of shape (n,), in pixels.
            seed, epoch: the run's seed and the epoch's number.
        """
        key = key_of(seed, epoch)
        anchors, shapes = self._crop_windows(records, heights, widths, key)
        mirror = (uniform(key, records, _DRAW_FLIP) < self.flip).astype(np.int32)
        roi_end = shapes.astype(np.float32)
        return Augmentation(anchors, shapes, np.zeros_like(roi_end), roi_end, mirror)

    def _crop_windows(
        self, records: npt.NDArray[np.int64], heights: Ints, widths: Ints, key: np.uint64
    ) -> tuple[Ints, Ints]:
        """The rule of torchvision's RandomResizedCrop.get_params: ten tries, then the largest
        central window within the aspect limits."""
        anchors, shapes = self._central_windows(heights, widths)
        open_ = np.arange(len(records))
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for try_ in range(_CROP_TRIES):
            if len(open_) == 0:
                break
            image_height, image_width = heights[open_], widths[open_]
            area, aspect, y, x = (
                uniform(key, records[open_], try_ * _DRAWS_PER_TRY + draw) for draw in range(_DRAWS_PER_TRY)
            )
            part = self.scale[0] + area * (self.scale[1] - self.scale[0])
            target = image_height.astype(np.float64) * image_width * part
            aspect_ratio = np.exp(low + aspect * (high - low))
            width = np.rint(np.sqrt(target * aspect_ratio))
            height = np.rint(np.sqrt(target / aspect_ratio))
            fits = (0 < width) & (width <= image_width) & (0 < height) & (height <= image_height)
            top = np.floor(y * (image_height - height + 1))
            left = np.floor(x * (image_width - width + 1))
            chosen = open_[fits]
            anchors[chosen] = np.stack([top, left], axis=1)[fits]
            shapes[chosen] = np.stack([height, width], axis=1)[fits]
            open_ = open_[~fits]
        return anchors, shapes

    def _central_windows(self, heights: Ints, widths: Ints) -> tuple[Ints, Ints]:
        in_ratio = widths / np.maximum(heights, 1)
        height, width = heights.astype(np.float64), widths.astype(np.float64)
        tall, wide = in_ratio < self.ratio[0], in_ratio > self.ratio[1]
        height = np.where(tall, np.rint(width / self.ratio[0]), height)
        width = np.where(wide, np.rint(height * self.ratio[1]), width)
        shapes = np.stack([height, width], axis=1).astype(np.int32)
        anchors = (np.stack([heights, widths], axis=1) - shapes) // 2
        return anchors.astype(np.int32), shapes


@dataclass(frozen=True, kw_only=True)
class EvalTransform(_Output):
    """Resize the shorter side, then cut out the centre, as torchvision's Resize and CenterCrop.

    Raises:
        ValueError: a setting is out of range.
    """

    resize: int = 256
    """Length of the shorter side before the central crop, in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize < self.size:
            raise ValueError(f"resize is {self.resize}, expected at least size, {self.size}")

    def augment(
        self, records: npt.NDArray[np.int64], heights: Ints, widths: Ints, *, seed: int, epoch: int
    ) -> Augmentation:
        """As ``TrainTransform.augment``; nothing is random.

        The region of interest is what Resize, then CenterCrop would show. Only it is decoded, with a margin as
        wide as the resizing filter reaches.
        """
        del seed, epoch
        image = np.stack([heights, widths], axis=1).astype(np.int64)
        short = np.maximum(image.min(axis=1, keepdims=True), 1)
        # torchvision's _compute_resized_output_size truncates the longer side.
        resized = self.resize * image // short
        # torchvision's center_crop rounds half to even, as numpy's rint does.
        crop = np.rint((resized - self.size) / 2)
        scale = image / np.maximum(resized, 1)
        start, end = crop * scale, (crop + self.size) * scale
        margin = np.ceil(np.maximum(scale, 1)) + _FILTER_MARGIN
        anchors = np.clip(np.floor(start) - margin, 0, image)
        stops = np.clip(np.ceil(end) + margin, 0, image)
        return Augmentation(
            anchors.astype(np.int32),
            (stops - anchors).astype(np.int32),
            (start - anchors).astype(np.float32),
            (end - anchors).astype(np.float32),
            np.zeros(len(records), dtype=np.int32),
        )


Transform = TrainTransform | EvalTransform
