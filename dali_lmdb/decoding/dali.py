"""DALI's decoders on the CPU, for single images: does DALI decode it, and to which pixels?"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.backend import TensorCPU, TensorListCPU

__all__ = ["MAX_GROUP", "DaliDecoder", "cause_of"]

# In a batch of 32 or more, DALI 2.4.0 parses headers in several threads, and a header that it cannot parse may
# crash the process: the error leaves `RunImplImpl` (image_decoder.h), whose variables the other threads still use.
MAX_GROUP = 31

_CAUSE = re.compile(
    r"encountered:\n\n(.*?)(?:\nC\+\+ context: [^\n]*)?\s*\nCurrent pipeline object is no longer valid", re.DOTALL
)
_CODEC_STATUS = {"3": "damaged file", "4": "unsupported kind of image", "9": "unsupported kind of image"}


def cause_of(error: RuntimeError) -> str:
    """The informative part of DALI's message, in one line."""
    found = _CAUSE.search(str(error))
    telling = " ".join((found[1] if found else str(error)).split())
    telling = re.sub(r"Failed to decode sample #\d+ :\s*", "", telling)  # its index in a batch of no interest
    status = re.fullmatch(r"nvImageCodec failure: '#(\d+)'", telling)
    if status is not None:
        return _CODEC_STATUS.get(status[1], telling)
    if "Input and output samples must occupy" in telling:  # the check of the loaders' graph, see `_checked` there
        return "the window is outside of the image, which has another size in the index"
    return telling or "decoding failed"


class DaliDecoder:
    """Decodes as the graph of the loader does on the CPU: RGB, the EXIF orientation not applied."""

    def __init__(self) -> None:
        self._samples: Any = ()
        self._pipelines: dict[Callable[..., Any], Pipeline] = {}

    def sizes(self, encoded: Sequence[Any]) -> npt.NDArray[np.int32]:
        """Decode the first pixel of up to ``MAX_GROUP`` JPEGs; return their heights and widths, of shape (n, 2).

        DALI's decoder, libjpeg-turbo, stops below the window. Of a JPEG that libjpeg-turbo is known to decode, in
        ``check_jpeg`` or through Pillow, this tells as much as all of its pixels: the same code decodes the rest.

        Raises:
            RuntimeError: of DALI; one of them cannot be decoded, see ``cause_of``.
        """
        _, sizes = self._run(_first_pixels, encoded)
        return np.array(sizes.as_array()[:, :2])

    def pixels(self, encoded: Any) -> npt.NDArray[np.uint8]:
        """Decode an image; return an array of shape (height, width, 3), valid until the next call.

        Raises:
            RuntimeError: of DALI; it cannot be decoded, see ``cause_of``.
        """
        (images,) = self._run(_whole_images, [encoded])
        return np.asarray(images[0])

    def _run(self, define: Callable[[Any], Any], encoded: Sequence[Any]) -> Any:
        # As DALI would make it of a list of arrays, but slower; contiguous=False: no copy.
        tensors = [TensorCPU(np.frombuffer(sample, np.uint8)) for sample in encoded]
        self._samples = TensorListCPU(tensors, contiguous=False)  # type: ignore[call-overload]  # stubs
        pipeline = self._pipelines.pop(define, None)  # after a failure it is of no use
        if pipeline is None:
            pipeline = Pipeline(batch_size=MAX_GROUP, num_threads=1, device_id=None, prefetch_queue_depth=1)
            with pipeline:
                source = fn.external_source(
                    lambda: self._samples, batch=True, no_copy=True, dtype=types.UINT8, ndim=1
                )
                pipeline.set_outputs(*define(source))
            pipeline.build()
        outputs = pipeline.run()
        self._pipelines[define] = pipeline
        return outputs


def _first_pixels(encoded: Any) -> tuple[Any, ...]:
    sizes = fn.peek_image_shape(encoded, dtype=types.INT32, adjust_orientation=False)
    return fn.decoders.image_slice(encoded, **_ONE_PIXEL, **_ARGUMENTS), sizes


def _whole_images(encoded: Any) -> tuple[Any, ...]:
    return (fn.decoders.image(encoded, **_ARGUMENTS),)


_ONE_PIXEL: dict[str, Any] = {"start": [0, 0], "shape": [1, 1], "axes": [0, 1]}
_ARGUMENTS: dict[str, Any] = {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}
