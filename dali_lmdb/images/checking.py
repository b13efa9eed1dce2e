"""Full, strict decoding of a JPEG, to find damage."""

from __future__ import annotations

import simplejpeg

from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.opening import BadImageError, open_image

__all__ = ["check_jpeg"]

# Kinds that libjpeg-turbo decodes at a reduced size. It writes a lossless JPEG at its full size, whatever size was
# asked for, and so beyond the end of the image's memory.
_SCALABLE = (
    Kind.JPEG_BASELINE,
    Kind.JPEG_EXTENDED,
    Kind.JPEG_PROGRESSIVE,
    Kind.JPEG_GRAYSCALE,
    Kind.JPEG_CMYK,
)
_START_BYTES = 8 << 10  # Pillow copies what it opens
_OWN_COLORSPACE = {1: "GRAY", 3: "RGB", 4: "CMYK"}  # a lossless JPEG is not converted to another one


def check_jpeg(data: bytes | memoryview, kind: Kind) -> None:
    """Decode a JPEG fully, and reject what libjpeg only warns about.

    Pillow ignores libjpeg's warnings (data that ends early, bad Huffman codes, bytes left over) and shows grey
    or garbage for the rest of such an image; simplejpeg's strict mode reports them. So Pillow parses JPEGs, and
    simplejpeg decodes them. Pillow, leniently, decodes those that TurboJPEG does not support.

    Args:
        data: a JPEG that ``read_header`` accepts.
        kind: as ``read_header`` says.

    Raises:
        BadImageError: it cannot be decoded, or only with a warning.
    """
    try:
        if not _decodes_strictly(data, kind, components=_num_components(data)):
            with open_image(data, max_pixels=None) as image:
                image.load()
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise BadImageError.of(error, what="Pillow cannot decode it: ") from error


def _num_components(data: bytes | memoryview) -> int:
    """Let Pillow parse a JPEG's header, which its start holds as a rule."""
    try:
        with open_image(data[:_START_BYTES], max_pixels=None) as image:
            return len(image.getbands())
    except BadImageError:
        with open_image(data, max_pixels=None) as image:
            return len(image.getbands())


def _decodes_strictly(data: bytes | memoryview, kind: Kind, *, components: int) -> bool:
    """Decode a JPEG with TurboJPEG; return False if it does not support this kind of JPEG.

    Raises:
        BadImageError: it cannot be decoded, or only with a warning.
    """
    if kind in _SCALABLE:
        # Grey at 1/8 of the size: that reads all of the data, and saves the conversion of colours and most of the
        # inverse transform.
        colorspace = "CMYK" if components == 4 else "GRAY"
        size = {"min_height": 1, "min_width": 1, "min_factor": 8}
    else:
        colorspace, size = _OWN_COLORSPACE.get(components, "GRAY"), {}
    try:
        simplejpeg.decode_jpeg(data, colorspace, **size, strict=True)
    except ValueError as error:
        # TurboJPEG's own limits (unusual chroma sampling, two components) are not damage.
        if str(error).startswith(("tj", "Unsupported color conversion")):
            return False
        raise BadImageError(f"damaged: {error}") from error
    return True
