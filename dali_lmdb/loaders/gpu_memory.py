"""GPU memory of a ``DaliLoader``: which way of decoding fits, what is preallocated, and how much is held.

Pure functions of sizes. What nvImageCodec allocates was read in its source, see "What DALI does" in
``dali_lmdb/README.md``.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from dali_lmdb.loaders.pipeline import GraphSettings
from dali_lmdb.loaders.settings import DaliSettings, DecodeDevice, Device

__all__ = ["Decoding", "Preallocation", "choose_decoding", "held_bytes", "preallocated_bytes", "preallocation"]

# Share of the GPU's memory that whole decoded images may take; the model needs the rest.
_IMAGES_SHARE = 1 / 4
# DALI's own defaults. A buffer that is too small for an image grows, which stalls the GPU.
_DEVICE_MEMORY_PADDING = 16 << 20
_HOST_MEMORY_PADDING = 8 << 20
# The hardware engine's share is rounded up to a multiple of engines x cores (5 on an A100), which is not known
# here: this is taken as its upper bound.
_ENGINE_IMAGES = 64

_ITEM_BYTES = {"float32": 4, "float16": 2, "uint8": 1}


class Decoding(NamedTuple):
    """How and where images are decoded."""

    decode: Literal["image", "window"]
    decode_device: DecodeDevice


def choose_decoding(dali: DaliSettings, *, device: Device, image_bytes: int, gpu_bytes: int) -> Decoding:
    """Resolve ``decode="auto"`` and ``decode_device=None``.

    Args:
        image_bytes: size of the whole decoded images of all batches that DALI works on.
        gpu_bytes: the GPU's memory; 0 with ``device="cpu"``.
    """
    decode_device = dali.decode_device or ("gpu" if device == "cuda" else "cpu")
    if dali.decode != "auto":
        return Decoding(dali.decode, decode_device)
    if decode_device == "gpu" and image_bytes <= gpu_bytes * _IMAGES_SHARE:
        return Decoding("image", "gpu")
    return Decoding("window", dali.decode_device or "cpu")


class Preallocation(NamedTuple):
    """Sizes that nvJPEG preallocates for, named as in ``GraphSettings``."""

    height_hint: int
    width_hint: int
    device_memory_padding: int
    host_memory_padding: int


def preallocation(
    *, height: int, width: int, batch_size: int, num_threads: int, hw_decoder_load: float, budget_bytes: int
) -> Preallocation:
    """Preallocate for images of a usual size, or for smaller ones if those would exceed a budget.

    Up to half of the budget is for the hardware engine, which has buffers for its share of a batch; the rest is
    for the decoding threads, which have a device buffer each. Their pinned buffers, two each, stay under the
    budget as well.

    Args:
        height, width: usual size of an image, in pixels.
        budget_bytes: the limit, once for GPU memory and once for pinned host memory.
    """
    image_bytes = 3 * height * width
    engine_images = _engine_images(batch_size, hw_decoder_load)
    scale = math.sqrt(min(1, budget_bytes / 2 / max(1, engine_images * image_bytes)))
    height_hint, width_hint = int(height * scale), int(width * scale)
    rest_bytes = budget_bytes - engine_images * 3 * height_hint * width_hint
    buffers = _threads_with_buffers(num_threads)
    return Preallocation(
        height_hint,
        width_hint,
        min(max(_DEVICE_MEMORY_PADDING, image_bytes), rest_bytes // buffers),
        min(max(_HOST_MEMORY_PADDING, image_bytes), budget_bytes // (2 * buffers)),
    )


def preallocated_bytes(graph: GraphSettings) -> int:
    """Estimate of the GPU memory that nvJPEG preallocates for a graph."""
    if graph.decode_device == "cpu":
        return 0
    engine_images = _engine_images(graph.batch_size, graph.hw_decoder_load)
    return (
        engine_images * 3 * graph.height_hint * graph.width_hint
        + _threads_with_buffers(graph.num_threads) * graph.device_memory_padding
    )


def held_bytes(graph: GraphSettings, *, pixels: int) -> int:
    """Estimate of the GPU memory that DALI holds while batches are made; 0 with ``device="cpu"``.

    Args:
        pixels: usual height x width of an image.
    """
    if graph.device == "cpu":
        return 0
    is_whole = graph.decode_device == "gpu" and graph.decode == "image"
    size = graph.transform.largest_size
    output_bytes = 3 * size**2 * _ITEM_BYTES[graph.dtype]
    # Per image: whole image and window, or window alone; then resized, then normalised.
    unfinished_bytes = 3 * pixels * (2 if is_whole else 1) + 3 * size**2 + output_bytes
    num_batches = graph.prefetch_queue_depth
    # One more batch of outputs is with the consumer.
    return preallocated_bytes(graph) + graph.batch_size * (num_batches * unfinished_bytes + output_bytes)


def _engine_images(batch_size: int, hw_decoder_load: float) -> int:
    return math.ceil(round(hw_decoder_load * batch_size) / _ENGINE_IMAGES) * _ENGINE_IMAGES


def _threads_with_buffers(num_threads: int) -> int:
    return num_threads + 1  # the thread that runs the pipeline may decode, too
