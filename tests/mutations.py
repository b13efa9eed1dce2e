"""Image files of every kind that a store may hold, and damaged variants of them, each from its number alone."""

import random
import struct
import zlib

import numpy as np
from jpeg_encoder import dct_jpeg, lossless_jpeg
from odd_kinds import AGREED, DIFFERING, HEIGHT, WIDTH
from pictures import KINDS, as_file, picture
from PIL import Image

MOST_BYTES, MOST_PIXELS = 300_000, 2_000_000  # of a file to mutate: larger ones only take longer
_SOF = [0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF]
_PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def corpus(odd_images=None):
    """Whole files by name, and the (width, height) that is in their header, or None.

    Args:
        odd_images: a folder of more files; only small ones are taken.
    """
    pixels = picture(5)[:240, :200]
    image = Image.fromarray(pixels)
    size, deep = image.size, pixels.astype(np.uint16)
    files = {f"made {name}": (encode(image), size) for name, encode in KINDS.items()}
    small = AGREED | {name: data for name, (data, _) in DIFFERING.items()}
    files |= {f"small {name}": (data, (WIDTH, HEIGHT)) for name, data in small.items()}
    more = {
        "gif": as_file(image, "GIF"),
        "gif, animated": as_file(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "png, animated": as_file(image, "PNG", save_all=True, append_images=[image.rotate(90)]),
        "png, grey": as_file(image.convert("L"), "PNG", optimize=True),
        "webp, lossless": as_file(image, "WEBP", lossless=True),
        "tiff, lzw": as_file(image, "TIFF", compression="tiff_lzw"),
        "tiff, jpeg": as_file(image, "TIFF", compression="jpeg"),
        "jpeg 2000": as_file(image, "JPEG2000"),
        "progressive cmyk jpeg": as_file(image.convert("CMYK"), "JPEG", progressive=True),
        "jpeg with restarts": as_file(image, "JPEG", restart_marker_blocks=3),
        "jpeg 4:4:4": as_file(image, "JPEG", subsampling=0, quality=95),
        "jpeg of 12 bits": dct_jpeg(pixels, bits=12),
        "jpeg 4:1:0, odd": dct_jpeg(pixels, sampling=((4, 2), (1, 1), (1, 1))),
        "jpeg 3:1": dct_jpeg(pixels, sampling=((3, 1), (1, 1), (1, 1))),
        "jpeg mixed": dct_jpeg(pixels, sampling=((2, 1), (1, 2), (1, 1))),
        "jpeg with large chroma": dct_jpeg(pixels, sampling=((1, 1), (2, 2), (1, 2))),
        "lossless jpeg": lossless_jpeg(pixels),
        "lossless grey jpeg": lossless_jpeg(pixels[..., :1], predictor=4),
        "lossless jpeg of 12 bits": lossless_jpeg(deep * 16, bits=12, predictor=6),
        "lossless jpeg of 16 bits": lossless_jpeg(deep[:100, :100] * 257, bits=16, predictor=7),
    }
    files |= {name: (data, size) for name, data in more.items()}
    for path in sorted(odd_images.iterdir()) if odd_images else ():
        if path.suffix != ".tsv" and path.stat().st_size <= MOST_BYTES:
            data = path.read_bytes()
            found = _size(data)
            if found is None or found[0] * found[1] <= MOST_PIXELS:
                files[path.name] = (data, found)
    return files


def mutant(files, *, seed, number):
    """One damaged file.

    Returns:
        (its bytes, what it was made from, what was done to it).
    """
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(sorted(files))
    data, size = files[name]
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.choice(tuple(_MUTATIONS))
        data = _MUTATIONS[kind](data, rng, size)
        done.append(kind)
    if data[:8] == _PNG_HEAD and rng.random() < 0.7:  # else hardly anything of a PNG is ever decoded
        data = _with_checksums(data)
    return data, name, "+".join(done)


def _flip(data, rng, size):
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set(data, rng, size):
    """Bytes that are lengths, counts and types more often than others."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4))):
        if changed:
            changed[_place(data, rng)] = rng.choice(
                (0, 1, 2, 4, 8, 12, 16, 0x11, 0x22, 0x41, 0x7F, 0x80, 0xFE, 0xFF)
            )
    return bytes(changed)


def _place(data, rng):
    """Somewhere, half of the time among the first bytes."""
    return rng.randrange(min(len(data), 700) if rng.random() < 0.5 else len(data))


def _cut(data, rng, size):
    return data[: rng.randrange(len(data) + 1)]


def _cut_out(data, rng, size):
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 2, 16, 500, 5000)) :]


def _insert(data, rng, size):
    place, source = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    count = rng.choice((1, 2, 16, 500, 5000))
    new = rng.choice((rng.randbytes(count), bytes(count), b"\xff" * count, data[source : source + count]))
    return data[:place] + new + data[place:]


def _swap(data, rng, size):
    """Exchange, double or drop a segment, chunk or run of bytes."""
    parts = _parts(data, rng)
    first, second = rng.randrange(len(parts)), rng.randrange(len(parts))
    kind = rng.randrange(3)
    if kind == 0:
        parts[first], parts[second] = parts[second], parts[first]
    elif kind == 1:
        parts.insert(first, parts[second])
    else:
        del parts[first]
    return b"".join(parts)


def _parts(data, rng):
    if data[:2] == b"\xff\xd8":
        return _jpeg_segments(data)
    if data[:8] == _PNG_HEAD:
        return [_PNG_HEAD, *_png_chunks(data)]
    if data[:4] == b"RIFF":
        return [data[:12], *_chunks(data, start=12, lengths="<I", length_at=4, around=8, even=True)]
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(8))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def _png_chunks(data):
    return _chunks(data, start=8, lengths=">I", length_at=0, around=12, even=False)


def _chunks(data, *, start, lengths, length_at, around, even):
    parts = []
    while start + around <= len(data):
        (length,) = struct.unpack_from(lengths, data, start + length_at)
        end = start + around + length + (length % 2 if even else 0)
        parts.append(data[start:end])
        start = end
    return [*parts, data[start:]]


def _jpeg_segments(data):
    """SOI, each segment with what follows it up to the next marker, and the rest."""
    starts, place = [0], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] not in (0, 0xD9):
        starts.append(place)
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[starts[-1] + 1] == 0xDA:
            while place + 2 <= len(data) and not (data[place] == 0xFF and data[place + 1] & 0xF8 not in (0, 0xD0)):
                place += 1
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def _frame(data):
    """Where a JPEG's frame header begins, or None."""
    place = 0
    for segment in _jpeg_segments(data) if data[:2] == b"\xff\xd8" else ():
        if len(segment) > 9 and segment[1] in _SOF:
            return place
        place += len(segment)
    return None


def _exchange_frame(data, rng, size):
    """Another process, precision, number of components or sampling in a JPEG's frame; a flip in other files."""
    start = _frame(data)
    if start is None or start + 20 > len(data):
        return _set(data, rng, size)
    changed = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        changed[start + 1] = rng.choice(_SOF)
    elif kind == 1:
        changed[start + 4] = rng.choice((0, 2, 7, 8, 9, 12, 16, 17, 255))
    elif kind == 2:
        changed[start + 9] = rng.choice((0, 1, 2, 3, 4, 5, 255))
    else:
        changed[start + 11 + 3 * rng.randrange(3)] = rng.choice(
            (0, 0x11, 0x12, 0x21, 0x22, 0x41, 0x14, 0x44, 0x33)
        )
    return bytes(changed)


def _resize(data, rng, size):
    """Another width or height in the header, wherever it is in the first bytes."""
    if size is None:
        return _flip(data, rng, size)
    old = rng.choice(size)
    new = rng.choice(
        (0, 1, old - 1, old + 1, 2 * old, old // 2, 8 * old, old + 7, rng.choice((9001, 65500, 65535)))
    )
    changed = bytearray(data)
    forms = [form for form in (">I", "<I", ">H", "<H") if old and data[:800].find(struct.pack(form, old)) >= 0]
    if data[:4] == b"RIFF" or not forms:  # whose numbers are of 14 and 24 bits
        return _set(data, rng, size)
    form = forms[0]
    place = data[:800].find(struct.pack(form, old))
    struct.pack_into(form, changed, place, min(new, (1 << 8 * struct.calcsize(form)) - 1))
    return bytes(changed)


_MUTATIONS = {
    "flip": _flip,
    "set": _set,
    "cut": _cut,
    "cut out": _cut_out,
    "insert": _insert,
    "swap": _swap,
    "frame": _exchange_frame,
    "size": _resize,
}


def _with_checksums(data):
    """A PNG whose chunks have right checksums."""
    fixed = [_PNG_HEAD]
    for chunk in _png_chunks(data):
        if len(chunk) >= 12:
            chunk = chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4]))
        fixed.append(chunk)
    return b"".join(fixed)


def _size(data):
    """(width, height) of a JPEG's frame."""
    start = _frame(data)
    if start is None:
        return None
    height, width = struct.unpack_from(">HH", data, start + 5)
    return width, height
