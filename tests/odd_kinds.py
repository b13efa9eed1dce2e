"""One small image of each kind of file that decoders tend to read differently."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 40, 48
_Y, _X = np.mgrid[0:HEIGHT, 0:WIDTH]
PIXELS = np.stack([_X * 5, _Y * 6, (_X * 3 + _Y * 2) % 256], axis=-1).astype(np.uint8)
COLOR = Image.fromarray(PIXELS)
GREY = COLOR.convert("L")
_GREY = np.asarray(GREY)
_ALPHA = (_X * 7 % 256).astype(np.uint8)
_RGBA = np.dstack([PIXELS, _ALPHA])
_GREY_16 = _GREY.astype(np.uint16) * 257
_RGB_16 = PIXELS.astype(np.uint16) * 257
_NIBBLES = (_GREY[:, ::2] & 0xF0 | _GREY[:, 1::2] >> 4).astype(np.uint8)


def saved(image, format, **options):
    """A file as Pillow writes it."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def turned(orientation):
    """EXIF with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def tiff(*strips, photometric, bits=8, samples=3, endian="<", tile=None, **tags):
    """An uncompressed TIFF; tags as ``t339=[3]``, all of 16 bit."""
    values = {
        **{256: [WIDTH], 257: [HEIGHT], 258: [bits] * samples, 259: [1], 262: [photometric], 277: [samples]},
        **{int(tag[1:]): value for tag, value in tags.items()},
    }
    offsets = [8 + sum(len(strip) for strip in strips[:number]) for number in range(len(strips))]
    sizes = [len(strip) for strip in strips]
    values |= {322: [tile], 323: [tile], 324: offsets, 325: sizes} if tile else {273: offsets, 279: sizes}
    directory = 8 + sum(sizes)
    extra_at = directory + 2 + 12 * len(values) + 4
    entries, extra = b"", b""
    for tag, value in sorted(values.items()):
        raw = struct.pack(f"{endian}{len(value)}H", *value)
        if len(raw) > 4:
            raw, extra = struct.pack(f"{endian}I", extra_at + len(extra)), extra + raw
        entries += struct.pack(f"{endian}HHI", tag, 3, len(value)) + raw.ljust(4, b"\0")
    head = (b"II" if endian == "<" else b"MM") + struct.pack(f"{endian}HI", 42, directory)
    return head + b"".join(strips) + struct.pack(f"{endian}H", len(values)) + entries + bytes(4) + extra


def png(rows, *, depth, color):
    """A PNG of (height, n) bytes or big-endian numbers."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, color, 0, 0, 0))
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bmp(rows, *, bits, compression=0, extra=b""):
    """A BMP; ``extra`` are masks or a palette."""
    data = rows if isinstance(rows, bytes) else rows[::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, bits, compression, len(data), 0, 0, 0, 0)
    offset = 14 + len(header) + len(extra)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + header + extra + data


def pnm(magic, largest, values):
    """A PNM of samples in binary or, as a list, in text."""
    data = " ".join(map(str, values)).encode() if isinstance(values, list) else values.tobytes()
    return b"%b\n# made\n%d %d\n%d\n%b" % (magic, WIDTH, HEIGHT, largest, data)


def _tiles(pixels, side):
    padded = np.pad(pixels, ((0, -HEIGHT % side), (0, -WIDTH % side), (0, 0)))
    return [
        padded[top : top + side, left : left + side].tobytes()
        for top in range(0, len(padded), side)
        for left in range(0, padded.shape[1], side)
    ]


_555 = (PIXELS >> 3).astype("<u2") @ np.array([1 << 10, 1 << 5, 1], "<u2")
_565 = (PIXELS >> 3).astype("<u2") @ np.array([1 << 11, 1 << 6, 1], "<u2")
_PALETTE = b"".join(bytes([level * 17, 255 - level * 17, level, 0]) for level in range(16))
_RLE_4 = b"".join(b"".join(bytes([2, pair]) for pair in row) + b"\0\0" for row in _NIBBLES) + b"\0\1"
_LEVELS = [level * 257 + level % 3 * 50 for level in range(256)]

AGREED = {
    "png": saved(COLOR, "PNG"),
    "png of 16 bits in colour": png(_RGB_16.astype(">u2"), depth=16, color=2),
    "png of 4 bits": png(_NIBBLES, depth=4, color=0),
    "png with a palette and transparency": saved(COLOR.quantize(16), "PNG", transparency=3),
    "png with grey and alpha": saved(Image.fromarray(np.dstack([_GREY, _ALPHA]), "LA"), "PNG"),
    "bmp": saved(COLOR, "BMP"),
    "bmp of 32 bits": bmp(_RGBA, bits=32),
    "bmp of 4 bits": bmp(_NIBBLES, bits=4, extra=_PALETTE),
    "pbm": saved(COLOR.convert("1"), "PPM"),
    "pgm": pnm(b"P5", 255, _GREY),
    "ppm": pnm(b"P6", 255, PIXELS),
    "webp with alpha": saved(Image.fromarray(_RGBA), "WEBP"),
    "webp, animated": saved(COLOR, "WEBP", save_all=True, append_images=[COLOR.rotate(90)]),
    "tiff": saved(COLOR, "TIFF"),
    "tiff, grey": saved(GREY, "TIFF", compression="tiff_lzw"),
    "tiff, deflated": saved(COLOR, "TIFF", compression="tiff_adobe_deflate"),
    "tiff, packed": saved(COLOR, "TIFF", compression="packbits"),
    "tiff, big-endian": tiff(PIXELS.tobytes(), photometric=2, endian=">"),
    "tiff in tiles": tiff(*_tiles(PIXELS, 16), photometric=2, tile=16),
    "tiff of two pages": saved(COLOR, "TIFF", save_all=True, append_images=[COLOR.rotate(90)]),
}
"""Files of which DALI is known to give Pillow's pixels; it decodes them itself."""

DIFFERING = {
    "png of 16 bits in grey": (png(_GREY_16.astype(">u2"), depth=16, color=0), "DALI scales, Pillow clips"),
    "png, animated": (
        saved(COLOR, "PNG", save_all=True, append_images=[COLOR.rotate(90)], default_image=True),
        "DALI shows the first frame, Pillow the picture for those that cannot play it",
    ),
    "bmp of 15 bits": (bmp(_555, bits=16), "DALI refuses it"),
    "bmp of 16 bits": (
        bmp(_565, bits=16, compression=3, extra=struct.pack("<III", 0xF800, 0x7E0, 0x1F)),
        "DALI and Pillow scale 5 bits to 8 differently",
    ),
    "bmp, run-length encoded": (bmp(_RLE_4, bits=4, compression=2, extra=_PALETTE), "DALI refuses it"),
    "pgm up to 15": (pnm(b"P5", 15, _GREY >> 4), "DALI does not scale by the largest value"),
    "ppm up to 100": (pnm(b"P6", 100, PIXELS % 101), "DALI does not scale by the largest value"),
    "pgm of 16 bits": (pnm(b"P5", 65535, _GREY_16.astype(">u2")), "DALI scales, Pillow clips"),
    "ppm in text": (pnm(b"P3", 255, PIXELS.ravel().tolist()), "DALI refuses it"),
    "pfm": (saved(GREY.convert("F"), "PPM"), "DALI refuses it"),
    "tiff in CIELAB": (saved(COLOR.convert("LAB"), "TIFF"), "Pillow drops the colour, DALI shows it"),
    "tiff of floats": (saved(Image.fromarray(_GREY / np.float32(255)), "TIFF"), "DALI scales, Pillow clips"),
    "tiff of floats, big-endian": (
        tiff(_GREY.astype(">f4").tobytes(), photometric=1, bits=32, samples=1, endian=">", t339=[3]),
        "DALI scales, Pillow clips",
    ),
    "tiff of 16 bits": (saved(Image.fromarray(_GREY_16), "TIFF"), "DALI scales, Pillow clips"),
    "tiff of 16 bits, big-endian": (
        tiff(_GREY_16.astype(">u2").tobytes(), photometric=1, bits=16, samples=1, endian=">"),
        "DALI scales, Pillow clips",
    ),
    "tiff of 16 bits in colour": (
        tiff(_RGB_16.tobytes(), photometric=2, bits=16),
        "the two take the upper 8 bits, but who decodes it depends on the machine",
    ),
    "tiff of signed 16 bits": (
        tiff(_GREY.astype("<i2").tobytes(), photometric=1, bits=16, samples=1, t339=[2]),
        "DALI refuses it",
    ),
    "tiff of 32 bits": (saved(GREY.convert("I"), "TIFF"), "DALI refuses it"),
    "tiff of 4 bits": (tiff(_NIBBLES.tobytes(), photometric=1, bits=4, samples=1), "DALI refuses it"),
    "tiff of 1 bit": (saved(COLOR.convert("1"), "TIFF"), "DALI refuses it"),
    "tiff of 1 bit, as a fax": (saved(COLOR.convert("1"), "TIFF", compression="group4"), "depends on the machine"),
    "tiff with a palette": (
        tiff(_GREY.tobytes(), photometric=3, samples=1, t320=_LEVELS * 3),
        "DALI and Pillow round its 16-bit colours differently",
    ),
    "tiff with white as 0": (tiff(_GREY.tobytes(), photometric=0, samples=1), "depends on the machine"),
    "tiff in YCbCr": (
        saved(COLOR.convert("YCbCr"), "TIFF", compression="tiff_lzw"),  # Pillow 12 reads no uncompressed ones
        "DALI and Pillow round the conversion differently",
    ),
    "tiff in CMYK": (saved(COLOR.convert("CMYK"), "TIFF"), "depends on the machine"),
    "tiff with alpha": (saved(Image.fromarray(_RGBA), "TIFF"), "depends on the machine"),
    "tiff with premultiplied alpha": (
        tiff(_RGBA.tobytes(), photometric=2, samples=4, t338=[1]),
        "Pillow divides by alpha",
    ),
    "tiff with grey and alpha": (
        tiff(np.dstack([_GREY, _ALPHA]).tobytes(), photometric=1, samples=2, t338=[2]),
        "DALI multiplies by alpha",
    ),
    "tiff in planes": (
        tiff(*(PIXELS[..., plane].tobytes() for plane in range(3)), photometric=2, t284=[2]),
        "the two agree, but who decodes it depends on the machine",
    ),
    "tiff with a jpeg in it": (saved(COLOR, "TIFF", compression="jpeg"), "depends on the machine"),
    "tiff, lzma": (saved(COLOR, "TIFF", compression="lzma"), "DALI refuses it"),
    "tiff upside down": (saved(COLOR, "TIFF", exif=turned(3)), "Pillow applies the orientation of a TIFF"),
    "tiff on its side": (saved(COLOR, "TIFF", exif=turned(6)), "Pillow applies the orientation of a TIFF"),
    "gif": (saved(COLOR, "GIF"), "DALI refuses it"),
    "jpeg 2000": (saved(COLOR, "JPEG2000"), "who decodes it depends on the machine"),
    "jpeg 2000 of 16 bits": (saved(Image.fromarray(_GREY_16), "JPEG2000"), "DALI scales, Pillow clips"),
    "jpeg 2000 in YCbCr": (saved(COLOR.convert("YCbCr"), "JPEG2000"), "DALI does not convert the colours"),
    "avif": (saved(COLOR, "AVIF"), "DALI refuses it"),
}
"""(file, reason) by kind: what Pillow decodes for DALI, and why."""
