"""Full, strict decoding of an image, to find damage."""

from __future__ import annotations

import simplejpeg

from dali_lmdb.images.opening import BadImageError, open_image

__all__ = ["check_decodes"]


def check_decodes(data: bytes, *, max_pixels: int | None) -> None:
    """Decode an image fully, and reject what libjpeg only warns about.

    Pillow ignores libjpeg's warnings (data that ends early, bad Huffman codes, bytes left over) and shows grey
    or garbage for the rest of such an image; simplejpeg's strict mode reports them. So Pillow parses JPEGs, and
    simplejpeg decodes them. Pillow decodes everything else, including JPEGs that TurboJPEG does not support.

    Args:
        max_pixels: as for ``read_header``; None if that has already checked it.

    Raises:
        BadImageError: it cannot be decoded, or only with a warning.
    """
    try:
        with open_image(data, max_pixels=max_pixels) as image:
            components = len(image.getbands())
            if data[:2] != b"\xff\xd8" or not _decodes_strictly(data, components=components):
                # A JPEG at 1/8 of its size: that reads all of its data, and saves most of the inverse transform.
                image.draft("L", (1, 1))
                image.load()
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise BadImageError.of(error, what="cannot be decoded: ") from error


def _decodes_strictly(data: bytes, *, components: int) -> bool:
    """Decode a JPEG with TurboJPEG, at 1/8 of the size; return False if it does not support this kind of JPEG.

    Raises:
        BadImageError: it cannot be decoded, or only with a warning.
    """
    colorspace = "CMYK" if components == 4 else "GRAY"
    try:
        simplejpeg.decode_jpeg(data, colorspace, min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        # TurboJPEG's own limits (unusual chroma sampling, two components) are not damage.
        if str(error).startswith("tj"):
            return False
        raise BadImageError(f"damaged: {error}") from error
    return True
