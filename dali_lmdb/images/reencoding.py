"""Re-encoding images on their way into a store: what the GPU cannot decode, and what is larger than needed."""

from __future__ import annotations

import enum
import io

from PIL import Image

from dali_lmdb.images.header import Header, read_header
from dali_lmdb.images.opening import BadImageError, open_image

__all__ = ["QUALITY", "Change", "change_image"]

QUALITY = 95
"""Default JPEG quality: the highest that libjpeg's documentation recommends."""


class Change(enum.IntFlag):
    """Changes that the converter made to the source's bytes; the index column ``change``."""

    NONE = 0
    TRANSCODED = 1
    RESIZED = 2


def change_image(
    data: bytes, header: Header, *, transcode: bool, resize: int | None, quality: int, max_pixels: int
) -> tuple[bytes, Header, Change]:
    """Transcode or shrink an image if that is requested and needed; all others are returned unchanged.

    Args:
        data, header: the image.
        transcode: re-encode images that the GPU cannot decode as baseline RGB JPEGs.
        resize: shrink images whose shorter side is longer than this, in pixels.
        quality: of the JPEG that is written, 1 to 100.
        max_pixels: as for ``read_header``.

    Returns:
        (data, header, what was done); the EXIF orientation is neither applied nor kept, as in
        ``Image.convert("RGB")``.

    Raises:
        BadImageError: it must be re-encoded but cannot be decoded.
    """
    change = Change.NONE
    if transcode and not header.kind.decodes_on_gpu:
        change |= Change.TRANSCODED
    if resize is not None and min(header.height, header.width) > resize:
        change |= Change.RESIZED
    if change == Change.NONE:
        return data, header, change
    try:
        with open_image(data, max_pixels=None) as opened:  # `header` is within the limit
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
    data = encoded.getvalue()
    return data, read_header(data, max_pixels=max_pixels), change
