"""How each image is augmented: a pure function of (seed, epoch, record).

Windows are chosen on the host, from the heights and widths in the store's index, before anything is
decoded. So the same record gets the same window on CPU and GPU, at any batch size and world size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dali_lmdb.plan.random import key_of, uniform, uniforms

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Augmentation", "EvalTransform", "TrainTransform", "Transform"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in [0, 1]; what torchvision's weights expect
IMAGENET_STD = (0.229, 0.224, 0.225)

_CROP_TRIES = 10  # torchvision RandomResizedCrop.get_params
_ERASE_TRIES = 10  # torchvision RandomErasing.get_params
# Each random number of a record has a fixed draw number, so adding one does not change the others.
_DRAWS_PER_TRY = 4  # area, aspect, y, x
_DRAW_CROP = 0  # to 39
_DRAW_FLIP = 40
_DRAW_BRIGHTNESS, _DRAW_CONTRAST, _DRAW_SATURATION, _DRAW_HUE, _DRAW_GRAYSCALE, _DRAW_ERASE = range(41, 47)
_DRAW_ERASE_WINDOW = 50  # to 89


def _rounds_of(tries: int) -> tuple[range, range]:
    """Split tries into rounds: the first one, on which most crops fit, and all others, drawn in one call."""
    return range(1), range(1, tries)


# Radius of each filter in output pixels; with antialiasing, in units of `scale` input pixels.
_FILTER_RADIUS = {"nearest": 1, "linear": 1, "cubic": 2, "lanczos": 3}
# Two more pixels: at the edge of a partial JPEG decode, chroma is upsampled from fewer neighbours.
_FILTER_MARGIN = 2

Interpolation = Literal["nearest", "linear", "cubic", "lanczos"]
_TORCHVISION_NAMES = {"bilinear": "linear", "bicubic": "cubic"}
Ints = npt.NDArray[np.int32]
Reals = npt.NDArray[np.float32]


class Augmentation(NamedTuple):
    """How n images are augmented.

    Only the window of an image is decoded; the region of interest inside it is resized to the output's size and
    then coloured, erased and flipped.
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
    size: Reals
    """Height and width of the output, in pixels, float32 of shape (n, 2); the same for all n."""
    hue: Reals
    """Rotation of the colour wheel, in degrees, float32 of shape (n,); 0 changes nothing."""
    saturation: Reals
    """Factor, float32 of shape (n,); 1 changes nothing, 0 gives grey."""
    brightness: Reals
    """Factor, float32 of shape (n,); 1 changes nothing."""
    contrast: Reals
    """Factor, float32 of shape (n,); 1 changes nothing."""
    erase_anchor: Reals
    """Upper left corner (y, x) of the rectangle to erase before the flip, in pixels, float32 of shape (n, 2)."""
    erase_shape: Reals
    """Its height and width; 0 where nothing is erased."""


def _augmentation(
    anchors: Ints, shapes: Ints, roi_start: Reals, roi_end: Reals, size: int, **others: npt.NDArray[Any]
) -> Augmentation:
    """Make an augmentation in which fields that are not given change nothing."""
    n = len(anchors)
    ones, zeros, corners = np.ones(n, np.float32), np.zeros(n, np.float32), np.zeros((n, 2), np.float32)
    plain = Augmentation(
        anchors=anchors,
        shapes=shapes,
        roi_start=roi_start,
        roi_end=roi_end,
        mirror=np.zeros(n, np.int32),
        size=np.full((n, 2), size, np.float32),
        hue=zeros,
        saturation=ones,
        brightness=ones,
        contrast=ones,
        erase_anchor=corners,
        erase_shape=corners,
    )
    return plain._replace(**others)


@dataclass(frozen=True, kw_only=True)
class _Output:
    """The settings that training and evaluation share."""

    size: int = 224
    """Height and width of the output, in pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from each channel, RGB in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Then divides each channel, RGB in [0, 1]."""
    interpolation: Interpolation | Literal["bilinear", "bicubic"] = "linear"
    """Resizing filter, always antialiased. torchvision's names and its ``InterpolationMode`` stand for these:
    bilinear for ``"linear"``, bicubic for ``"cubic"``."""

    def __post_init__(self) -> None:
        name = self.interpolation.name.lower() if isinstance(self.interpolation, Enum) else self.interpolation
        object.__setattr__(self, "interpolation", _TORCHVISION_NAMES.get(name, name))
        if self.size < 1:
            raise ValueError(f"size is {self.size}, expected at least 1 pixel")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean}, std {self.std}: expected three numbers each, std above 0")
        if self.interpolation not in _FILTER_RADIUS:
            raise ValueError(
                f"interpolation is {self.interpolation!r}, expected one of {', '.join(map(repr, _FILTER_RADIUS))}"
            )

    @property
    def largest_size(self) -> int:
        """Largest height and width of the output in any epoch, in pixels."""
        return self.size

    @property
    def has_region(self) -> bool:
        """Whether the region of interest may be less than the whole window."""
        return False

    @property
    def changes_size(self) -> bool:
        """Whether the output's size depends on the epoch."""
        return False

    @property
    def changes_color(self) -> bool:
        """Whether hue, saturation, brightness or contrast may change."""
        return False

    @property
    def erases(self) -> bool:
        """Whether rectangles may be erased."""
        return False

    @property
    def erased_color(self) -> tuple[int, int, int]:
        """The mean colour, RGB from 0 to 255, rounded, since rectangles are erased before normalising."""
        red, green, blue = (min(max(round(255 * value), 0), 255) for value in self.mean)
        return red, green, blue


@dataclass(frozen=True, kw_only=True)
class TrainTransform(_Output):
    """Random resized crop and horizontal flip, as torchvision's RandomResizedCrop and RandomHorizontalFlip.

    Colour jitter, grayscale and random erasing are off by default.

    Raises:
        ValueError: a setting is out of range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest fraction of the image's area that a crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop, before resizing."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    size_schedule: tuple[tuple[int, int], ...] = ()
    """(epoch, size) pairs with increasing epochs: from that epoch on, this size instead of ``size``."""
    brightness: float = 0.0
    """The factor is uniform in [max(0, 1 - brightness), 1 + brightness], as in torchvision's ColorJitter.
    Brightness, contrast, saturation and hue are applied by one linear map, DALI's ``color_twist``: contrast about
    mid-grey, saturation and hue in YIQ."""
    contrast: float = 0.0
    """As ``brightness``."""
    saturation: float = 0.0
    """As ``brightness``."""
    hue: float = 0.0
    """The hue is rotated by a uniform fraction of the colour wheel in [-hue, hue]; at most 0.5."""
    grayscale: float = 0.0
    """Probability of conversion to grey."""
    erase: float = 0.0
    """Probability that a rectangle is set to the mean colour (rounded to a whole 1/255), as in torchvision's
    RandomErasing."""
    erase_scale: tuple[float, float] = (0.02, 0.33)
    """Smallest and largest fraction of the output's area that is erased."""
    erase_ratio: tuple[float, float] = (0.3, 3.3)
    """Smallest and largest height / width of the erased rectangle."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scale", "ratio", "erase_scale", "erase_ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is {(low, high)}, expected 0 < smallest <= largest")
        for name in ("flip", "grayscale", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a probability from 0 to 1")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue is {self.hue}, expected 0 to 0.5")
        epochs = [epoch for epoch, _ in self.size_schedule]
        if epochs != sorted(set(epochs)) or any(size < 1 for _, size in self.size_schedule):
            raise ValueError(
                f"size_schedule is {self.size_schedule}, expected (epoch, size) pairs with increasing epochs"
            )

    @property
    def largest_size(self) -> int:
        return max([self.size, *(size for _, size in self.size_schedule)])

    @property
    def changes_size(self) -> bool:
        return bool(self.size_schedule)

    @property
    def changes_color(self) -> bool:
        return max(self.brightness, self.contrast, self.saturation, self.hue, self.grayscale) > 0

    @property
    def erases(self) -> bool:
        return self.erase > 0

    def size_at(self, epoch: int) -> int:
        """Height and width of the output in an epoch, in pixels."""
        return [self.size, *(size for first, size in self.size_schedule if first <= epoch)][-1]

    def augment(
        self, records: npt.NDArray[np.int64], heights: Ints, widths: Ints, *, seed: int, epoch: int
    ) -> Augmentation:
        """Choose how some records are augmented.

        Args:
            records: record indices, int64 of shape (n,); they key the randomness.
            heights, widths: size as stored, int32 of shape (n,), in pixels.
            seed, epoch: the run's seed and the epoch's number.
        """
        key = key_of(seed, epoch)
        size = self.size_at(epoch)
        anchors, shapes = self._crop_windows(records, heights, widths, key)
        roi_end = shapes.astype(np.float32)
        mirror = (uniform(key, records, _DRAW_FLIP) < self.flip).astype(np.int32)
        others: dict[str, npt.NDArray[Any]] = {"mirror": mirror}
        if self.changes_color:
            others |= self._colors(records, key)
        if self.erases:
            others |= self._erased(records, size, mirror, key)
        return _augmentation(anchors, shapes, np.zeros_like(roi_end), roi_end, size, **others)

    def _crop_windows(
        self, records: npt.NDArray[np.int64], heights: Ints, widths: Ints, key: np.uint64
    ) -> tuple[Ints, Ints]:
        """Choose windows as torchvision's RandomResizedCrop.get_params: ten tries, then the largest central
        window within the aspect limits."""
        anchors, shapes = np.empty((len(records), 2), np.int32), np.empty((len(records), 2), np.int32)
        pending = np.arange(len(records))
        for tries in _rounds_of(_CROP_TRIES):
            image_height, image_width = heights[pending], widths[pending]
            area, aspect, y, x = _window_draws(key, records[pending], _DRAW_CROP, tries)
            target = image_height.astype(np.float64) * image_width * _between(area, self.scale)
            aspect_ratio = _log_between(aspect, self.ratio)
            width = np.rint(np.sqrt(target * aspect_ratio))
            height = np.rint(np.sqrt(target / aspect_ratio))
            fits = (0 < width) & (width <= image_width) & (0 < height) & (height <= image_height)
            top = np.floor(y * (image_height - height + 1))
            left = np.floor(x * (image_width - width + 1))
            chosen, window = _first_fitting(fits, top, left, height, width)
            anchors[pending[chosen]], shapes[pending[chosen]] = window[:, :2], window[:, 2:]
            pending = pending[~chosen]
            if len(pending) == 0:
                return anchors, shapes
        anchors[pending], shapes[pending] = self._central_windows(heights[pending], widths[pending])
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

    def _colors(self, records: npt.NDArray[np.int64], key: np.uint64) -> dict[str, npt.NDArray[Any]]:
        def factor(strength: float, draw: int) -> npt.NDArray[np.float64]:
            return _between(uniform(key, records, draw), (max(0.0, 1 - strength), 1 + strength))

        grey = uniform(key, records, _DRAW_GRAYSCALE) < self.grayscale
        colors = {
            "brightness": factor(self.brightness, _DRAW_BRIGHTNESS),
            "contrast": factor(self.contrast, _DRAW_CONTRAST),
            "saturation": np.where(grey, 0.0, factor(self.saturation, _DRAW_SATURATION)),
            "hue": 360 * _between(uniform(key, records, _DRAW_HUE), (-self.hue, self.hue)),
        }
        return {name: values.astype(np.float32) for name, values in colors.items()}

    def _erased(
        self, records: npt.NDArray[np.int64], size: int, mirror: Ints, key: np.uint64
    ) -> dict[str, npt.NDArray[Any]]:
        """Choose rectangles as torchvision's RandomErasing.get_params: ten tries, else nothing is erased."""
        anchors, shapes = np.zeros((len(records), 2), np.float32), np.zeros((len(records), 2), np.float32)
        pending = np.flatnonzero(uniform(key, records, _DRAW_ERASE) < self.erase)
        for tries in _rounds_of(_ERASE_TRIES):
            area, aspect, y, x = _window_draws(key, records[pending], _DRAW_ERASE_WINDOW, tries)
            target = size * size * _between(area, self.erase_scale)
            aspect_ratio = _log_between(aspect, self.erase_ratio)
            height = np.rint(np.sqrt(target * aspect_ratio))
            width = np.rint(np.sqrt(target / aspect_ratio))
            fits = (height < size) & (width < size)
            top, left = np.floor(y * (size - height + 1)), np.floor(x * (size - width + 1))
            chosen, window = _first_fitting(fits, top, left, height, width)
            anchors[pending[chosen]], shapes[pending[chosen]] = window[:, :2], window[:, 2:]
            pending = pending[~chosen]
        # Drawn in the output, erased before the flip.
        flipped = (mirror == 1) & (shapes[:, 1] > 0)
        anchors[flipped, 1] = size - anchors[flipped, 1] - shapes[flipped, 1]
        return {"erase_anchor": anchors, "erase_shape": shapes}


def _window_draws(
    key: np.uint64, records: npt.NDArray[np.int64], first_draw: int, tries: range
) -> npt.NDArray[np.float64]:
    """Random numbers for area, aspect, y and x: uniform in [0, 1), of shape (4, len(tries), n)."""
    draws = range(first_draw + tries.start * _DRAWS_PER_TRY, first_draw + tries.stop * _DRAWS_PER_TRY)
    numbers = uniforms(key, records, draws)
    return numbers.reshape(len(tries), _DRAWS_PER_TRY, len(records)).swapaxes(0, 1)


def _first_fitting(
    fits: npt.NDArray[np.bool_], *window: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Find the images that have a fitting try, and the numbers of their first one.

    Args:
        fits, window: of shape (tries, n).

    Returns:
        (which, numbers): bool of shape (n,); float64 of shape (which.sum(), len(window)).
    """
    which: npt.NDArray[np.bool_] = np.any(fits, axis=0)
    places = fits.argmax(axis=0)[which], np.flatnonzero(which)
    return which, np.stack([numbers[places] for numbers in window], axis=1)


def _between(part: npt.NDArray[np.float64], limits: tuple[float, float]) -> npt.NDArray[np.float64]:
    return limits[0] + part * (limits[1] - limits[0])


def _log_between(part: npt.NDArray[np.float64], limits: tuple[float, float]) -> npt.NDArray[np.float64]:
    return np.exp(_between(part, (math.log(limits[0]), math.log(limits[1]))))


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

    @property
    def has_region(self) -> bool:
        return True

    def augment(
        self, records: npt.NDArray[np.int64], heights: Ints, widths: Ints, *, seed: int, epoch: int
    ) -> Augmentation:
        """As ``TrainTransform.augment``; nothing is random.

        The region of interest is what Resize, then CenterCrop would show. Only it and a margin as wide as the
        resizing filter's radius are decoded.
        """
        del seed, epoch
        resized, crop = self.central_crop(heights, widths)
        image = np.stack([heights, widths], axis=1)
        scale = image / np.maximum(resized, 1)
        start, end = crop * scale, (crop + self.size) * scale
        margin = np.ceil(_FILTER_RADIUS[self.interpolation] * np.maximum(scale, 1)) + _FILTER_MARGIN
        anchors = np.clip(np.floor(start) - margin, 0, image)
        stops = np.clip(np.ceil(end) + margin, 0, image)
        return _augmentation(
            anchors.astype(np.int32),
            (stops - anchors).astype(np.int32),
            (start - anchors).astype(np.float32),
            (end - anchors).astype(np.float32),
            self.size,
        )

    def central_crop(self, heights: Ints, widths: Ints) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """What Resize and CenterCrop do to n images.

        Args:
            heights, widths: size as stored, int32 of shape (n,), in pixels.

        Returns:
            (resized, corners): height and width to which each is resized, and the upper left corner (y, x) of the
            crop therein; in pixels, int64 of shape (n, 2).
        """
        image = np.stack([heights, widths], axis=1).astype(np.int64)
        short = np.maximum(image.min(axis=1, keepdims=True), 1)
        # torchvision's _compute_resized_output_size truncates the longer side.
        resized = self.resize * image // short
        # torchvision's center_crop rounds half to even, as numpy's rint does.
        return resized, np.rint((resized - self.size) / 2).astype(np.int64)


Transform = TrainTransform | EvalTransform
