"""What is done to one image in the process that decodes: check, re-encode, certify for training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dali_lmdb.decoding.dali import MAX_GROUP, DaliDecoder, cause_of
from dali_lmdb.decoding.examiner import Examination
from dali_lmdb.errors import DeviceError
from dali_lmdb.images.agreement import dali_agrees
from dali_lmdb.images.blank import blank_jpeg
from dali_lmdb.images.checking import check_jpeg
from dali_lmdb.images.header import Header
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.opening import BadImageError, open_image, to_rgb
from dali_lmdb.images.reencoding import Change, change_image, needed_change
from dali_lmdb.isolated import Answer, Sample

__all__ = ["examine"]


def examine(settings: Examination) -> Callable[[Sequence[Sample], Callable[[int | None], None]], list[Answer]]:
    """The ``isolated.Handler``: a sample's note is its header; an answer has the fields of ``Verdict``.

    Raises:
        DeviceError: DALI does not decode at all.
    """
    if settings.certify:
        dali = DaliDecoder()
        try:
            dali.sizes([blank_jpeg(8, 8)])
        except RuntimeError as error:
            raise DeviceError(
                f"DALI cannot decode even a blank JPEG: {cause_of(error)}; check how it is installed"
            ) from error
        return _Certifier(settings, dali)
    return lambda samples, begin: [image.answer() for image in _changed(samples, begin, settings)]


class _Image:
    """An image on its way: the source's, or what it was re-encoded to."""

    def __init__(self, number: int, sample: Sample) -> None:
        kind, height, width = sample.note
        self.number = number
        self.data: bytes | memoryview = sample.data  # not copied: fresh memory costs more than the copy
        self.header = Header(Kind(kind), height, width)
        self.change = Change.NONE
        self.reason: str | None = None

    def apply(self, change: Change, settings: Examination) -> None:
        if change != Change.NONE:
            self.data, self.header = change_image(
                self.data,
                change,
                resize=settings.resize,
                quality=settings.quality,
                max_pixels=settings.max_pixels,
            )
            self.change |= change

    def answer(self) -> Answer:
        changed = self.reason is None and self.change != Change.NONE
        return Answer([self.reason, *self.header, self.change], bytes(self.data) if changed else None)


def _changed(
    samples: Sequence[Sample], begin: Callable[[int | None], None], settings: Examination
) -> Iterator[_Image]:
    """Check and re-encode images as the settings say; bad ones have a reason."""
    for number, sample in enumerate(samples):
        begin(number)
        image = _Image(number, sample)
        try:
            if settings.certify and image.header.kind.is_jpeg:
                check_jpeg(image.data, image.header.kind)
            image.apply(
                needed_change(image.header, transcode=settings.transcode, resize=settings.resize), settings
            )
        except BadImageError as error:
            image.reason = str(error)
        yield image


class _Certifier:
    """The handler that certifies."""

    def __init__(self, settings: Examination, dali: DaliDecoder) -> None:
        self._settings, self._dali = settings, dali

    def __call__(self, samples: Sequence[Sample], begin: Callable[[int | None], None]) -> list[Answer]:
        images = list(_changed(samples, begin, self._settings))
        jpegs = [image for image in images if image.reason is None and image.header.kind.is_jpeg]
        for first in range(0, len(jpegs), MAX_GROUP):
            group = jpegs[first : first + MAX_GROUP]
            begin(None)
            if not self._accepts(group):
                for image in group:
                    begin(image.number)
                    image.reason = self._objection(image)
        for image in images:
            if image.reason is None and not image.header.kind.is_jpeg:
                begin(image.number)
                image.reason = self._objection(image)
        return [image.answer() for image in images]

    def _accepts(self, jpegs: list[_Image]) -> bool:
        """Whether DALI decodes all of some JPEGs, and to the sizes that their headers say."""
        try:
            sizes = self._dali.sizes([image.data for image in jpegs])
        except RuntimeError:
            return False
        return np.array_equal(sizes, [image.header[1:] for image in jpegs])

    def _objection(self, image: _Image) -> str | None:
        """Why the loaders could not decode an image; JPEGs have passed the strict check."""
        try:
            if image.header.kind.is_jpeg:
                found = Header(image.header.kind, *self._dali.sizes([image.data])[0].tolist())
                if found != image.header:
                    return f"DALI reads another size: {found.width} x {found.height} pixels"
            elif dali_agrees(image.data):
                expected = np.asarray(_decoded_by_pillow(image.data))
                if not np.array_equal(self._dali.pixels(image.data), expected):
                    return "DALI and Pillow decode it to different pixels"
            else:
                _decoded_by_pillow(image.data)  # for DALI, too
        except BadImageError as error:
            return str(error)
        except RuntimeError as error:
            return f"DALI does not decode it: {cause_of(error)}; --transcode re-encodes it"
        return None


def _decoded_by_pillow(data: bytes | memoryview) -> Any:
    """An RGB image of Pillow."""
    with open_image(data, max_pixels=None) as opened:
        try:
            return to_rgb(opened)
        except BadImageError as error:
            raise BadImageError(f"Pillow cannot decode it: {error}") from error
