"""A picture of records as a model sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dali_lmdb.errors import one_line
from dali_lmdb.images.grid import Cell, draw_grid, enlarged
from dali_lmdb.plan.augment import Transform
from dali_lmdb.store import Store
from dali_lmdb.view.delivery import Shown, Way, deliver
from dali_lmdb.view.records import Named

__all__ = ["Preview", "preview"]

_COLUMNS = {1: 5, 2: 4}  # by number of pictures of a record


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The result of ``preview``."""

    picture: bytes
    """A PNG."""
    num_records: int
    missing: list[str]
    """A line for each picture that could not be shown: what, and why."""


def preview(
    store: Store,
    records: Sequence[int],
    *,
    ways: Sequence[Way],
    transform: Transform,
    seed: int = 0,
    epoch: int = 0,
    absent: Sequence[Named] = (),
) -> Preview:
    """Draw records as loaders deliver them, with their classes and numbers below.

    Pixels are those of the loaders with ``dtype="uint8"``. Small pictures are enlarged by a whole factor.

    Args:
        records: none of them twice.
        ways: one or two; the pictures of a record are side by side.
        absent: images that are not in the store, shown as their reasons.

    Raises:
        DeviceError, StoreError, ValueError: as the loaders.
    """
    found: list[dict[int, Shown]] = [
        # Workers would take longer to start than to decode a few images.
        dict(deliver(store, records, way, transform=transform, seed=seed, epoch=epoch, workers=_workers(way)))
        for way in ways
    ]
    cells: list[tuple[Cell, list[str]]] = []
    missing: list[str] = []
    labels = store.gather("label", np.array(records, dtype=np.int64)).tolist()
    for record, label in zip(records, labels, strict=True):
        for way, shown in zip(ways, found, strict=True):
            what = one_line(f"record {record} ({way.name})")
            image = shown[record]
            if isinstance(image, str):
                image = one_line(image)
                missing.append(f"{store.where(record)}: {way.name}: {image}")
            else:
                image = enlarged(image)
            cells.append((image, [one_line(store.classes[label]), what]))
    for named in absent:
        lines = [one_line(named.name), "not in the store"]
        cells += [(one_line(named.reason), lines)] * len(ways)
        missing.append(one_line(f"{named.name}: not in {store.path}: {named.reason}"))
    picture = draw_grid(cells, num_columns=_COLUMNS[len(ways)])
    return Preview(picture=picture, num_records=len(records), missing=missing)


def _workers(way: Way) -> int | None:
    return 0 if way.backend == "torch" else None
