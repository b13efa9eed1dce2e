"""Damaged image files, and stores that hold them, as no converter would write them."""

import io
import zlib

import numpy as np
import pyarrow as pa
from image_sets import grey_of, size_of
from PIL import Image

from dali_lmdb.images.header import read_header
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.opening import BadImageError
from dali_lmdb.store.writer import StoreWriter


def grey_image(record):
    """A JPEG of ``grey_of(record)``."""
    return encoded(np.full((*size_of(record), 3), grey_of(record), np.uint8))


def noise_image(record):
    """A JPEG whose every pixel counts, of the same size."""
    return encoded(np.random.default_rng(record).integers(0, 256, (*size_of(record), 3), dtype=np.uint8))


def encoded(pixels, format="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **{"quality": 95} | options)
    return file.getvalue()


def _scan(jpeg):
    """Where a JPEG's entropy-coded data begins."""
    marker = jpeg.index(b"\xff\xda")
    return marker + 2 + int.from_bytes(jpeg[marker + 2 : marker + 4], "big")


def _damaged_png():
    raw = bytearray(encoded(np.random.default_rng(0).integers(0, 256, (*size_of(9), 3), dtype=np.uint8), "PNG"))
    raw[2000:5000] = bytes(3000)
    return bytes(raw)


def _zeroed(data, start, count):
    return data[:start] + bytes(count) + data[start + count :]


_JPEG = noise_image(9)
_FRAME, _HUFFMAN = _JPEG.index(b"\xff\xc0"), _JPEG.index(b"\xff\xc4")

DAMAGE = {
    "text": b"Not Found: the image you asked for is no longer here.\n" * 4,
    "nothing": b"",
    "one byte": b"\xff",
    "zeros": bytes(5000),
    "header cut off": _JPEG[:100],
    "no scan": _JPEG[: _scan(_JPEG)],
    "scan cut off": _JPEG[: _scan(_JPEG) + 50],
    "frame header zeroed": _zeroed(_JPEG, _FRAME, 19),
    "precision of 255 bits": _JPEG[: _FRAME + 4] + b"\xff" + _JPEG[_FRAME + 5 :],
    "size zeroed": _zeroed(_JPEG, _FRAME + 5, 4),
    "huffman table zeroed": _zeroed(_JPEG, _HUFFMAN + 4, 60),
    "png with a damaged middle": _damaged_png(),
}
"""Bytes that neither DALI nor Pillow decodes, in any graph, by what is wrong with them; those with a frame header
have ``size_of(9)``."""

NO_IMAGE = "not a JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF or PPM image"
"""The cause where a file is of no kind that is read."""

ZEROED_SCAN = _JPEG[: _scan(_JPEG)] + bytes(len(_JPEG) - _scan(_JPEG) - 2) + b"\xff\xd9"
"""Damage that neither notices: zeros are valid code words; of a noise image of ``size_of(9)``."""


def giant_png():
    """A small PNG that claims 60,000 x 50,000 pixels."""
    png = encoded(np.zeros((16, 16), np.uint8), "PNG")
    at = png.index(b"IHDR")
    claims = b"IHDR" + (60_000).to_bytes(4, "big") + (50_000).to_bytes(4, "big") + png[at + 12 : at + 17]
    return png[:at] + claims + zlib.crc32(claims).to_bytes(4, "big") + png[at + len(claims) + 4 :]


def _kind(value):
    try:
        return read_header(value).kind
    except BadImageError:
        return Kind.UNKNOWN


def write_store(path, values, *, sizes=None, made=None):
    """A store whose record i has label i and name ``cII/III.jpg``.

    Args:
        values: bytes of each record.
        sizes: (height, width) of each in the index; by default ``size_of``.
        made: as in the metadata.
    """
    count = len(values)
    heights, widths = np.array(sizes or [size_of(record) for record in range(count)], np.int32).reshape(-1, 2).T
    with StoreWriter(path) as writer:
        writer.commit(values)
        offsets, lengths = writer.record_extents(0, count)
        columns = {
            "label": np.arange(count, dtype=np.int32),
            "height": heights,
            "width": widths,
            "num_bytes": lengths,
            "crc32": np.array([zlib.crc32(value) for value in values], np.uint32),
            "file_offset": offsets,
            "kind": np.array([_kind(value) for value in values], np.uint8),
            "change": np.zeros(count, np.uint8),
        }
        names = pa.array([f"c{record:02}/{record:03}.jpg" for record in range(count)])
        writer.add_index(columns, names)
        writer.finish(classes=[f"c{record:02}" for record in range(count)], made=made or {"by": "test"})
    return path


def store_with(path, bad, *, num_records=12, image=grey_image):
    """A store of good images but for some records, each damaged as ``DAMAGE`` says.

    Args:
        bad: a mapping from record to key, or the records.
    """
    if not isinstance(bad, dict):
        bad = dict.fromkeys(bad, "scan cut off")
    return write_store(
        path, [DAMAGE[bad[record]] if record in bad else image(record) for record in range(num_records)]
    )
