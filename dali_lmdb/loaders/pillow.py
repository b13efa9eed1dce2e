"""Records through Pillow, as torchvision's ``ImageFolder`` reads them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dali_lmdb.store import Store
from dali_lmdb.store.images import BadImageError, open_image, pixel_limit, to_rgb

__all__ = ["REFUSED", "pillow_cause", "pixel_limits"]

REFUSED: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
"""What DALI is given for a record that it must not decode: an empty file, which it refuses."""


def pixel_limits(store: Store, records: npt.NDArray[np.int64]) -> list[int | None]:
    """``max_pixels`` for ``open_image``, for each of some records."""
    heights, widths = (store.gather(name, records).tolist() for name in ("height", "width"))
    return [pixel_limit(height, width) for height, width in zip(heights, widths, strict=True)]


def pillow_cause(store: Store, record: int) -> str | None:
    """Why Pillow does not decode a record; None if it does."""
    (limit,) = pixel_limits(store, np.array([record]))
    try:
        to_rgb(open_image(store.read(record), max_pixels=limit))
    except BadImageError as error:
        return str(error)
    return None
