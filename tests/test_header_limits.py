"""Scans and segments of JPEGs are counted by the header reader, in bounded time."""

import contextlib
import struct

import pytest
from bounds import bounded

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
