"""One window of time: how many images a source of batches gives to a consumer, and what that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from dali_lmdb.compare.settings import CompareSettings
from dali_lmdb.compare.usage import MemoryPeak, cpu_seconds, free_unused_memory, storage_bytes

__all__ = ["Window", "measure", "warm_up_steps"]

# Batches that a loader may have ready: DataLoader's prefetch_factor and DaliLoader's prefetch_queue_depth are both
# 2 by default, DataLoader's for each worker.
_AHEAD = 2

# Steps before each window on a GPU, not measured.
_GPU_WARM_UP = 50


class Window(NamedTuple):
    """What was measured in a window."""

    images_per_s: float
    cpu_s_per_image: float
    """CPU time of this process and its workers, in seconds an image."""
    cores: float
    """CPU time divided by elapsed time."""
    memory_bytes: int | None
    """Peak memory of this process and its workers, see ``usage.MemoryPeak``; None if unknown."""
    read_bytes_per_image: float | None = None
    """Bytes an image that came from storage, not the page cache, see ``usage.storage_bytes``; None if unknown."""
    batch_s: tuple[float, ...] = ()
    """How long each burst took, in seconds."""


def measure(
    batches: Iterable[tuple[Any, ...]],
    settings: CompareSettings,
    *,
    burst: int,
    consume: Callable[[Any], None] | None = None,
) -> Window:
    """Measure one window.

    Only whole bursts are counted: otherwise a window could begin after the first batch of one burst and end after
    the first of another, which counts up to one batch per worker too many.

    Args:
        batches: tuples, of which the second member's length is the number of images; an epoch or endless.
        burst: number of batches that tend to arrive together.
        consume: is given each batch; None: nothing is done with them.
    """
    free_unused_memory()
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    numbers = _endless(batches, consume)
    try:
        for _ in range(warm_up_steps(settings.device, burst=burst)):
            next(numbers)
        with MemoryPeak() as memory:
            read_begin = storage_bytes()
            begin, cpu_begin = _now(settings.device), cpu_seconds()
            num_images, ends = 0, [begin]
            while ends[-1] - begin < settings.seconds:
                num_images += sum(next(numbers) for _ in range(burst))
                ends.append(time.perf_counter())
            elapsed, cpu = _now(settings.device) - begin, cpu_seconds() - cpu_begin
            read_end = storage_bytes()
        return Window(
            images_per_s=num_images / elapsed,
            cpu_s_per_image=cpu / num_images,
            cores=cpu / elapsed,
            memory_bytes=memory.bytes,
            read_bytes_per_image=(
                None if read_begin is None or read_end is None else (read_end - read_begin) / num_images
            ),
            batch_s=tuple(end - start for start, end in pairwise(ends)),
        )
    finally:
        numbers.close()


def warm_up_steps(device: str, *, burst: int) -> int:
    """Number of steps before a window: more than a loader has ready, and on a GPU enough for it to settle."""
    return max(_AHEAD * burst + 1, _GPU_WARM_UP if device == "cuda" else 0)


def _endless(
    batches: Iterable[tuple[Any, ...]], consume: Callable[[Any], None] | None
) -> Generator[int, None, None]:
    """The number of images of each batch, epoch after epoch."""
    while True:
        for batch in batches:
            num_images = len(batch[1])
            if consume is not None:
                consume(batch)
            del batch  # its memory belongs to the pipeline, which reuses it for the next one
            yield num_images


def _now(device: str) -> float:
    """The time in seconds, after all work given to the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
