"""Re-encoding images on their way into a store: what the GPU cannot decode, and what is larger than needed."""

from __future__ import annotations

import enum
import io

from PIL import Image

from dali_lmdb.images.header import Header, read_header
from dali_lmdb.images.opening import BadImageError, open_image

__all__ = ["QUALITY", "Change", "change_image", "needed_change"]

QUALITY = 95
"""Default JPEG quality: the highest that libjpeg's documentation recommends."""


class Change(enum.IntFlag):
    """Changes that the converter made to the source's bytes; the index column ``change``."""

    NONE = 0
    TRANSCODED = 1
    RESIZED = 2


def needed_change(header: Header, *, transcode: bool, resize: int | None) -> Change:
    """What has to be done to an image.

    Args:
        transcode: re-encode images that the GPU cannot decode as baseline RGB JPEGs.
        resize: shrink images whose shorter side is longer than this, in pixels.
    """
    change = Change.NONE
    if transcode and not header.kind.decodes_on_gpu:
        change |= Change.TRANSCODED
    if resize is not None and min(header.height, header.width) > resize:
        change |= Change.RESIZED
    return change


def change_image(
    data: bytes | memoryview, change: Change, *, resize: int | None, quality: int, max_pixels: int | None
) -> tuple[bytes, Header]:
    """Re-encode an image as baseline RGB JPEG, and shrink it if ``change`` says so.

    Args:
        data: an image that ``read_header`` accepts.
        resize: shorter side of a resized image, in pixels.
        quality: of the JPEG that is written, 1 to 100.
        max_pixels: as for ``read_header``.

    Returns:
        (data, header); the EXIF orientation is neither applied nor kept, as in ``Image.convert("RGB")``.

    Raises:
        BadImageError: it cannot be decoded, or is too large for a JPEG.
    """
    try:
        with open_image(data, max_pixels=None) as opened:
            image = opened.convert("RGB")
        if Change.RESIZED in change and resize is not None:
            short = min(image.size)
            # The longer side is truncated, as torchvision's Resize does.
            width, height = (resize * side // short for side in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=quality)
    except Exception as error:  # Pillow raises almost anything on damaged files, and on more than 65,500 pixels
        raise BadImageError.of(error, what="cannot be re-encoded: ") from error
    changed = encoded.getvalue()
    return changed, read_header(changed, max_pixels=max_pixels)
