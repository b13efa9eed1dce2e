"""The settings of a loader's graph, from its arguments, the sizes in the store's index, and the machine."""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple

import numpy as np
import torch

from dali_lmdb.errors import StoreFormatError
from dali_lmdb.loaders.finishing import TORCH_INTERPOLATIONS
from dali_lmdb.loaders.gpu_memory import choose_decoding, preallocation
from dali_lmdb.loaders.pipeline import GraphSettings
from dali_lmdb.loaders.settings import DaliSettings, Device, LoaderSettings
from dali_lmdb.loaders.versions import has_fancy_windows, nvjpeg_version
from dali_lmdb.store import Store
from dali_lmdb.store.classic import ClassicStore
from dali_lmdb.threads import threads_per_rank

__all__ = ["UsualSize", "graph_settings", "log_decoding", "usual_size"]

_log = logging.getLogger("dali_lmdb")


class UsualSize(NamedTuple):
    """99th percentiles of a store's image sizes: memory is reserved for a whole batch, so ignore a few giants."""

    height: int
    width: int
    pixels: int
    """The percentile of height x width, usually less than the product of the other two."""


def usual_size(store: Store) -> UsualSize:
    """The usual size of a store's images.

    Raises:
        StoreFormatError: the index has no sizes.
    """
    heights, widths = store.column("height"), store.column("width")
    if not len(store):
        return UsualSize(0, 0, 0)
    # A classic database has a size for every value that is an image: without any, all its records are bad.
    if not heights.any() and not isinstance(store, ClassicStore):
        raise StoreFormatError(
            f"{store.path}: the index has no image sizes (it was converted with --check none), which crops "
            "need; convert it again with --check header"
        )
    sizes = heights, widths, heights.astype(np.int64) * widths
    return UsualSize(*(int(np.quantile(values, 0.99, method="higher")) for values in sizes))


def graph_settings(settings: LoaderSettings, dali: DaliSettings, usual: UsualSize) -> GraphSettings:
    """The settings of a loader's graph, with every default resolved; queries the size of the GPU's memory."""
    on_gpu = settings.device_id is not None
    device: Device = "cuda" if on_gpu else "cpu"
    num_threads = threads_per_rank() if dali.num_threads is None else dali.num_threads
    decoding = choose_decoding(
        dali,
        device=device,
        image_bytes=3 * usual.pixels * settings.batch_size * dali.prefetch_queue_depth,
        gpu_bytes=torch.cuda.get_device_properties(settings.device_id).total_memory if on_gpu else 0,
    )
    preallocated = preallocation(
        height=usual.height,
        width=usual.width,
        batch_size=settings.batch_size,
        num_threads=num_threads,
        hw_decoder_load=dali.hw_decoder_load,
        budget_bytes=dali.preallocation_bytes,
    )
    return GraphSettings(
        transform=settings.transform,
        batch_size=settings.batch_size,
        device=device,
        device_id=settings.device_id,
        num_threads=num_threads,
        prefetch_queue_depth=dali.prefetch_queue_depth,
        dtype=settings.dtype,
        layout=settings.layout,
        hw_decoder_load=dali.hw_decoder_load,
        fancy_upsampling=decoding != ("window", "gpu") or has_fancy_windows(nvjpeg_version()),
        decode=decoding.decode,
        decode_device=decoding.decode_device,
        resize=_choose_resize(settings, dali),
        decode_scale=dali.decode_scale,
        height_hint=preallocated.height_hint,
        width_hint=preallocated.width_hint,
        device_memory_padding=preallocated.device_memory_padding,
        host_memory_padding=preallocated.host_memory_padding,
    )


def _choose_resize(settings: LoaderSettings, dali: DaliSettings) -> Literal["dali", "torch"]:
    interpolation = settings.transform.interpolation
    if settings.device == "cpu" and interpolation in TORCH_INTERPOLATIONS:
        if dali.resize == "dali" and dali.decode_scale == "fast":
            raise ValueError("decode_scale is 'fast' with resize 'dali', expected resize 'torch' or 'auto'")
        return "torch" if dali.resize == "auto" else dali.resize
    if dali.resize == "torch" or dali.decode_scale == "fast":
        found = "resize is 'torch'" if dali.resize == "torch" else "decode_scale is 'fast'"
        expected = " or ".join(map(repr, TORCH_INTERPOLATIONS))
        raise ValueError(
            f"{found} with device {settings.device!r} and interpolation {interpolation!r}, expected device 'cpu' "
            f"and {expected}"
        )
    return "dali"


def log_decoding(store: Store, dali: DaliSettings, graph: GraphSettings) -> None:
    """Log how images are decoded, as a warning if ``"auto"`` had to make an unusual choice."""
    what = "whole images are" if graph.decode == "image" else "crop windows are"
    where = "GPU" if graph.decode_device == "gpu" else "CPU"
    too_large = dali.decode == "auto" and dali.decode_device != "cpu" and graph.decode == "window"
    _log.log(
        logging.WARNING if too_large else logging.INFO,
        "%s: %s decoded on the %s%s%s",
        store.path,
        what,
        where,
        "; a batch's whole images would take too much of the GPU's memory" if too_large else "",
        "" if graph.fancy_upsampling else "; without fancy upsampling of chroma, since nvJPEG is older than 13.2",
    )
