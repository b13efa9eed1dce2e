"""Records decoded by Pillow: for the classic path, and for DALI where its own pixels would differ."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from dali_lmdb.images.agreement import DALI_AGREES, dali_agrees
from dali_lmdb.images.opening import BadImageError, open_image, pixel_limit, to_rgb
from dali_lmdb.store import Store

__all__ = ["REFUSED", "encoded_for_dali", "pixel_limits"]

_ALWAYS_AGREES = np.isin(np.arange(256), DALI_AGREES)  # by kind

REFUSED: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
"""DALI's input for a record that it must not decode: an empty file, which it rejects."""


def pixel_limits(store: Store, records: npt.NDArray[np.int64]) -> list[int | None]:
    """``max_pixels`` of ``open_image`` for each of some records."""
    heights, widths = (store.gather(name, records).tolist() for name in ("height", "width"))
    return [pixel_limit(height, width) for height, width in zip(heights, widths, strict=True)]


def encoded_for_dali(
    store: Store,
    records: npt.NDArray[np.int64],
    *,
    refused: Collection[int] = (),
    is_stopped: Callable[[], bool] | None = None,
) -> list[npt.NDArray[np.uint8]]:
    """Image files of some records, which DALI decodes to Pillow's pixels or not at all.

    A file is unchanged if DALI agrees with Pillow on it, see ``agreement``. Otherwise it is a PPM of Pillow's
    pixels, or ``REFUSED`` if Pillow cannot decode it.

    Args:
        refused: records that neither may decode.
        is_stopped: asked before Pillow decodes an image, which may take seconds.

    Returns:
        uint8 of shape (num_bytes,) for each record.

    Raises:
        RuntimeError: stopped.
    """
    encoded = store.arrays(records)
    if refused:
        for row in np.flatnonzero(np.isin(records, list(refused))).tolist():
            encoded[row] = REFUSED
    suspects = np.flatnonzero(~_ALWAYS_AGREES[store.gather("kind", records)])
    if len(suspects):
        for row, limit in zip(suspects.tolist(), pixel_limits(store, records[suspects]), strict=True):
            if is_stopped is not None and is_stopped():
                raise RuntimeError("the loader was closed while it prepared a batch")
            if not dali_agrees(encoded[row]):
                encoded[row] = _as_ppm(encoded[row], limit)
    return encoded


def _as_ppm(data: Any, max_pixels: int | None) -> npt.NDArray[np.uint8]:
    try:
        image = to_rgb(open_image(data, max_pixels=max_pixels))
    except BadImageError:
        return REFUSED
    return np.frombuffer(b"P6 %d %d 255\n%b" % (*image.size, image.tobytes()), np.uint8)
