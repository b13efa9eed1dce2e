"""A blank image, to see whether a decoder works at all."""

from __future__ import annotations

import io

from PIL import Image

__all__ = ["blank_jpeg"]


def blank_jpeg(height: int, width: int) -> bytes:
    """A black baseline JPEG with the chroma subsampling (4:2:0) of most photos; at most 65,500 pixels a side."""
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "JPEG")
    return file.getvalue()
