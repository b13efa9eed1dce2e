"""References made of DALI alone, without this package's loaders: its own file reader, and its decoder.

The reader's graph is that of DALI's ImageNet example, with the sizes, filter and crops of ours. DALI draws the
crops and flips, so they differ from those of the other backends but cost the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from dali_lmdb.loaders.settings import DecodeDevice
from dali_lmdb.plan.augment import EvalTransform, TrainTransform, Transform
from dali_lmdb.store import Store

__all__ = ["batches_of", "decoded_batches", "define_reader"]

_PREFETCHED = 2  # DALI's default


def define_reader(
    files: list[str],
    labels: list[int],
    *,
    transform: Transform,
    batch_size: int,
    device_id: int | None,
    decode_device: DecodeDevice,
    hw_decoder_load: float,
    num_threads: int,
    seed: int,
) -> Pipeline:
    """Define a graph of ``fn.readers.file``, without building it; its batches never end.

    Args:
        files: paths of the images.
        labels: label of each.
        transform: ``TrainTransform`` for random crops and flips in random order, without colour, erasing and
            schedule; ``EvalTransform`` for central crops.
        batch_size: number of images in every batch.
        device_id: number of the GPU; None for the CPU.
        decode_device: ``"gpu"`` or ``"cpu"``.
        hw_decoder_load: share of a batch offered to the GPU's hardware JPEG engine.
        num_threads: CPU threads of the pipeline.
        seed: seed of order, crops and flips.
    """
    pipeline = Pipeline(batch_size=batch_size, num_threads=num_threads, device_id=device_id, seed=seed)
    on_gpu = device_id is not None
    flip = transform.flip if isinstance(transform, TrainTransform) else 0.0
    decoding: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}  # as in our graph
    if decode_device == "gpu":
        decoding |= {"device": "mixed", "hw_decoder_load": hw_decoder_load}
    with pipeline:
        encoded, numbers = fn.readers.file(
            files=files, labels=labels, random_shuffle=isinstance(transform, TrainTransform)
        )
        images = _decoded(encoded, transform, decoding)
        if on_gpu:
            images, numbers = images.gpu(), numbers.gpu()
        images = fn.resize(images, interp_type=types.INTERP_LINEAR, antialias=True, **_size(transform))
        images = fn.crop_mirror_normalize(
            images,
            crop=(transform.size, transform.size),
            mirror=fn.random.coin_flip(probability=flip),
            mean=[255 * value for value in transform.mean],
            std=[255 * value for value in transform.std],
            dtype=types.FLOAT16 if on_gpu else types.FLOAT,
            output_layout="HWC" if on_gpu else "CHW",
        )
        pipeline.set_outputs(images, numbers)
    return pipeline


def _decoded(encoded: DataNode, transform: Transform, decoding: dict[str, Any]) -> DataNode:
    if isinstance(transform, EvalTransform):
        return fn.decoders.image(encoded, **decoding)
    return fn.decoders.image_random_crop(
        encoded, random_area=transform.scale, random_aspect_ratio=transform.ratio, **decoding
    )


def _size(transform: Transform) -> dict[str, Any]:
    if isinstance(transform, EvalTransform):
        return {"size": transform.resize, "mode": "not_smaller"}  # the central crop follows
    return {"size": [transform.size, transform.size]}


def batches_of(pipeline: Pipeline) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Run a reader and yield (images, labels) without end.

    Labels are int32 (n, 1); images are normalised, float32 (n, 3, size, size) on the CPU and float16
    (n, size, size, 3) on a GPU.
    """
    for (outputs,) in DALIGenericIterator(pipeline, ["images", "labels"], size=-1):
        yield outputs.pop("images"), outputs.pop("labels")


def decoded_batches(
    store: Store,
    *,
    batch_size: int,
    device_id: int | None,
    decode_device: DecodeDevice,
    hw_decoder_load: float,
    num_threads: int,
) -> Iterator[tuple[None, range]]:
    """Decode whole images of a store in order, and nothing else, without end; yield as many numbers as images.

    Args:
        batch_size, device_id, decode_device, hw_decoder_load, num_threads: as of ``define_reader``.
    """
    in_use: deque[list[npt.NDArray[np.uint8]]] = deque(maxlen=2 * _PREFETCHED + 2)  # DALI keeps pointers only

    def next_batch(step: int = 0) -> Iterator[list[npt.NDArray[np.uint8]]]:
        while True:
            records = np.arange(step * batch_size, (step + 1) * batch_size) % len(store)
            in_use.append(store.arrays(records))
            yield in_use[-1]
            step += 1

    pipeline = Pipeline(batch_size, num_threads, device_id, prefetch_queue_depth=_PREFETCHED)
    decoding: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if decode_device == "gpu":
        decoding |= {"device": "mixed", "hw_decoder_load": hw_decoder_load}
    with pipeline:
        encoded = fn.external_source(next_batch(), batch=True, no_copy=True, dtype=types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(encoded, **decoding))
    pipeline.build()
    while True:
        pipeline.run()
        yield None, range(batch_size)
