"""EXIF orientation, which decoders ignore here and others may apply."""

from __future__ import annotations

from dali_lmdb.images.opening import BadImageError, open_image

__all__ = ["exif_orientation"]

_TAG = 0x0112
_UPRIGHT = 1


def exif_orientation(data: bytes) -> int:
    """The orientation that an image's EXIF data state; 1, upright, if they state none or cannot be read."""
    try:
        with open_image(data, max_pixels=None) as image:
            return int(image.getexif().get(_TAG, _UPRIGHT))
    except BadImageError:
        return _UPRIGHT
    except Exception:  # Pillow's parsers raise almost anything on damaged files
        return _UPRIGHT
