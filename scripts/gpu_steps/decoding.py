"""Steps about decoding: which decoder did the work, and whether its pixels are those of the CPU."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dali_lmdb.images.kinds import Kind
from dali_lmdb.loaders.base import Loader
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.pipeline import build_pipeline, feed_without_copy
from dali_lmdb.loaders.settings import Device
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import EvalTransform, TrainTransform, Transform
from dali_lmdb.store import Store, open_store
from gpu_steps.card import loaded_nvjpeg
from gpu_steps.isolated import Row

__all__ = ["backends", "decoder_log", "decoders_in", "erased_float16", "largest_batches", "pixels", "route"]

HARDWARE = "nvjpeg_hw_decoder"
ON_THE_GPU = (HARDWARE, "nvjpeg_cuda_decoder", "nvjpeg_lossless_decoder")

_GPU_KINDS = [kind for kind in Kind if kind.decodes_on_gpu]
# Limit of the mean difference in grey levels. Decoders round differently (photos differ by 0.2 between two on the
# CPU); a crop that is off by a pixel, or another upsampling of a whole image, gives more.
_MEAN_DIFFERENCE = 1.5
_TRANSFORMS: dict[str, Transform] = {"train": TrainTransform(), "eval": EvalTransform()}


def route(store: str, *, device: Device, batch_size: int, **arguments: Any) -> Iterator[Row]:
    """Which decoder decodes how many images of one training batch, as nvImageCodec's log says.

    The log has a line for each image, except for those of the hardware engine: they are the rest.

    Args:
        arguments: more arguments of ``DaliLoader``.
    """
    with DaliLoader(
        store, transform=TrainTransform(), batch_size=batch_size, device=device, **arguments
    ) as loader:
        graph, plan = replace(loader.graph, prefetch_queue_depth=1), loader.planner.plan(0, 0)
        assert plan is not None
        feed = feed_without_copy(plan, loader.planner)
        with decoder_log() as log:
            build_pipeline(lambda info: feed, graph).run()  # with a queue of one, nothing is decoded ahead
        kinds = loader.store.gather("kind", plan.records)
    text = log()
    found = decoders_in(text, num_images=len(plan.records))
    for decoder, num_images in found.items():
        yield {"decoder": decoder, "images": num_images, "of": len(plan.records)}
    for what, pattern in (
        ("failed, next tried", r"Trying next"),
        ("window refused", r"ROI decode with fancy"),
    ):
        yield {"decoder": what, "images": len(re.findall(pattern, text)), "of": len(plan.records)}
    for number in largest_batches(text):
        yield {"decoder": "most that the hardware engine takes", "images": number, "of": batch_size}
    print(text[-2000:])
    jpegs = int(np.isin(kinds, _GPU_KINDS).sum())
    on_gpu = sum(found[decoder] for decoder in ON_THE_GPU)
    by_gpu = graph.decode_device == "gpu"
    row: Row = {"decoder": f"all on the GPU ({loaded_nvjpeg() or 'no libnvjpeg.so loaded'})", "images": on_gpu}
    if (by_gpu and on_gpu < jpegs) or (not by_gpu and on_gpu > 0):
        expected = f"at least {jpegs}" if by_gpu else "none"
        row["wrong"] = f"{on_gpu} images were decoded on the GPU, expected {expected} of {len(plan.records)}"
    yield row | {"of": len(plan.records)}


def decoders_in(log: str, *, num_images: int) -> Counter[str]:
    """The number of images by decoder, from nvImageCodec's log of one batch.

    An image counts for the last decoder that took it; those without a line are the hardware engine's, if there
    is one.
    """
    took = {int(image): decoder for decoder, image in re.findall(r": (\w+) process #(\d+)", log)}
    found = Counter(took.values())
    rest = num_images - len(took)
    if rest > 0:
        found[HARDWARE if f"create {HARDWARE}" in log else "no line in the log"] += rest
    return found


def largest_batches(log: str) -> list[int]:
    """For each hardware engine in the log, the most images of a batch that it takes: fixed at its first batch."""
    return [int(number) for number in re.findall(rf"{HARDWARE} selecting max batch size to (\d+)", log)]


@contextmanager
def decoder_log() -> Iterator[Callable[[], str]]:
    """Collect nvImageCodec's log, and whatever else the block prints; yield a function that returns it afterwards.

    The level is read when a process makes its first decoder, so this needs a process of its own.
    """
    os.environ["DALI_NVIMGCODEC_LOG_LEVEL"] = "5"
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(1), os.dup(2)]
        collected = ""
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield lambda: collected
        finally:
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            file.seek(0)
            collected = file.read().decode(errors="replace")


def backends(store: str, *, device: Device, num_images: int = 16) -> Iterator[Row]:
    """Decode the store's first JPEGs with each of nvImageCodec's backends; compare the pixels with the CPU's."""
    from nvidia import nvimgcodec as codec

    kinds, on_cpu = codec.BackendKind, codec.NVIMGCODEC_DEVICE_CPU_ONLY
    wanted = [kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU, kinds.HW_GPU_ONLY] if device == "cuda" else []
    with open_store(store) as opened:
        records = np.flatnonzero(np.isin(opened.column("kind"), _GPU_KINDS))[:num_images].tolist()
        streams = [bytes(opened.read(record)) for record in records]
    reference: list[npt.NDArray[np.uint8] | None] = []
    for kind in [kinds.CPU_ONLY, *wanted]:
        decoder = codec.Decoder(
            device_id=on_cpu if kind == kinds.CPU_ONLY else torch.cuda.current_device(),
            backends=[codec.Backend(kind)],
            options=":fancy_upsampling=1",
        )
        images = decoder.decode(
            [codec.CodeStream(stream) for stream in streams],
            params=codec.DecodeParams(apply_exif_orientation=False),
        )
        pixels = [None if image is None else np.asarray(image.cpu()) for image in images]
        if kind == kinds.CPU_ONLY:
            reference = pixels
        differences = [
            float(np.abs(ours.astype(np.int16) - theirs).mean())
            for ours, theirs in zip(pixels, reference, strict=True)
            if ours is not None and theirs is not None
        ]
        yield {
            "backend": kind.name,
            "decoded": sum(image is not None for image in pixels),
            "of": len(pixels),
            "mean difference": round(float(np.mean(differences)), 3) if differences else None,
        }


def pixels(store: str, *, device: Device, num_images: int = 64, **arguments: Any) -> Iterator[Row]:
    """Difference of the loader's pixels from those of the graph on the CPU and of Pillow, in grey levels.

    Args:
        num_images: how many records of the store, spread over it, are compared.
        arguments: more arguments of the ``DaliLoader`` that is compared.
    """
    with open_store(store) as opened:
        shared: dict[str, Any] = {"sampler": _spread(opened, num_images), "dtype": "uint8"}
        for name, transform in _TRANSFORMS.items():
            ours = _images(DaliLoader(opened, **_common(transform), device=device, **shared, **arguments))
            theirs = {
                "DALI on the CPU": DaliLoader(opened, **_common(transform), device="cpu", resize="dali", **shared),
                "Pillow": TorchLoader(opened, **_common(transform), num_workers=0, **shared),
            }
            for against, loader in theirs.items():
                yield {"transform": name, "against": against} | _difference(ours, _images(loader))


def erased_float16(store: str, *, device: Device, num_images: int = 64) -> Iterator[Row]:
    """Difference from the CPU with random erasing, float16 and channels last together, in grey levels."""
    transform = TrainTransform(erase=1.0)
    with open_store(store) as opened:
        shared: dict[str, Any] = {"sampler": _spread(opened, num_images), "dtype": "float16", "layout": "NHWC"}
        ours, theirs = (
            _images(DaliLoader(opened, **_common(transform), device=where, **shared)) for where in (device, "cpu")
        )
    scale = 255 * torch.tensor(transform.std).reshape(3, 1, 1)
    row = _difference(*({record: image * scale for record, image in one.items()} for one in (ours, theirs)))
    yield {"transform": "train, erase 1.0", "against": "DALI on the CPU"} | row


def _common(transform: Transform) -> dict[str, Any]:
    return {"transform": transform, "batch_size": 16, "last_batch": "short", "return_index": True}


def _spread(store: Store, num_images: int) -> list[int]:
    records: list[int] = np.unique(np.linspace(0, len(store) - 1, num_images).astype(int)).tolist()
    return records


def _images(loader: Loader) -> dict[int, torch.Tensor]:
    """An epoch's images as float32 on the CPU by record; the loader is closed."""
    with loader:
        return {
            int(record): image
            for images, _, records in loader
            for record, image in zip(records, images.float().cpu().clone(), strict=True)
        }


def _difference(ours: dict[int, torch.Tensor], theirs: dict[int, torch.Tensor]) -> Row:
    assert ours.keys() == theirs.keys()
    found = torch.stack([(ours[record] - theirs[record]).abs() for record in theirs]).nan_to_num(255.0)
    row: Row = {
        "images": len(ours),
        "mean": round(found.mean().item(), 3),
        "max": round(found.max().item(), 1),
        "within 8": f"{(found <= 8).float().mean().item():.4%}",
    }
    if found.mean() >= _MEAN_DIFFERENCE:
        row["wrong"] = f"pixels differ by {row['mean']} grey levels on average, expected below {_MEAN_DIFFERENCE}"
    return row
