"""Looking at an image file's bytes before they are stored: its kind, its size, whether it is damaged."""

from __future__ import annotations

import io

import simplejpeg
from PIL import Image

from dali_lmdb.store.header import MAX_PIXELS, BadImageError, Header, read_header

__all__ = ["MAX_PIXELS", "BadImageError", "Header", "check_decodes", "read_header"]


def check_decodes(data: bytes) -> None:
    """Decode an image fully, with Pillow, and reject what libjpeg only warns about.

    Pillow ignores libjpeg's warnings (data that ends early, bad Huffman codes, bytes left over) and shows grey
    or garbage for the rest of such an image; simplejpeg's strict mode reports them.

    Raises:
        BadImageError: it does not decode, or not without a warning.
    """
    is_jpeg = data[:2] == b"\xff\xd8"
    try:
        with Image.open(io.BytesIO(data)) as image:
            if is_jpeg:
                # All entropy-coded data is read; only the inverse transform is done at 1/8 of the size.
                image.draft("L", (1, 1))
            image.load()
            components = len(image.getbands())
    except Image.UnidentifiedImageError:
        raise BadImageError("not an image that Pillow knows") from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise BadImageError(f"does not decode: {error}") from error
    if is_jpeg:
        try:
            simplejpeg.decode_jpeg(
                data, "CMYK" if components == 4 else "GRAY", min_height=1, min_width=1, min_factor=8, strict=True
            )
        except ValueError as error:
            # TurboJPEG's own limits (unusual chroma sampling, two components) are no damage: Pillow decoded it.
            if not str(error).startswith("tj"):
                raise BadImageError(f"damaged: {error}") from error
