"""Tell failures of DALI that records caused from all others, and find those records by decoding them again."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NoReturn

import numpy as np
from nvidia.dali import Pipeline

from dali_lmdb.errors import DeviceError
from dali_lmdb.images.blank import blank_jpeg
from dali_lmdb.images.header import MAX_PIXELS
from dali_lmdb.loaders.pipeline import GraphSettings, build_pipeline
from dali_lmdb.loaders.prefetch import Feed

__all__ = ["Probe", "may_be_a_record", "raise_explained"]

# DALI raises a plain RuntimeError for everything, so only its text tells. Texts of DALI 2.4.0: image_decoder.h (#N
# is an nvimgcodecStatus_t of nvimgcodec.h), crop_window.h, and what `slice` says of a window outside of the image,
# which means that the index has another size.
_RECORD = re.compile(
    r"Failed to decode sample #\d+ : |nvImageCodec failure: '#(?:3|4|9|13|14|17|18|19)'"
    r"|The cropping window .* is not valid for image dimensions|ROI (?:begin|end) must fit within the image bounds"
    r"|Slice can't be placed out of bounds"
)
_MEMORY = re.compile(
    r"Can't allocate \d+ bytes on |CUDA allocation failed|std::bad_alloc|nvImageCodec failure: '#(?:5|15)'"
    r"|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"
    r"|can't start new thread"  # Python's, for the thread that reads ahead
)
_HOST_MEMORY = re.compile(r"bytes on host|std::bad_alloc|new thread")
_CUDA = re.compile(r"CUDA (?:runtime|driver) API error|nvImageCodec failure: '#21'")

_CAUSE = re.compile(
    r"encountered:\n\n(.*?)(?:\nC\+\+ context: [^\n]*)?\s*\nCurrent pipeline object is no longer valid", re.DOTALL
)
_CODEC_STATUS = {"3": "damaged file", "4": "unsupported kind of image", "9": "unsupported kind of image"}
_JPEG_MAX_SIDE = 65_500  # libjpeg's

# In a batch of 32 or more, DALI 2.4.0 parses headers in several threads, and a header that it cannot parse may
# crash the process: the error leaves `RunImplImpl` (image_decoder.h), whose variables the other threads still use.
_GROUP_RECORDS = 31

Sizes = dict[int, tuple[int, int]]
"""(height, width) of records, as in the index, by row of the batch."""


def may_be_a_record(error: RuntimeError) -> bool:
    """True if a failure of DALI may be about a record; False if it is about memory or CUDA, or of unknown kind."""
    text = str(error)
    return bool(_RECORD.search(text)) and not (_MEMORY.search(text) or _CUDA.search(text))


def raise_explained(error: RuntimeError) -> NoReturn:
    """Raise a failure of DALI that no record caused: as it is, or as a ``DeviceError`` that says what to do."""
    text = str(error)
    if _MEMORY.search(text):
        raise DeviceError(
            f"DALI is out of {'host' if _HOST_MEMORY.search(text) else 'GPU'} memory: {_cause(error)}; use a "
            "smaller batch_size (--batch-size) or prefetch_queue_depth=1"
        ) from error
    if _CUDA.search(text):
        raise DeviceError(
            f"DALI cannot use the GPU: {_cause(error)}; start the process again, and check the GPU and its driver "
            "(nvidia-smi) if it fails again"
        ) from error
    raise error


class Probe:
    """Decodes records apart from their batch, to find those that make it fail.

    On a GPU it decodes each record with the hardware JPEG engine and without it: in a batch either may happen, so
    a record that fails in one of these ways is bad.

    Args:
        settings: settings of the graph whose batch failed.
    """

    def __init__(self, settings: GraphSettings) -> None:
        # Little memory: nothing is preallocated, and decoders have buffers for each thread, so there is only one.
        small = replace(settings, num_threads=1, prefetch_queue_depth=1, height_hint=0, width_hint=0)
        loads = (1.0, 0.0) if settings.decode_device == "gpu" else (settings.hw_decoder_load,)
        self.ways = [replace(small, hw_decoder_load=load) for load in loads]

    def causes(self, feed: Feed, sizes: Sizes, *, failed_before: bool) -> dict[int, str]:
        """Why records of a batch cannot be decoded, by row of the batch; those that can be are left out.

        Args:
            feed: DALI's inputs for the batch.
            sizes: sizes of the records to decode, by row.
            failed_before: the records failed before, with other crops. Each is then decoded alone, since most will
                fail again, and without checking first that DALI can decode a blank image.

        Raises:
            RuntimeError: DALI fails for a reason other than these records, such as lack of memory.
            DeviceError: not even a blank image can be decoded.
        """
        causes: dict[int, str] = {}
        for settings in self.ways:
            rows = [row for row in sizes if row not in causes]
            size = 1 if failed_before else _GROUP_RECORDS
            groups = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
            if not groups:
                break
            decoder = _Decoder(replace(settings, batch_size=len(groups[0])))
            try:
                if not failed_before:
                    _check_blank(decoder, feed, sizes)
                causes |= _halve(decoder, feed, groups)
            finally:
                decoder.close()
        return causes


class _Decoder:
    """A small pipeline, built when it is needed, and again after it has failed."""

    def __init__(self, settings: GraphSettings) -> None:
        self._settings = settings
        self._pipeline: Pipeline | None = None
        self._samples: Feed = ()

    def decode(self, samples: Feed) -> RuntimeError | None:
        """Decode some samples; return DALI's error, which may be about one of them, or None if all are decoded.

        Raises:
            RuntimeError: an error of another kind.
        """
        self._samples = samples
        try:
            if self._pipeline is None:
                self._pipeline = build_pipeline(lambda info: self._samples, self._settings)
            self._pipeline.run()  # with a queue of one, nothing is prefetched
        except RuntimeError as error:
            failure = error
        else:
            return None
        failure.__traceback__ = None  # it holds the pipeline
        self.close()
        if not may_be_a_record(failure):
            raise failure
        return failure

    def close(self) -> None:
        """Release the pipeline."""
        self._pipeline = None


def _halve(decoder: _Decoder, feed: Feed, groups: list[list[int]]) -> dict[int, str]:
    """Find the records that fail by halving the groups that do: about ten runs for one bad record among 31."""
    causes: dict[int, str] = {}
    while groups:
        # The largest first: nvImageCodec sizes the hardware engine's share by a pipeline's first batch.
        groups.sort(key=len)
        group = groups.pop()
        error = decoder.decode(_select(feed, group))
        if error is None:
            continue
        if len(group) == 1:
            causes[group[0]] = _cause(error)
        else:
            middle = len(group) // 2
            groups += [group[:middle], group[middle:]]
    return causes


def _select(feed: Feed, rows: list[int]) -> Feed:
    """DALI's inputs for some rows of a batch."""
    encoded, *numbers = feed
    return [encoded[row] for row in rows], *(values[rows] for values in numbers)


def _check_blank(decoder: _Decoder, feed: Feed, sizes: Sizes) -> None:
    """Raise ``DeviceError`` if DALI cannot decode even a blank image of the largest record's size.

    Then its failures say nothing about the records: with an unsuitable driver, or if nvImageCodec lacks memory and
    does not say so, it fails to decode every one of them.
    """
    pixels = {
        row: height * width
        for row, (height, width) in sizes.items()
        if height * width <= MAX_PIXELS and max(height, width) <= _JPEG_MAX_SIDE
    }
    if not pixels:
        return
    row = max(pixels, key=pixels.__getitem__)
    height, width = sizes[row]
    blank = np.frombuffer(blank_jpeg(height, width), np.uint8)
    error = decoder.decode(([blank], *_select(feed, [row])[1:]))
    if error is not None:
        raise DeviceError(
            f"DALI fails to decode a batch, and even a blank JPEG of {height} x {width} pixels: {_cause(error)}; "
            "check how it is installed, and the GPU's driver if there is one"
        ) from error
    decoder.close()  # so that a new pipeline's first batch sizes the hardware engine's share, see `_halve`


def _cause(error: RuntimeError) -> str:
    """The informative part of DALI's message, in one line."""
    found = _CAUSE.search(str(error))
    telling = " ".join((found[1] if found else str(error)).split())
    telling = re.sub(r"Failed to decode sample #\d+ :\s*", "", telling)  # its index in the probe's own batch
    status = re.fullmatch(r"nvImageCodec failure: '#(\d+)'", telling)
    if status is not None:
        return _CODEC_STATUS.get(status[1], telling)
    return telling or "decoding failed"
