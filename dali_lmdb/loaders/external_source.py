"""DALI's inputs for a planned batch, zero-copy from the store's map."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from dali_lmdb.loaders.pillow import REFUSED, encoded_for_dali
from dali_lmdb.loaders.prefetch import Feed
from dali_lmdb.plan.augment import Transform
from dali_lmdb.plan.batches import BatchPlan, Planner

__all__ = ["Field", "InFlight", "feed_of", "fields_of"]


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


def feed_of(
    plan: BatchPlan,
    planner: Planner,
    *,
    refused: Collection[int] = (),
    is_stopped: Callable[[], bool] | None = None,
) -> Feed:
    """A planned batch as the arrays of ``fields_of``, each of shape (n, ...).

    Args:
        refused: records that no decoder may get.
        is_stopped: see ``encoded_for_dali``.
    """
    augmentation = planner.augment(plan)._asdict()
    names = [field.name for field in fields_of(planner.transform)[2:]]
    encoded = encoded_for_dali(planner.store, plan.records, refused=refused, is_stopped=is_stopped)
    for row in np.flatnonzero((augmentation["shapes"] < 1).any(axis=1)):  # the index has no size for it
        encoded[row] = REFUSED
    return encoded, planner.labels(plan), *(augmentation[name] for name in names)


class InFlight(NamedTuple):
    """A batch that DALI works on."""

    plan: BatchPlan
    feed: Feed
    num_substituted: int
    """Number of records substituted for planned ones that cannot be decoded."""
