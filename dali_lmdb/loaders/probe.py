"""Decodes records alone, to find those that make a batch fail, and says why in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nvidia.dali import Pipeline

from dali_lmdb.loaders.pipeline import GraphSettings, build_pipeline

__all__ = ["Probe"]


class Probe:
    """Decodes one record at a time with separate graphs, to find those that make a batch fail.

    On a GPU there are two graphs: in a batch, the hardware JPEG engine may or may not decode a record, and it is
    bad if it fails in either case.

    Args:
        settings: settings of the graph whose batch failed.
    """

    def __init__(self, settings: GraphSettings) -> None:
        alone = replace(settings, batch_size=1, num_threads=1, prefetch_queue_depth=1)
        loads = (1.0, 0.0) if settings.device == "cuda" else (settings.hw_decoder_load,)
        self.settings = [replace(alone, hw_decoder_load=load) for load in loads]
        self._pipelines: dict[GraphSettings, Pipeline] = {}
        self._sample: Any = None

    def cause(self, feed: Sequence[Any], place: int) -> str | None:
        """Why the record at a place of a batch cannot be decoded; None if it can.

        Args:
            feed: DALI's inputs for the batch.
        """
        self._sample = tuple(values[place : place + 1] for values in feed)
        for settings in self.settings:
            if settings not in self._pipelines:
                self._pipelines[settings] = build_pipeline(lambda info: self._sample, settings)
            try:
                self._pipelines[settings].run()  # with a queue of one, nothing is prefetched
            except RuntimeError as error:
                del self._pipelines[settings]
                return _cause(error)
        return None

    def close(self) -> None:
        """Release the graphs."""
        self._pipelines.clear()
        self._sample = None


# nvimgcodecStatus_t, nvimgcodec.h. Only those that describe the image.
_CODEC_STATUS = {"3": "damaged file", "4": "unsupported kind of image", "9": "unsupported kind of image"}
_NOISE = (
    "Critical error",
    "Error in ",
    "which was used",
    "File ",
    "images = ",
    "encountered",
    "C++ context",
    "[frame",
    "Stacktrace",
    "Current pipeline",
)


def _cause(error: RuntimeError) -> str:
    """The informative part of DALI's message, in one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = " ".join(line for line in lines if line and not line.startswith(_NOISE))
    telling = re.sub(r"Failed to decode sample #\d+ :\s*", "", telling)  # its index in the probe's own batch
    status = re.fullmatch(r"nvImageCodec failure: '#(\d+)'", telling)
    if status is not None:
        return _CODEC_STATUS.get(status[1], telling)
    return telling or "decoding failed"
