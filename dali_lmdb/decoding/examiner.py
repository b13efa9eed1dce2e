"""Examine images from several threads, in as many processes.

Only those processes import DALI and run ``examination.py``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dali_lmdb.images.header import Header
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.reencoding import QUALITY, Change
from dali_lmdb.isolated import Died, Isolated, Sample

__all__ = ["DESCRIPTORS", "Examination", "Examiner", "Room", "Verdict"]

DESCRIPTORS = 6
"""Open files of this process for each that decodes, while it starts; later it takes three."""

# Pixels that all processes together decode at once, except that one image may have more. Decoders and Pillow take
# 3 to 20 bytes for each, the most for JPEG 2000.
_MOST_PIXELS = 100_000_000
# A process that decoded an image of so many pixels is ended, since decoders and malloc may keep its memory.
_LARGE_PIXELS = 16_000_000


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What to do with images; the settings have the meaning that ``ConvertSettings`` gives them."""

    certify: bool = True
    """Decode images as the loaders will, with DALI and with Pillow, and JPEGs strictly."""
    transcode: bool = False
    resize: int | None = None
    quality: int = QUALITY
    max_pixels: int | None = None


class Verdict(NamedTuple):
    """The result for one image."""

    reason: str | None
    """Why it is bad, in one line; None if it is good."""
    header: Header
    change: Change
    data: bytes | None
    """The bytes that it was re-encoded to; None if it was not."""


class Examiner:
    """Examines images. Any threads may ask; there are as many processes as have asked at once. A context manager.

    Args:
        settings: what to do with the images.
    """

    def __init__(self, settings: Examination) -> None:
        self._settings = settings
        self._processes: list[Isolated] = []
        self._idle: list[Isolated] = []
        self._closed = False
        self._room = Room(_MOST_PIXELS)

    def start(self) -> None:
        """Start one process now, so that it is ready when the first images come."""
        process = self._new()
        self._idle.append(process)
        with contextlib.suppress(OSError):  # as for lack of descriptors: it is told when images come
            process.start()

    def examine(self, images: Sequence[tuple[Any, Header]]) -> list[Verdict]:
        """Examine images, whose headers ``read_header`` gave.

        Raises:
            RuntimeError: closed meanwhile.
            DeviceError: DALI does not decode at all, or the process cannot start.
        """
        if not images:
            return []
        samples = [Sample(data, header) for data, header in images]
        most_pixels = max(header.height * header.width for _, header in images)
        with self._room.taken(most_pixels), self._process() as process:  # which decodes one at a time
            answers = process.work(samples)
            if most_pixels > _LARGE_PIXELS:
                process.end()
        return [
            _verdict_of_dead(answer, header) if isinstance(answer, Died) else _verdict(answer.data, *answer.value)
            for answer, (_, header) in zip(answers, images, strict=True)
        ]

    @contextlib.contextmanager
    def _process(self) -> Iterator[Isolated]:
        """One that no other thread uses. Not one for each thread: ``verify`` has new threads for each file."""
        try:
            process = self._idle.pop()
        except IndexError:
            process = self._new()
        if self._closed:  # checked last, so that close() sees the process or this sees close()
            process.close()
        try:
            yield process
        finally:
            self._idle.append(process)

    def _new(self) -> Isolated:
        process = Isolated("dali_lmdb.decoding.examination:examine", self._settings)
        self._processes.append(process)
        return process

    def close(self) -> None:
        """End the processes, even in the middle of an image; no thread gets another one."""
        self._closed = True
        for process in self._processes:
            process.close()

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _verdict(data: bytes | None, reason: str | None, kind: int, height: int, width: int, change: int) -> Verdict:
    return Verdict(reason, Header(Kind(kind), height, width), Change(change), data)


def _verdict_of_dead(died: Died, header: Header) -> Verdict:
    return Verdict(f"the decoder {died.cause}", header, Change.NONE, None)


class Room:
    """A number of pixels that threads share."""

    def __init__(self, pixels: int) -> None:
        self._size = self._left = pixels
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait for so many, or for all if that is less, and give them back in the end."""
        pixels = min(pixels, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= pixels)
            self._left -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._left += pixels
                self._changed.notify_all()
