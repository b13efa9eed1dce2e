"""Images through Pillow, as torchvision's ``ImageFolder`` reads them; what goes wrong has a cause fit to show."""

from __future__ import annotations

import io

from PIL import Image

__all__ = ["PillowError", "open_image", "pillow_cause", "to_rgb"]


class PillowError(Exception):
    """Pillow does not decode an image; the message is the cause, in one line."""

    @classmethod
    def of(cls, error: Exception) -> PillowError:
        """What Pillow raised, told in one line."""
        if isinstance(error, Image.UnidentifiedImageError):  # its message is the address of our buffer
            return cls("not an image that Pillow knows")
        return cls(" ".join(str(error).split()) or type(error).__name__)


def open_image(data: bytes | memoryview) -> Image.Image:
    """An image whose header is read, and nothing else.

    Raises:
        PillowError: it is not an image, or its header is damaged.
    """
    try:
        return Image.open(io.BytesIO(data))
    except Exception as error:  # Pillow's parsers raise almost anything on damaged files
        raise PillowError.of(error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image.

    Raises:
        PillowError: it does not decode.
    """
    try:
        return image.convert("RGB")
    except Exception as error:
        raise PillowError.of(error) from error


def pillow_cause(data: bytes | memoryview) -> str | None:
    """Why Pillow does not decode an image; None if it does."""
    try:
        to_rgb(open_image(data))
    except PillowError as error:
        return str(error)
    return None
