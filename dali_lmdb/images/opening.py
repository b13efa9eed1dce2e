"""Images opened with Pillow: only the formats that a store may hold, each with a pixel limit.

``Image.open`` tries all plugins that Pillow and the program have registered, even those that start other programs
(EPS), and its pixel limit is global to the program. So the plugin of each format is called directly.
"""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FunctionType, SimpleNamespace
from typing import Any

# Importing a plugin registers its format in Image.OPEN.
from PIL import (  # noqa: F401
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

__all__ = [
    "START_BYTES",
    "BadImageError",
    "check_pixels",
    "check_start",
    "crop",
    "open_image",
    "pixel_limit",
    "to_rgb",
]

_max_pixels: ContextVar[int | None] = ContextVar("max_pixels", default=None)


class BadImageError(Exception):
    """An image that cannot be read, or that a store should not hold; the message is the reason, in one line."""

    @classmethod
    def of(cls, error: Exception, *, what: str = "") -> BadImageError:
        """Convert one of Pillow's errors, keeping its reason."""
        return cls(what + (" ".join(str(error).split()) or type(error).__name__))


def check_pixels(size: tuple[int, int], max_pixels: int | None) -> None:
    """Raise ``BadImageError`` for a (width, height) of more than ``max_pixels``; None means no limit."""
    if max_pixels is not None and size[0] * size[1] > max_pixels:
        raise BadImageError(f"{size[0]} x {size[1]} pixels, more than the limit of {max_pixels}")


def pixel_limit(height: int, width: int) -> int | None:
    """``max_pixels`` for an image with this size in the index, 0 if unknown.

    A size in the index was checked when it was written. Otherwise Pillow's limit applies: twice
    ``MAX_IMAGE_PIXELS``, which the program may have set.
    """
    return None if Image.MAX_IMAGE_PIXELS is None else max(height * width, 2 * Image.MAX_IMAGE_PIXELS)


def _with_our_limit(method: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a plugin's method with ``max_pixels`` of ``open_image`` instead of Pillow's global limit."""

    def check(size: tuple[int, int], **_: Any) -> None:
        check_pixels(size, _max_pixels.get())

    assert isinstance(method, FunctionType)
    image = SimpleNamespace(**vars(Image) | {"_decompression_bomb_check": check})
    names = method.__globals__ | {"Image": image}
    return FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)


# The plugins that check sizes themselves, before they allocate memory; the others leave that to Image.open.


class _WebPFile(WebPImagePlugin.WebPImageFile):
    _open = _with_our_limit(WebPImagePlugin.WebPImageFile._open)


class _GifFile(GifImagePlugin.GifImageFile):
    _seek = _with_our_limit(GifImagePlugin.GifImageFile._seek)


class _TiffFile(TiffImagePlugin.TiffImageFile):
    load_prepare = _with_our_limit(TiffImagePlugin.TiffImageFile.load_prepare)


class _Input(io.BytesIO):
    """An image file; while its header is read, with a limit on the reads.

    Most of Pillow's parsers read a byte or a chunk at a time, in Python: 100 MB of blanks in a PPM's header, or of
    empty chunks in a PNG's, take minutes. TIFF tags may all refer to the same bytes, and are kept in memory.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        super().__init__(data)
        self.reads_left, self.bytes_left = _MAX_READS, 2 * len(data) + _MIN_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.reads_left -= 1
        self.bytes_left -= len(data)
        if self.reads_left < 0 or self.bytes_left < 0:
            raise BadImageError("damaged header: too long")
        return data

    def lift_limits(self) -> None:
        self.reads_left = self.bytes_left = sys.maxsize


class _Jpeg2KFile(Jpeg2KImagePlugin.Jpeg2KImageFile):
    def _open(self) -> None:
        assert isinstance(self.fp, _Input)
        self.fp.bytes_left = min(self.fp.bytes_left, _MAX_BOX_BYTES)
        super()._open()


_MAX_BOX_BYTES = 8 << 20  # boxes inside others are taken apart in memory, in Python
_MAX_READS = 100_000  # 30,000 chunks of a PNG, before its pixels
_MIN_BYTES = 1 << 20
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
_OURS: dict[str, Any] = {"WEBP": _WebPFile, "GIF": _GifFile, "TIFF": _TiffFile, "JPEG2000": _Jpeg2KFile}
START_BYTES = 16
"""Bytes at the start of a file that tell its format."""
_NO_IMAGE = "not a JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF or PPM image"


def check_start(start: bytes) -> None:
    """Reject a file that begins like none of the formats.

    Args:
        start: its first ``START_BYTES`` bytes.

    Raises:
        BadImageError: it is not an image.
    """
    if not any(True for _ in _plugins(start)):
        raise BadImageError(_NO_IMAGE)


def _plugins(start: bytes) -> Iterator[Callable[..., Any]]:
    """Yield the plugins whose formats begin like this."""
    for name in _FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is not None and accept is not None and accept(start) is True:
            yield _OURS.get(name, factory)


def open_image(data: bytes | memoryview, *, max_pixels: int | None) -> ImageFile.ImageFile:
    """Open an image, reading only its header.

    Args:
        max_pixels: reject larger images; None if a limit was checked before. Pillow's own limit is not applied.

    Raises:
        BadImageError: not an image, a damaged header, or more than ``max_pixels``.
    """
    token = _max_pixels.set(max_pixels)
    try:
        start = bytes(data[:START_BYTES])
        for plugin in _plugins(start):
            # Pillow reads each segment of a JPEG once; without limits that takes a third less time.
            is_limited = len(data) > _MIN_BYTES or not start.startswith(b"\xff\xd8")
            file = _Input(data) if is_limited else io.BytesIO(data)
            try:
                image: ImageFile.ImageFile = plugin(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):  # not of this format, as in Image.open
                continue
            check_pixels(image.size, max_pixels)
            if isinstance(file, _Input):
                file.lift_limits()
            return image
    except BadImageError:
        raise
    except Exception as error:  # Pillow's parsers raise almost anything on damaged files
        raise BadImageError.of(error, what="damaged header: ") from error
    finally:
        _max_pixels.reset(token)
    raise BadImageError(_NO_IMAGE)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image, as ``convert("RGB")``.

    Raises:
        BadImageError: it cannot be decoded.
    """
    try:
        return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise BadImageError.of(error) from error


def crop(image: Image.Image, *, top: int, left: int, height: int, width: int) -> Image.Image:
    """``Image.crop`` of a decoded image, without Pillow's pixel limit."""
    return image._new(image.im.crop((left, top, left + width, top + height)))
