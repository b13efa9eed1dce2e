"""Tell failures of DALI that records caused from all others, and find those records by decoding them again."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, NoReturn

import numpy as np
from nvidia.dali import Pipeline

from dali_lmdb.decoding.dali import MAX_GROUP, cause_of
from dali_lmdb.errors import DeviceError
from dali_lmdb.images.blank import blank_jpeg
from dali_lmdb.images.header import MAX_PIXELS
from dali_lmdb.images.opening import BadImageError, open_image, to_rgb
from dali_lmdb.isolated import Answer, Died, Handler, Isolated, Sample
from dali_lmdb.loaders.external_source import decoded_fields
from dali_lmdb.loaders.pipeline import GraphSettings, build_pipeline
from dali_lmdb.loaders.prefetch import Feed

__all__ = ["Cause", "Probe", "Sizes", "decoder", "may_be_a_record", "raise_explained"]

# DALI raises a plain RuntimeError for everything, so only its text tells. Texts of DALI 2.4.0: image_decoder.h (#N
# is an nvimgcodecStatus_t of nvimgcodec.h), crop_window.h, and what `slice` says of a window outside of the image,
# which means that the index has another size; a JPEG of a precision that does not exist has no sample_type.
_RECORD = re.compile(
    r"Failed to decode sample #\d+ : |nvImageCodec failure: '#(?:3|4|9|13|14|17|18|19)'"
    r"|The cropping window .* is not valid for image dimensions|ROI (?:begin|end) must fit within the image bounds"
    r"|Slice can't be placed out of bounds|Invalid sample_type: |Input and output samples must occupy"
)
_MEMORY = re.compile(
    r"Can't allocate \d+ bytes on |CUDA allocation failed|std::bad_alloc|nvImageCodec failure: '#(?:5|15)'"
    r"|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"
    r"|can't start new thread"  # Python's, for the thread that reads ahead
)
_HOST_MEMORY = re.compile(r"bytes on host|std::bad_alloc|new thread")
_CUDA = re.compile(r"CUDA (?:runtime|driver) API error|nvImageCodec failure: '#21'")

_JPEG_MAX_SIDE = 65_500  # libjpeg's

# To see the crash that `MAX_GROUP` avoids: it happens in 8 to 10 of 10 runs with 256 records on two idle cores.
_TRIES = 20

# Training decodes without a limit, too, and with a GPU a process reserves address space for all of its memory.
_NO_LIMIT = 1 << 46

_HANDLER = f"{__name__}:decoder"

Begin = Callable[[int | None], None]

Sizes = dict[int, tuple[int, int]]
"""(height, width) of records, as in the index, by row of the batch."""


def may_be_a_record(error: RuntimeError) -> bool:
    """True if a failure of DALI may be about a record; False if it is about memory or CUDA, or of unknown kind."""
    text = str(error)
    return bool(_RECORD.search(text)) and not (_MEMORY.search(text) or _CUDA.search(text))


def raise_explained(error: RuntimeError | MemoryError) -> NoReturn:
    """Raise a failure that no record caused: as it is, or as a ``DeviceError`` that says what to do.

    Args:
        error: of DALI, or of numpy, which has no memory for a batch.
    """
    text = str(error)
    if isinstance(error, MemoryError):
        raise DeviceError(f"out of host memory: {text}; use a smaller batch_size (--batch-size)") from error
    if _MEMORY.search(text):
        raise DeviceError(
            f"DALI is out of {'host' if _HOST_MEMORY.search(text) else 'GPU'} memory: {cause_of(error)}; use a "
            "smaller batch_size (--batch-size) or prefetch_queue_depth=1"
        ) from error
    if _CUDA.search(text):
        raise DeviceError(
            f"DALI cannot use the GPU: {cause_of(error)}; start the process again, and check the GPU and its "
            "driver (nvidia-smi) if it fails again"
        ) from error
    raise error


class Cause(NamedTuple):
    """Why a record cannot be decoded."""

    text: str
    died: bool = False
    """Whether it crashed the decoder, or kept it busy for too long; such a record must not be decoded again."""


class Probe:
    """Decodes records apart from their batch, to find those that make it fail.

    This happens in a process of its own, which a record may crash. It starts when it is first needed and is kept.

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
        self._num_threads = settings.num_threads
        self._isolated: Isolated | None = None

    def causes(self, feed: Feed, sizes: Sizes, *, failed_before: bool) -> dict[int, Cause]:
        """Why DALI cannot decode records of a batch, by row of the batch; those that it can are left out.

        Args:
            feed: DALI's inputs for the batch, of ``decoder_inputs``.
            sizes: sizes of the records to decode, by row.
            failed_before: the records failed before, with other crops. Each is then decoded alone, since most will
                fail again, and without checking first that DALI can decode a blank image.

        Raises:
            RuntimeError: DALI fails for a reason other than these records, such as lack of memory.
            DeviceError: not even a blank image can be decoded, or the process is killed, as for lack of memory.
        """
        if not sizes:
            return {}
        if not failed_before:
            self._check_blank(feed, sizes)
        answers = self._work([_sample(feed, row, alone=failed_before) for row in sizes])
        return {row: cause for row, cause in zip(sizes, answers, strict=True) if cause is not None}

    def pillow_causes(
        self, files: Sequence[bytes | memoryview], limits: Sequence[int | None]
    ) -> list[Cause | None]:
        """Why Pillow cannot decode image files; None for those that it can.

        Args:
            limits: ``max_pixels`` of ``open_image`` for each.
        """
        if not files:
            return []
        return self._work([Sample(file, {"max_pixels": limit}) for file, limit in zip(files, limits, strict=True)])

    def crashes_together(self, feed: Feed) -> bool:
        """Whether DALI crashes when it decodes a batch as training does: at once, and in several threads."""
        samples = [_sample(feed, row) for row in range(len(feed[0]))]
        # As one sample: half a batch is of no interest.
        data = np.concatenate([sample.data for sample in samples])
        parts = [(len(sample.data), sample.note) for sample in samples]
        (answer,) = self._ask([Sample(data, {"parts": parts, "num_threads": self._num_threads})])
        return isinstance(answer, Died) and answer.cause.startswith("crashed")

    def close(self) -> None:
        """End the process; the next use starts another."""
        isolated, self._isolated = self._isolated, None
        if isolated is not None:
            isolated.close()

    def _work(self, samples: Sequence[Sample]) -> list[Cause | None]:
        causes: list[Cause | None] = []
        for answer in self._ask(samples):
            if isinstance(answer, Died):
                causes.append(Cause(f"the decoder {answer.cause}", died=True))
            else:
                causes.append(None if answer.value is None else Cause(answer.value))
        return causes

    def _ask(self, samples: Sequence[Sample]) -> list[Answer | Died]:
        if self._isolated is None:
            self._isolated = Isolated(_HANDLER, self.ways, growth_bytes=_NO_LIMIT)
        answers = self._isolated.work(samples)
        for answer in answers:
            # From outside, or for want of the machine's memory: no verdict.
            if isinstance(answer, Died) and answer.cause.startswith(("was killed", "ran out of memory")):
                raise DeviceError(
                    f"the process that looks for bad records {answer.cause}; free some memory, or use a smaller "
                    "batch_size (--batch-size)"
                )
        return answers

    def _check_blank(self, feed: Feed, sizes: Sizes) -> None:
        """Raise ``DeviceError`` if DALI cannot decode even a blank image of the largest record's size.

        Then its failures say nothing about the records: with an unsuitable driver, or if nvImageCodec lacks memory
        and does not say so, it fails to decode every one of them.
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
        (cause,) = self._work([_sample(feed, row, alone=True)._replace(data=blank_jpeg(height, width))])
        if cause is not None:
            raise DeviceError(
                f"DALI fails to decode a batch, and even a blank JPEG of {height} x {width} pixels: {cause.text}; "
                "check how it is installed, and the GPU's driver if there is one"
            )


def _sample(feed: Feed, row: int, **note: int) -> Sample:
    """A row of a batch for the process."""
    encoded, *numbers = feed
    return Sample(np.asarray(encoded[row]), {**note, "numbers": [values[row].tolist() for values in numbers]})


# --- In the process


def decoder(ways: Sequence[GraphSettings]) -> Handler:
    """The handler of ``Isolated``: answers are causes, or None for what can be decoded."""

    def handle(items: Sequence[Sample], begin: Begin) -> list[Answer]:
        if "max_pixels" in items[0].note:
            return [Answer(_pillow_cause(item, begin, row)) for row, item in enumerate(items)]
        if "parts" in items[0].note:
            return [_decode_together(items[0], ways[0], begin)]
        causes: dict[int, str] = {}
        for settings in ways:
            causes |= _dali_causes(items, [row for row in range(len(items)) if row not in causes], settings, begin)
        return [Answer(causes.get(row)) for row in range(len(items))]

    return handle


def _decode_together(batch: Sample, settings: GraphSettings, begin: Begin) -> Answer:
    """Decode a batch at once, whether or not its records can be decoded."""
    ends = np.cumsum([length for length, _ in batch.note["parts"]]).tolist()
    samples = [
        Sample(batch.data[end - length : end], note)
        for end, (length, note) in zip(ends, batch.note["parts"], strict=True)
    ]
    decoder = _Decoder(replace(settings, batch_size=len(samples), num_threads=batch.note["num_threads"]))
    for _ in range(_TRIES):
        begin(0)
        decoder.decode(_feed(samples, settings))
    decoder.close()
    return Answer(None)


def _pillow_cause(item: Sample, begin: Begin, row: int) -> str | None:
    begin(row)
    try:
        to_rgb(open_image(item.data, max_pixels=item.note["max_pixels"]))
    except BadImageError as error:
        return str(error)
    return None


def _dali_causes(
    items: Sequence[Sample], rows: list[int], settings: GraphSettings, begin: Begin
) -> dict[int, str]:
    """Find the items that fail by halving the groups that do: about ten runs for one bad record among 31."""
    size = 1 if items[0].note["alone"] else MAX_GROUP
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    causes: dict[int, str] = {}
    pipeline = _Decoder(replace(settings, batch_size=min(size, max(1, len(rows)))))
    try:
        while groups:
            # The largest first: nvImageCodec sizes the hardware engine's share by a pipeline's first batch.
            groups.sort(key=len)
            group = groups.pop()
            begin(group[0] if len(group) == 1 else None)
            error = pipeline.decode(_feed([items[row] for row in group], settings))
            if error is None:
                continue
            if len(group) == 1:
                causes[group[0]] = cause_of(error)
            else:
                middle = len(group) // 2
                groups += [group[:middle], group[middle:]]
    finally:
        pipeline.close()
    return causes


def _feed(items: Sequence[Sample], settings: GraphSettings) -> Feed:
    """DALI's inputs for some items."""
    columns = zip(*(item.note["numbers"] for item in items), strict=True)
    encoded = [np.frombuffer(item.data, np.uint8) for item in items]
    fields = decoded_fields(settings.transform, resize=settings.resize)[1:]
    return encoded, *(np.array(column, field.dtype) for field, column in zip(fields, columns, strict=True))


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
