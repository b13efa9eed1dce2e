"""Image files that DALI decodes to the same pixels as Pillow's ``convert("RGB")``.

DALI silently returns different pixels for

* 16-bit grey images, which it scales to 8 bit and Pillow clips at 255;
* TIFFs of floats, in CIELAB or YCbCr, with premultiplied alpha, or with an orientation, which Pillow applies;
* animated PNGs: it may return another frame;
* BMPs with 16 bits per pixel, and PNMs whose maximum is not 255, which it scales differently or not at all;
* some JPEG 2000 files.

Which of DALI's decoders handles a TIFF depends on the machine. So this module lists what is known to agree;
everything else has to be decoded by Pillow.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from PIL import TiffImagePlugin

from dali_lmdb.images.header import has_impossible_samples
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.opening import BadImageError, open_image

__all__ = ["DALI_AGREES", "dali_agrees"]

DALI_AGREES = (*(kind for kind in Kind if kind.is_jpeg and kind != Kind.JPEG_CPU_ONLY), Kind.WEBP)
"""Kinds whose files are all decoded to the same pixels."""

_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 30_000  # before the pixels
_GREY = 0  # colour type of a PNG, without alpha

_BMP_HEADER = struct.Struct("<2s12xIii2xHI")  # magic, header's size, width, height, bits, compression
_BMP_BITS = (1, 4, 8, 24, 32)  # not 16: DALI scales 5-bit colours differently

_SPACE = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM_HEADER_BYTES = 4096  # of a longer one, comments included, nothing is known
_PNM_UP_TO_255 = re.compile(rb"P[56]" + _SPACE + rb"\d+" + _SPACE + rb"\d+" + _SPACE + rb"255\s")

# TIFF 6.0, part 2; Adobe's technical note for deflate
_TIFF_LOSSLESS = {"raw", "tiff_lzw", "packbits", "tiff_adobe_deflate", "tiff_deflate"}


def dali_agrees(data: Any) -> bool:
    """Return whether DALI decodes an image to Pillow's pixels or rejects it.

    Args:
        data: any file's bytes; the answer is False if it is not an image.
    """
    start = bytes(data[:16])
    if start[:2] == b"\xff\xd8":
        # DALI rejects such a JPEG, too, but in a batch of 32 or more that may crash the process.
        return not has_impossible_samples(data)
    if (start[:4], start[8:12]) == (b"RIFF", b"WEBP"):
        return True
    if start.startswith(_PNG):
        return _png_agrees(data)
    if start[:2] == b"BM":
        return _bmp_agrees(data)
    if start[:2] in (b"P4", b"P5", b"P6"):
        return start[:2] == b"P4" or _PNM_UP_TO_255.match(bytes(data[:_PNM_HEADER_BYTES])) is not None
    return start[:2] in (b"II", b"MM") and _tiff_agrees(data)


def _png_agrees(data: Any) -> bool:
    position = len(_PNG)
    try:
        depth, color_type = struct.unpack_from("BB", data, 24)
        for _ in range(_MAX_CHUNKS):
            length, name = struct.unpack_from(">I4s", data, position)
            if name == b"acTL":  # animated
                return False
            if name == b"IDAT":
                return not (depth == 16 and color_type == _GREY)
            position += 12 + length
    except struct.error:  # truncated before its pixels
        return True
    return False


def _bmp_agrees(data: Any) -> bool:
    try:
        _, header_bytes, _, _, bits, compression = _BMP_HEADER.unpack_from(data)
    except struct.error:
        return True
    return header_bytes >= 40 and bits in _BMP_BITS and compression == 0


def _tiff_agrees(data: Any) -> bool:
    try:
        with open_image(data, max_pixels=None) as image:
            tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
            return (
                image.mode in ("L", "RGB")
                and image.info.get("compression") in _TIFF_LOSSLESS
                and set(tags.get(TiffImagePlugin.BITSPERSAMPLE, ())) == {8}
                and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) in (1, 2)  # black is 0, RGB
                and tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 1  # unsigned
                and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 1  # samples side by side
                and TiffImagePlugin.EXTRASAMPLES not in tags
                and tags.get(274, 1) == 1  # orientation
            )
    except BadImageError:
        return False
