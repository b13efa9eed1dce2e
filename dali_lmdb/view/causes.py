"""Why two loaders may give different pixels of a record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dali_lmdb.images.agreement import dali_agrees
from dali_lmdb.images.header import read_header
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.opening import BadImageError
from dali_lmdb.images.orientation import exif_orientation
from dali_lmdb.store import Store
from dali_lmdb.view.delivery import Pixels, Way

__all__ = ["causes", "resemblance"]

_KINDS = {
    Kind.JPEG_GRAYSCALE: "grey JPEG",
    Kind.JPEG_CMYK: "CMYK JPEG",
    Kind.JPEG_CPU_ONLY: "JPEG with arithmetic coding, 12 bits, lossless or of two components",
}
_MUCH_NEARER = 0.5  # of the difference


def causes(store: Store, record: int, ways: Sequence[Way]) -> list[str]:
    """What is special about a record's file and how it is decoded; nothing for a usual JPEG."""
    data = store.copy(record)
    kind = Kind(int(store.gather("kind", np.array([record]))[0]))
    found: list[str] = []
    if kind is Kind.UNKNOWN:
        try:
            kind = read_header(data, max_pixels=None).kind
        except BadImageError:
            return ["damaged header"]
    if kind in _KINDS:
        found.append(_KINDS[kind])
    elif not kind.is_jpeg:
        found.append("not a JPEG" if kind is Kind.OTHER else f"not a JPEG but {kind.name}")
    if (orientation := exif_orientation(data)) != 1:
        found.append(f"EXIF orientation {orientation}")
    if any(way.backend == "dali" for way in ways) and not dali_agrees(data):
        found.append("decoded by Pillow for DALI")
    elif kind.decodes_on_cpu and any(way.device == "cuda" for way in ways):
        found.append("decoded on the CPU, not by nvJPEG")
    return found


def resemblance(left: Pixels, right: Pixels) -> str | None:
    """What was done to one image to get the other, if that explains most of their difference; it may be cropped.

    Args:
        left, right: of the same size.
    """
    distances = {name: _distance(one, other) for name, one, other in _altered(left, right)}
    name = min(distances, key=lambda name: distances[name])
    return name if distances[name] < _MUCH_NEARER * _distance(left, right) else None


def _altered(left: Pixels, right: Pixels) -> Iterator[tuple[str, Pixels, Pixels]]:
    """Yield alterations, and two images that are equal if that is the difference."""
    yield "flipped", left[:, ::-1], right
    yield "upside down", left[::-1], right
    yield "turned around", left[::-1, ::-1], right
    if left.shape[0] == left.shape[1]:
        yield "turned left", np.rot90(left), right
        yield "turned right", np.rot90(left, 3), right
    for names, order in (("red and blue", (2, 1, 0)), ("green and blue", (0, 2, 1)), ("red and green", (1, 0, 2))):
        yield f"{names} swapped", left[..., order], right
    inner = right[1:-1, 1:-1]
    if inner.size:
        height, width = inner.shape[:2]
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                if down or across:
                    moved = left[1 - down : 1 - down + height, 1 - across : 1 - across + width]
                    yield _shifted(down, across), moved, inner


def _shifted(down: int, across: int) -> str:
    moves = {"down": down, "up": -down, "right": across, "left": -across}
    return "shifted by " + " and ".join(f"1 pixel {name}" for name, by in moves.items() if by > 0)


def _distance(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())
