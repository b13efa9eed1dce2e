"""Kind and size of an image from its file's first bytes."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.opening import BadImageError, check_pixels, open_image

__all__ = ["MAX_PIXELS", "Header", "has_impossible_samples", "read_header"]

MAX_PIXELS = 89_478_485
"""Default limit on height x width: Pillow's MAX_IMAGE_PIXELS, 256 MiB as 8-bit RGB."""

_PILLOW_KINDS = {
    "PNG": Kind.PNG,
    "WEBP": Kind.WEBP,
    "BMP": Kind.BMP,
    "TIFF": Kind.TIFF,
    "GIF": Kind.GIF,
    "PPM": Kind.PNM,
}

# Markers of ITU T.81, table B.1.
_EOI, _SOS = 0xD9, 0xDA
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # a length follows, except after EOI
_MARKER_BETWEEN_SCANS = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # so: no reserved ones, which decoders skip
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame, without DHT, JPG, DAC
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_ALL_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_FRAME = struct.Struct(">BHHB")  # precision, height, width, components
_MAX_BITS = 16  # per sample; table B.2
_MAX_SCANS = 256  # where nvImageCodec stops; decoding a scan may take as long as decoding the image
_MAX_SEGMENTS = 20_000  # 64 KiB each at most, so comments of 1.3 GB, or 78 tables for every scan


class Header(NamedTuple):
    """Kind and size of an image."""

    kind: Kind
    height: int
    """As stored, in pixels, EXIF orientation not applied."""
    width: int


def read_header(data: bytes, *, max_pixels: int | None = MAX_PIXELS) -> Header:
    """Read the kind and size of an image from its first bytes, without decoding it.

    Args:
        max_pixels: reject larger images; None means no limit.

    Raises:
        BadImageError: not an image, a damaged header, or more than ``max_pixels``.
    """
    if not data:
        raise BadImageError("empty file")
    header = _jpeg_header(data) if data[:2] == b"\xff\xd8" else _pillow_header(data, max_pixels)
    if header.height < 1 or header.width < 1:
        raise BadImageError(f"size {header.width} x {header.height}")
    check_pixels((header.width, header.height), max_pixels)
    return header


def _pillow_header(data: bytes, max_pixels: int | None) -> Header:
    with open_image(data, max_pixels=max_pixels) as image:
        width, height = image.size
        return Header(_PILLOW_KINDS.get(image.format or "", Kind.OTHER), height, width)


def has_impossible_samples(data: Any) -> bool:
    """Return whether a frame header before a JPEG's first scan claims more bits a sample than a JPEG can have."""
    try:
        return any(
            marker in _SOF and length > 2 and data[position + 2] > _MAX_BITS
            for marker, position, length in _segments(data)
        )
    except BadImageError:  # damaged further on
        return False


def _segments(data: Any) -> Iterator[tuple[int, int, int]]:
    """Yield the marker segments of a JPEG up to the header of its first scan: (marker, position, length).

    Raises:
        BadImageError: it ends before, or a segment is damaged.
    """
    position = 2
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, position)
        position = len(data) if found is None else found.end()
        marker = data[position - 1]
        if position + 2 > len(data) or marker == _EOI:
            raise BadImageError("damaged header: the JPEG ends before its image data")
        length = int.from_bytes(data[position : position + 2], "big")
        if length < 2 or position + length > len(data):
            raise BadImageError("damaged header: a JPEG segment extends past the end")
        yield marker, position, length
        if marker == _SOS:
            return
        position += length
    raise BadImageError(f"damaged header: more than {_MAX_SEGMENTS} JPEG segments")


def _jpeg_header(data: bytes) -> Header:
    """Walk the marker segments up to the start of the first scan; count the scans if there may be many."""
    frame: Header | None = None
    num_components, is_progressive = 0, False
    for marker, position, length in _segments(data):
        if marker in _SOF:
            if length < 2 + _FRAME.size:
                raise BadImageError("damaged header: a JPEG frame header is too short")
            precision, height, width, components = _FRAME.unpack_from(data, position + 2)
            if precision > _MAX_BITS:
                raise BadImageError(f"damaged header: a JPEG of {precision} bits per sample")
            if frame is None:
                frame = Header(_jpeg_kind(marker, precision, components), height, width)
                num_components, is_progressive = components, marker in _ALL_PROGRESSIVE
        if marker == _SOS:
            if frame is None:
                raise BadImageError("damaged header: JPEG image data without a frame header")
            if is_progressive or data[position + 2 : position + 3] != bytes([num_components]):
                _check_scans(data, position + length)
    assert frame is not None, "the segments end without a scan"
    return frame


def _check_scans(data: bytes, position: int) -> None:
    """Reject more scans than decoders take; damage is left to them.

    Args:
        position: where the data of the first scan begin.
    """
    num_scans = 1
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER_BETWEEN_SCANS.search(data, position)
        position = len(data) if found is None else found.end()
        marker = data[position - 1]
        if found is None or marker == _EOI:
            return
        num_scans += marker == _SOS
        if num_scans > _MAX_SCANS:
            raise BadImageError(f"more than {_MAX_SCANS} scans, the limit of DALI's decoder")
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
    raise BadImageError(f"damaged: more than {_MAX_SEGMENTS} JPEG segments")


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
