"""Kind and size of an image from its file's first bytes."""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

from PIL import Image

from dali_lmdb.store.layout import Kind

__all__ = ["MAX_PIXELS", "BadImageError", "Header", "read_header"]

MAX_PIXELS = 89_478_485
"""Default limit of height x width: Pillow's MAX_IMAGE_PIXELS, 256 MB as RGB and alpha in 8 bit."""

_PILLOW_KINDS = {
    "PNG": Kind.PNG,
    "WEBP": Kind.WEBP,
    "BMP": Kind.BMP,
    "TIFF": Kind.TIFF,
    "GIF": Kind.GIF,
    "PPM": Kind.PNM,
    "JPEG": Kind.UNKNOWN,  # read by _jpeg_header
}

# Markers of ITU T.81, table B.1.
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame, without DHT, JPG, DAC
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAME = struct.Struct(">BHHB")  # precision, height, width, components


class BadImageError(Exception):
    """An image that a store should not hold; the message is the reason."""


class Header(NamedTuple):
    """What a file's header says."""

    kind: Kind
    height: int
    """As stored, in pixels, EXIF orientation not applied."""
    width: int


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Kind and size of an image from its first bytes; nothing is decoded.

    Raises:
        BadImageError: not an image, a damaged header, or more than ``max_pixels``.
    """
    if not data:
        raise BadImageError("empty file")
    header = _jpeg_header(data) if data[:2] == b"\xff\xd8" else _pillow_header(data, max_pixels)
    if header.height < 1 or header.width < 1:
        raise BadImageError(f"size {header.width} x {header.height}")
    if header.height * header.width > max_pixels:
        raise _too_large((header.width, header.height), limit=max_pixels)
    return header


def _too_large(size: tuple[int, int] | None, *, limit: int) -> BadImageError:
    """The error for an image of (width, height); None where the size is not known."""
    if size is None:
        return BadImageError(f"more pixels than the limit of {limit}")
    return BadImageError(f"{size[0]} x {size[1]} pixels, more than the limit of {limit}")


def _pillow_header(data: bytes, max_pixels: int) -> Header:
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            return Header(_PILLOW_KINDS.get(image.format or "", Kind.OTHER), height, width)
    except Image.UnidentifiedImageError:
        raise BadImageError("not an image that Pillow knows") from None
    except Image.DecompressionBombError:
        # Pillow opens nothing of more than twice its own limit, and tells only the product.
        raise _too_large(_size_of_giant(data), limit=max_pixels) from None
    except Exception as error:  # Pillow's parsers raise almost anything on damaged files
        raise BadImageError(f"damaged header: {error}") from error


def _size_of_giant(data: bytes) -> tuple[int, int] | None:
    """Width and height of an image that ``Image.open`` refuses, from the parser that it would take."""
    for factory, accept in list(Image.OPEN.values()):
        try:
            if accept is None or accept(data[:16]) is True:
                with factory(io.BytesIO(data), "") as image:
                    return image.size
        except Exception:  # a parser of another kind of image, or one that looks at the size itself
            continue
    return None


def _jpeg_header(data: bytes) -> Header:
    """Walk the marker segments up to the start of the first scan."""
    position, end = 2, len(data)
    frame: Header | None = None
    while True:
        position = data.find(b"\xff", position)
        while 0 <= position < end and data[position] == 0xFF:  # a marker may be preceded by fill bytes
            position += 1
        if position < 0 or position >= end:
            raise BadImageError("damaged header: the JPEG ends before its image data")
        marker = data[position]
        position += 1
        if marker == 0 or marker == _TEM or 0xD0 <= marker <= _SOI:  # no length follows
            continue
        if marker == _EOI or position + 2 > end:
            raise BadImageError("damaged header: the JPEG ends before its image data")
        length = int.from_bytes(data[position : position + 2], "big")
        if length < 2 or position + length > end:
            raise BadImageError("damaged header: a JPEG segment reaches past the end")
        if marker in _SOF and frame is None:
            if length < 2 + _FRAME.size:
                raise BadImageError("damaged header: a JPEG frame header too short")
            precision, height, width, components = _FRAME.unpack_from(data, position + 2)
            frame = Header(_jpeg_kind(marker, precision, components), height, width)
        if marker == _SOS:
            if frame is None:
                raise BadImageError("damaged header: JPEG image data without a frame header")
            return frame
        position += length


def _jpeg_kind(marker: int, precision: int, components: int) -> Kind:
    if precision != 8 or marker > _PROGRESSIVE or components not in (1, 3, 4):
        return Kind.JPEG_CPU_ONLY
    if components == 4:
        return Kind.JPEG_CMYK
    if marker == _PROGRESSIVE:
        return Kind.JPEG_PROGRESSIVE
    if components == 1:
        return Kind.JPEG_GRAYSCALE
    return Kind.JPEG_BASELINE if marker == _BASELINE else Kind.JPEG_EXTENDED
