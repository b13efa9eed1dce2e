"""DALI's inputs for a planned batch, zero-copy from the store's map."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from dali_lmdb.images.blank import blank_jpeg
from dali_lmdb.images.scaling import denominators
from dali_lmdb.loaders.pillow import REFUSED, encoded_for_dali, pixel_limits
from dali_lmdb.loaders.prefetch import Feed
from dali_lmdb.loaders.settings import DecodeScale
from dali_lmdb.plan.augment import Transform
from dali_lmdb.plan.batches import BatchPlan, Planner

__all__ = ["Field", "InFlight", "Reduced", "decoded_fields", "decoder_inputs", "feed_of", "fields_of"]

_BLANK = np.frombuffer(blank_jpeg(1, 1), np.uint8)


class Field(NamedTuple):
    """One of DALI's input arrays for a batch."""

    name: str
    dtype: type[np.generic]
    ndim: int
    """Number of dimensions of one sample."""


_ALWAYS = (
    Field("encoded", np.uint8, 1),
    Field("labels", np.int64, 0),
    Field("anchors", np.int32, 1),
    Field("shapes", np.int32, 1),
    Field("mirror", np.int32, 0),
)
_REGION = (Field("roi_start", np.float32, 1), Field("roi_end", np.float32, 1))
_SIZE = (Field("size", np.float32, 1),)
_COLOR = tuple(Field(name, np.float32, 0) for name in ("hue", "saturation", "brightness", "contrast"))
_ERASE = (Field("erase_anchor", np.float32, 1), Field("erase_shape", np.float32, 1))


def fields_of(transform: Transform) -> tuple[Field, ...]:
    """DALI's inputs for a batch, in order; names after ``labels`` are those of ``Augmentation``.

    Each one costs time in every batch, so what is the same for all images is a constant of the graph instead.
    """
    return (
        _ALWAYS
        + _REGION * transform.has_region
        + _SIZE * transform.changes_size
        + _COLOR * transform.changes_color
        + _ERASE * transform.erases
    )


class Reduced(NamedTuple):
    """An image that is decoded at a fraction of its size, instead of by DALI."""

    encoded: npt.NDArray[np.uint8]
    """The file, of shape (num_bytes,)."""
    denominator: int
    box: tuple[float, float, float, float]
    max_pixels: int | None
    """These three as in ``resized_rgb``."""


def decoded_fields(transform: Transform, *, resize: Literal["dali", "torch"]) -> tuple[Field, ...]:
    """DALI's inputs: the first of ``fields_of``, if DALI only decodes and torch resizes, else all."""
    return _ALWAYS[:4] if resize == "torch" else fields_of(transform)


def decoder_inputs(feed: Feed, transform: Transform, *, resize: Literal["dali", "torch"]) -> Feed:
    """Those of a batch's inputs that DALI gets."""
    return feed[: len(decoded_fields(transform, resize=resize))]


def feed_of(
    plan: BatchPlan,
    planner: Planner,
    *,
    refused: Collection[int] = (),
    resize: Literal["dali", "torch"] = "dali",
    decode_scale: DecodeScale = "exact",
    is_stopped: Callable[[], bool] | None = None,
) -> Feed:
    """A planned batch as the arrays of ``fields_of``, each of shape (n, ...).

    Args:
        refused: records that no decoder may get.
        resize: with ``"torch"``, windows that have a region of interest begin at the image's upper left corner:
            torch resizes from the corner of what it is given.
        decode_scale: with ``"fast"``, DALI gets a blank image in the place of those to be reduced.
        is_stopped: see ``encoded_for_dali``.

    Returns:
        The arrays; with ``resize="torch"``, the images that ``finishing`` decodes at a fraction of their size
        follow, as ``Reduced`` by row.
    """
    augmentation = planner.augment(plan)._asdict()
    names = [field.name for field in fields_of(planner.transform)[2:]]
    encoded = encoded_for_dali(planner.store, plan.records, refused=refused, is_stopped=is_stopped)
    for row in np.flatnonzero((augmentation["shapes"] < 1).any(axis=1)):  # the index has no size for it
        encoded[row] = REFUSED
    reduced: dict[int, Reduced] = {}
    if decode_scale == "fast":
        reduced = _reduced(plan, planner, encoded, augmentation)
    if resize == "torch" and planner.transform.has_region:
        augmentation["shapes"] = augmentation["anchors"] + augmentation["shapes"]
        augmentation["anchors"] = np.zeros_like(augmentation["anchors"])
    numbers = planner.labels(plan), *(augmentation[name] for name in names)
    return (encoded, *numbers, reduced) if resize == "torch" else (encoded, *numbers)


def _reduced(
    plan: BatchPlan, planner: Planner, encoded: list[npt.NDArray[np.uint8]], augmentation: dict[str, Any]
) -> dict[int, Reduced]:
    """Take the images to be reduced out of DALI's inputs."""
    anchors, shapes = augmentation["anchors"], augmentation["shapes"]
    starts, ends = (anchors + augmentation[name] for name in ("roi_start", "roi_end"))
    steps = denominators(planner.store.gather("kind", plan.records), (ends - starts) / augmentation["size"])
    rows = [row for row in np.flatnonzero(steps > 1).tolist() if len(encoded[row])]
    boxes = np.concatenate([starts[:, ::-1], ends[:, ::-1]], axis=1)[rows].tolist()
    limits = pixel_limits(planner.store, plan.records[rows])
    reduced: dict[int, Reduced] = {}
    for row, box, limit in zip(rows, boxes, limits, strict=True):
        reduced[row] = Reduced(encoded[row], int(steps[row]), tuple(box), limit)
        encoded[row] = _BLANK
    anchors[rows], shapes[rows] = 0, 1
    return reduced


class InFlight(NamedTuple):
    """A batch that DALI works on."""

    plan: BatchPlan
    feed: Feed
    num_substituted: int
    """Number of records substituted for planned ones that cannot be decoded."""
