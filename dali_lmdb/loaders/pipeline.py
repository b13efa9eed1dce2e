"""The DALI graph: decode, cut the window out, resize, flip, normalise. One definition for GPU and CPU.

=========  =================  =======================  ========================================
step       operator           ``device="cuda"``        ``device="cpu"``
=========  =================  =======================  ========================================
bytes      external_source    cpu, no copy             cpu, no copy
header     peek_image_shape   cpu                      cpu
decode     decoders.image     mixed (nvJPEG)           cpu (libjpeg-turbo)
window     slice              gpu                      cpu
resize     resize             gpu                      cpu
colour     color_twist        gpu                      cpu          if the transform has it
erase      erase              gpu                      cpu          if the transform has it
normalise  crop_mirror_...    gpu                      cpu
=========  =================  =======================  ========================================

On the CPU the graph usually ends with the window, and ``finishing`` does the rest, see ``GraphSettings.resize``.

With ``decode="window"``, decoders.image_slice takes the place of decode and window. With ``decode_device="cpu"``,
both are on the CPU and the windows are copied to the GPU. Flipping is part of normalising. Erasing comes before
it, on uint8: on the GPU, ``fn.erase`` has no float16.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from nvidia.dali import Pipeline, backend, fn, types
from nvidia.dali.backend import TensorCPU, TensorListCPU

from dali_lmdb.loaders.external_source import Field, decoded_fields, feed_of
from dali_lmdb.loaders.prefetch import Feed
from dali_lmdb.loaders.settings import DecodeDevice, DecodeScale, Device, Dtype, Layout
from dali_lmdb.plan.augment import Transform
from dali_lmdb.plan.batches import BatchPlan, Planner

__all__ = [
    "OUTPUTS",
    "GraphSettings",
    "build_pipeline",
    "define_pipeline",
    "feed_without_copy",
    "release_unused_memory",
    "source_arguments",
]

OUTPUTS = ("images", "labels")

_DTYPES = {"float32": types.FLOAT, "float16": types.FLOAT16, "uint8": types.UINT8}
_INTERPOLATIONS = {
    "nearest": types.INTERP_NN,
    "linear": types.INTERP_LINEAR,
    "cubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
}
_SOURCE_DTYPES = {
    np.uint8: types.UINT8,
    np.int64: types.INT64,
    np.int32: types.INT32,
    np.float32: types.FLOAT,
}

_NO_LENGTH = 2**31 - 1

# Hide existing objects from the garbage collector in forked children: a pipeline collected there would wait
# forever for threads that the child does not have.
os.register_at_fork(after_in_child=gc.freeze)


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """Everything the graph depends on besides the data."""

    transform: Transform
    batch_size: int
    """Maximum number of images in a batch."""
    device: Device
    device_id: int | None
    """CUDA device number; None with ``device="cpu"``."""
    num_threads: int
    """Number of CPU threads that decode, or that prepare decoding on the GPU."""
    prefetch_queue_depth: int
    """Number of batches that DALI works on ahead of the consumer."""
    dtype: Dtype
    layout: Layout
    hw_decoder_load: float
    """Fraction of a batch that is offered to the hardware JPEG engine, if the GPU has one."""
    decode: Literal["image", "window"]
    """Whether whole images are decoded and their windows cut out, or only the windows are decoded."""
    decode_device: DecodeDevice
    fancy_upsampling: bool
    """Whether nvJPEG upsamples chroma as libjpeg-turbo, and so Pillow, always does."""
    resize: Literal["dali", "torch"]
    """``"torch"``: the graph only decodes, and ``finishing`` does the rest; only with ``device="cpu"``."""
    decode_scale: DecodeScale
    """``"fast"``: ``finishing`` decodes JPEGs much larger than the output, at a fraction of their size."""
    height_hint: int
    """Height and width, in pixels, of the images that the hardware JPEG engine preallocates for."""
    width_hint: int
    device_memory_padding: int
    """Size of each decoding thread's buffer on the GPU, in bytes."""
    host_memory_padding: int
    """Size of each of a decoding thread's two pinned buffers, in bytes."""


def source_arguments(fields: Sequence[Field]) -> dict[str, Any]:
    """Arguments of ``fn.external_source`` for some inputs."""
    return {
        "num_outputs": len(fields),
        "batch": True,  # per-sample mode drops a short last batch
        "batch_info": True,
        "no_copy": True,
        "dtype": [_SOURCE_DTYPES[field.dtype] for field in fields],
        "ndim": [field.ndim for field in fields],
    }


def _decode_arguments(settings: GraphSettings) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "output_type": types.RGB,
        # Pillow's convert("RGB"), and so torchvision, ignores the EXIF orientation.
        "adjust_orientation": False,
    }
    if settings.decode_device == "cpu":
        return arguments | {"device": "cpu"}
    return arguments | {
        "device": "mixed",
        "jpeg_fancy_upsampling": settings.fancy_upsampling,
        "hw_decoder_load": settings.hw_decoder_load,
        "preallocate_height_hint": settings.height_hint,
        "preallocate_width_hint": settings.width_hint,
        "device_memory_padding": settings.device_memory_padding,
        "host_memory_padding": settings.host_memory_padding,
    }


def _checked(given: dict[str, Any]) -> Any:
    """The encoded images, unchanged; an error if a header cannot be parsed, or has no room for the window.

    In a batch of 32 or more either can crash DALI's decoders, which work in several threads (see "What DALI does"
    in the design). ``peek_image_shape`` merely raises an error, and so does a reshape to another length. The
    reshape copies nothing; it depends on the sizes, so the decoders wait for the check.
    """
    sizes = fn.peek_image_shape(given["encoded"], dtype=types.INT32, adjust_orientation=False)
    outside = given["anchors"] + given["shapes"] > sizes[:2]
    # -1 keeps the length; no file is as long as the other value.
    shape = -1 + fn.cast(outside[:1] | outside[1:], dtype=types.INT32) * _NO_LENGTH
    return fn.reshape(given["encoded"], shape=shape)


def _decoded_windows(given: dict[str, Any], settings: GraphSettings) -> Any:
    """The windows as uint8 HWC, on ``settings.device``."""
    encoded = _checked(given)
    window = {"start": given["anchors"], "shape": given["shapes"], "axes": [0, 1]}
    if settings.decode == "window":
        windows = fn.decoders.image_slice(encoded, **window, **_decode_arguments(settings))
    else:
        # Cut out, not left to resize's region of interest, whose filter would see pixels around the window.
        windows = fn.slice(fn.decoders.image(encoded, **_decode_arguments(settings)), **window)
    on_gpu, decoded_on_gpu = settings.device == "cuda", settings.decode_device == "gpu"
    return windows.gpu() if on_gpu and not decoded_on_gpu else windows


def _resize_arguments(settings: GraphSettings) -> dict[str, Any]:
    return {
        "interp_type": _INTERPOLATIONS[settings.transform.interpolation],
        "antialias": True,  # as Pillow, and so torchvision
    }


def _normalise_arguments(settings: GraphSettings) -> dict[str, Any]:
    transform = settings.transform
    raw = settings.dtype == "uint8"
    return {
        "dtype": _DTYPES[settings.dtype],
        "output_layout": "HWC" if settings.layout == "NHWC" else "CHW",
        # DALI decodes to 0..255; mean and std are for images in [0, 1].
        "mean": [0.0] if raw else [255 * value for value in transform.mean],
        "std": [1.0] if raw else [255 * value for value in transform.std],
    }


def define_pipeline(source: Callable[[Any], Any], settings: GraphSettings) -> Pipeline:
    """Define the graph without building it, which needs neither a GPU nor a driver.

    Outputs are ``OUTPUTS``: images (n, 3, size, size), or (n, size, size, 3) with NHWC, normalised unless
    uint8; labels int64 (n,). With ``device="cuda"`` both are on the GPU. With ``resize="torch"`` the images are n
    windows, uint8 HWC, of different sizes.

    Args:
        source: gives the inputs of ``decoded_fields``.
    """
    pipeline = Pipeline(
        batch_size=settings.batch_size,
        num_threads=settings.num_threads,
        device_id=settings.device_id,
        prefetch_queue_depth=settings.prefetch_queue_depth,
    )
    on_gpu = settings.device == "cuda"
    fields = decoded_fields(settings.transform, resize=settings.resize)
    with pipeline:
        names = [field.name for field in fields]
        inputs = fn.external_source(source, **source_arguments(fields))
        given = dict(zip(names, inputs, strict=True))
        windows = _decoded_windows(given, settings)
        if settings.resize == "torch":
            pipeline.set_outputs(windows, given["labels"])
            return pipeline
        images = fn.resize(
            windows,
            size=given.get("size", [settings.transform.size] * 2),
            **{name: given[name] for name in ("roi_start", "roi_end") if name in given},
            **_resize_arguments(settings),
        )
        if settings.transform.changes_color:
            images = fn.color_twist(
                images,
                hue=given["hue"],
                saturation=given["saturation"],
                brightness=given["brightness"],
                contrast=given["contrast"],
            )
        if settings.transform.erases:
            images = fn.erase(
                images,
                anchor=given["erase_anchor"],
                shape=given["erase_shape"],
                axis_names="HW",
                # With uint8, the CPU truncates a fractional fill value and the GPU rounds it.
                fill_value=[float(value) for value in settings.transform.erased_color],
            )
        images = fn.crop_mirror_normalize(images, mirror=given["mirror"], **_normalise_arguments(settings))
        labels = given["labels"]
        pipeline.set_outputs(images, labels.gpu() if on_gpu else labels)
    return pipeline


def build_pipeline(source: Callable[[Any], Any], settings: GraphSettings) -> Pipeline:
    """Define the graph and build it, which allocates memory; with ``device="cuda"`` this needs the GPU."""
    pipeline = define_pipeline(source, settings)
    pipeline.build()
    return pipeline


def feed_without_copy(plan: BatchPlan, planner: Planner, **options: Any) -> Feed:
    """``feed_of`` with the images' bytes in a DALI tensor list that shares their memory and keeps it alive.

    DALI would make it itself, but in the thread that runs the pipeline, and slower.

    Args:
        options: of ``feed_of``.
    """
    encoded, *numbers = feed_of(plan, planner, **options)
    # contiguous=True, the default, would copy. Slicing the list crashes the process (DALI 2.4).
    images = TensorListCPU(list(map(TensorCPU, encoded)), contiguous=False)  # type: ignore[call-overload]  # stubs
    return images, *numbers


def release_unused_memory() -> None:
    """Return to the driver the GPU memory that DALI kept from deleted pipelines; others may be running."""
    backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]  # missing from DALI's stubs
