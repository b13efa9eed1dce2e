"""Headers are read in bounded memory and time, whatever they hold; scans of JPEGs are counted."""

import contextlib
import struct
import zlib

import pytest
from bounds import bounded
from odd_kinds import COLOR, saved

from dali_lmdb.images.agreement import dali_agrees
from dali_lmdb.images.header import read_header
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.opening import BadImageError


def segment(marker, payload):
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


def frame(marker, *, components):
    parts = b"".join(bytes([number, 0x11, 0]) for number in range(components))
    return b"\xff\xd8" + segment(marker, struct.pack(">BHHB", 8, 90, 120, components) + parts)


def scan(*, components, data=b"\x12\xff\x00\x34\xff\xd0\x56"):
    parts = b"".join(bytes([number, 0]) for number in range(components))
    return segment(0xDA, bytes([components]) + parts + b"\0\x3f\0") + data


TABLE = segment(0xC4, b"\xff\xda" * 10)  # looks like scans


@pytest.mark.parametrize("marker", [0xC2, 0xC6, 0xCA, 0xCE])
def test_a_progressive_jpeg_may_have_256_scans(marker):
    start, end = (
        frame(marker, components=3),
        b"\xff\xd9" + scan(components=1) * 300,
    )  # after its end, they do not count
    assert read_header(start + (TABLE + scan(components=1)) * 256 + end)[1:] == (90, 120)
    with pytest.raises(BadImageError, match="more than 256 scans"):
        read_header(start + (TABLE + scan(components=1)) * 257 + end)


def test_scans_of_a_baseline_jpeg_are_counted_unless_the_first_holds_all_components():
    assert read_header(frame(0xC0, components=3) + scan(components=1) * 3).kind == Kind.JPEG_BASELINE
    with pytest.raises(BadImageError, match="more than 256 scans"):
        read_header(frame(0xC0, components=3) + scan(components=1) * 257)
    read_header(frame(0xC0, components=3) + scan(components=3) * 257)  # decoders stop after the first


@pytest.mark.parametrize("hiding", [b"\xff\xfe\0\0", b"\xff\xfe\0\1", b"\xff\x02\xff\xff", b"\xff\xff\xff"])
def test_scans_are_found_behind_markers_that_decoders_skip(hiding):
    with pytest.raises(BadImageError, match="more than 256 scans"):
        read_header(frame(0xC2, components=1) + (scan(components=1) + hiding) * 257)


@pytest.mark.parametrize("start", [b"\xff\xd8", frame(0xC2, components=1) + scan(components=1)])
@pytest.mark.parametrize("unit", [b"\xff", b"\xff\xd0", b"\xff\x00", b"\xff\xe0\0\2", b"\xff\xda\0\2"])
def test_a_large_jpeg_of_nothing_but_markers_is_refused_soon(start, unit):
    data = start + unit * ((50 << 20) // len(unit))
    with bounded(), contextlib.suppress(BadImageError):
        assert read_header(data).kind == Kind.JPEG_PROGRESSIVE


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + zlib.crc32(name + data).to_bytes(4, "big")


PNG = saved(COLOR, "PNG")[:33]  # with its header chunk
JP2 = saved(COLOR, "JPEG2000")[:32]  # with its file type box
LONG = {
    "ppm with a long comment": lambda: b"P6\n#" + b"x" * (50 << 20) + b"\n10 10\n254\n",
    "ppm with blanks": lambda: b"P6\n" + b" " * (50 << 20) + b"\n10 10\n254\n",
    "ppm with comments": lambda: b"P6\n" + b"#\n" * (25 << 20) + b"\n10 10\n254\n",
    "png with empty chunks": lambda: PNG + chunk(b"abCd", b"") * (4 << 20),
    "gif with junk": lambda: b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0, 0, 0) + b"\1" * (50 << 20),
    "jp2 with boxes": lambda: JP2 + b"\0\0\0\x08abcd" * (6 << 20),
    "jp2 with boxes in its header": lambda: (
        JP2 + struct.pack(">I", 8 + (48 << 20)) + b"jp2h" + b"\0\0\0\x08abcd" * (6 << 20)
    ),
}


@pytest.mark.parametrize("image", LONG.values(), ids=LONG)
def test_a_header_of_many_megabytes_is_refused_soon(image):
    data = image()
    with bounded(), pytest.raises(BadImageError, match="damaged header: too long"):
        read_header(data)
    with bounded():
        assert not dali_agrees(data)


def test_a_comment_of_ordinary_length_in_a_header_is_read():
    assert read_header(b"P6\n#" + b"x" * 50_000 + b"\n30 20\n255\n" + bytes(1800))[1:] == (20, 30)
    assert read_header(PNG + chunk(b"iTXt", b"a\0" + bytes(3 << 20)) + saved(COLOR, "PNG")[33:]).kind == Kind.PNG
