"""The DALI graph: decode the window, resize, flip, normalise. One definition; ``device`` chooses.

========  ================  =======================  ==================================
step      operator          ``device="cuda"``        ``device="cpu"``
========  ================  =======================  ==================================
bytes     external_source   cpu, no copy             cpu, no copy
decode    image_slice       mixed (nvJPEG)           cpu (libjpeg-turbo)
resize    resize            gpu                      cpu
flip ...  crop_mirror_...   gpu                      cpu
========  ================  =======================  ==================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from nvidia.dali import Pipeline, fn, types

from dali_lmdb.loaders.source import FIELDS
from dali_lmdb.plan.augment import Transform

__all__ = ["OUTPUTS", "GraphSettings", "build_pipeline", "define_pipeline"]

OUTPUTS = ("images", "labels", "records")

_DTYPES = {"float32": types.FLOAT, "float16": types.FLOAT16, "uint8": types.UINT8}
_SOURCE_DTYPES = {
    np.uint8: types.UINT8,
    np.int64: types.INT64,
    np.int32: types.INT32,
    np.float32: types.FLOAT,
}


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """Everything the graph depends on besides the data."""

    transform: Transform
    batch_size: int
    """Most images of one batch."""
    device: Literal["cuda", "cpu"]
    device_id: int | None
    """CUDA device number; None with ``device="cpu"``."""
    num_threads: int
    """CPU threads that decode, or that prepare decoding on the GPU."""
    prefetch_queue_depth: int
    """Batches DALI works on ahead of the consumer."""
    dtype: str
    layout: str
    hw_decoder_load: float
    """Share of a batch that is offered to the hardware JPEG engine, where the GPU has one."""
    height_hint: int
    """Largest height and width in the store, in pixels: what the hardware engine allocates at once."""
    width_hint: int


def _source_arguments() -> dict[str, Any]:
    return {
        "num_outputs": len(FIELDS),
        "batch": True,  # per-sample mode drops a short last batch
        "batch_info": True,
        "no_copy": True,
        "dtype": [_SOURCE_DTYPES[dtype] for _, dtype, _ in FIELDS],
        "ndim": [ndim for _, _, ndim in FIELDS],
    }


def _decode_arguments(settings: GraphSettings) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "axes": [0, 1],  # windows are given as (y, x) and (height, width)
        "output_type": types.RGB,
        # Pillow's convert("RGB"), and so torchvision, leaves the EXIF orientation alone.
        "adjust_orientation": False,
    }
    if settings.device == "cpu":
        return arguments | {"device": "cpu"}
    return arguments | {
        "device": "mixed",
        "jpeg_fancy_upsampling": True,  # as libjpeg-turbo and so Pillow upsample chroma
        "hw_decoder_load": settings.hw_decoder_load,
        "preallocate_height_hint": settings.height_hint,
        "preallocate_width_hint": settings.width_hint,
    }


def _resize_arguments(settings: GraphSettings) -> dict[str, Any]:
    return {
        "size": [settings.transform.size, settings.transform.size],
        "interp_type": types.INTERP_LINEAR,
        "antialias": True,  # as Pillow, and so torchvision
    }


def _normalise_arguments(settings: GraphSettings) -> dict[str, Any]:
    transform = settings.transform
    raw = settings.dtype == "uint8"
    return {
        "dtype": _DTYPES[settings.dtype],
        "output_layout": "HWC" if settings.layout == "NHWC" else "CHW",
        # DALI decodes to 0..255; mean and std are of images in [0, 1].
        "mean": [0.0] if raw else [255 * value for value in transform.mean],
        "std": [1.0] if raw else [255 * value for value in transform.std],
    }


def define_pipeline(source: Callable[[Any], Any], settings: GraphSettings) -> Pipeline:
    """The graph, not yet built: needs no GPU and no driver.

    Outputs are ``OUTPUTS``: images (n, 3, size, size), or (n, size, size, 3) with NHWC, normalised unless
    uint8; labels and record indices int64 (n,). With ``device="cuda"`` images and labels are on the GPU.
    """
    pipeline = Pipeline(
        batch_size=settings.batch_size,
        num_threads=settings.num_threads,
        device_id=settings.device_id,
        prefetch_queue_depth=settings.prefetch_queue_depth,
    )
    on_gpu = settings.device == "cuda"
    with pipeline:
        encoded, labels, records, anchors, shapes, roi_start, roi_end, mirror = fn.external_source(
            source, **_source_arguments()
        )
        images = fn.decoders.image_slice(encoded, start=anchors, shape=shapes, **_decode_arguments(settings))
        images = fn.resize(images, roi_start=roi_start, roi_end=roi_end, **_resize_arguments(settings))
        images = fn.crop_mirror_normalize(images, mirror=mirror, **_normalise_arguments(settings))
        pipeline.set_outputs(images, labels.gpu() if on_gpu else labels, records)
    return pipeline


def build_pipeline(source: Callable[[Any], Any], settings: GraphSettings) -> Pipeline:
    """``define_pipeline``, then allocate; with ``device="cuda"`` this needs the GPU."""
    pipeline = define_pipeline(source, settings)
    pipeline.build()
    return pipeline
