"""Mean and standard deviation of a store's pixels, over a sample of its records."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dali_lmdb.errors import RecordError
from dali_lmdb.images.opening import BadImageError, pixel_limit
from dali_lmdb.images.statistics import channel_sums
from dali_lmdb.inspect.records import Progress, ProgressCallback
from dali_lmdb.isolated import Answer, Died, Isolated, Sample
from dali_lmdb.plan.order import epoch_order
from dali_lmdb.store import Store, open_store
from dali_lmdb.threads import threads_to_convert

__all__ = ["RESIZE", "SAMPLE_RECORDS", "SIZE", "PixelStatistics", "pixel_statistics"]

SAMPLE_RECORDS = 2_000
"""With photos, the mean is then off by about 0.003: pixel means of photos vary by some 0.15."""
SEED = 0
RESIZE, SIZE = 256, 224  # ``EvalTransform``'s defaults

_BLOCK_RECORDS = 32
_MAX_PROCESSES = 16


@dataclass(frozen=True, kw_only=True)
class PixelStatistics:
    """Mean and standard deviation as ``Normalize`` takes them: R, G, B in 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Over all pixels of all images, not the mean of each image's."""
    mean_error: tuple[float, float, float]
    """Standard error of the mean, since it is that of a sample; 0 if all records were taken."""
    records: int
    """Number of records that count."""
    undecodable: int
    """Number of records of the sample that could not be decoded, and do not count."""
    seed: int
    """Of the sample."""
    resize: int
    """Length to which the shorter side was resized, in pixels."""
    size: int
    """Height and width of the central crop that counts, in pixels."""


def pixel_statistics(
    path: str | os.PathLike[str], *, num_records: int = SAMPLE_RECORDS, progress: ProgressCallback | None = None
) -> PixelStatistics:
    """Decode a sample of a store's records, in processes of their own, and take the statistics of their pixels.

    Each image counts alike: resized and cropped as by ``EvalTransform``, with Pillow.

    Args:
        num_records: size of the sample; of a smaller store all records are taken.

    Raises:
        StoreNotFoundError, StoreFormatError, StoreDamagedError: see ``dali_lmdb.errors``.
        RecordError: no record can be decoded.
    """
    with open_store(path) as store:
        taken = min(num_records, len(store))
        records = np.sort(epoch_order(len(store), seed=SEED, epoch=0)(np.arange(taken)))
        sums = _sums(store, records, progress)
    if not len(sums):
        raise RecordError(f"{path}: no pixels to take statistics of: none of {taken} records can be decoded")
    num_pixels = SIZE**2
    means = sums[:, 0] / (255 * num_pixels)  # of each image, (n, 3)
    mean = means.mean(axis=0)
    variance = (sums[:, 1] / (255**2 * num_pixels)).mean(axis=0) - mean**2
    is_sample = 1 < len(sums) and taken < len(store)
    error = means.std(axis=0, ddof=1) / np.sqrt(len(sums)) if is_sample else np.zeros(3)
    return PixelStatistics(
        mean=_rgb(mean),
        std=_rgb(np.sqrt(np.maximum(variance, 0))),
        mean_error=_rgb(error),
        records=len(sums),
        undecodable=taken - len(sums),
        seed=SEED,
        resize=RESIZE,
        size=SIZE,
    )


def _rgb(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    red, green, blue = values.tolist()
    return red, green, blue


def _sums(
    store: Store, records: npt.NDArray[np.int64], progress: ProgressCallback | None
) -> npt.NDArray[np.int64]:
    """``channel_sums`` of the records that can be decoded, int64 of shape (n, 2, 3)."""
    blocks = [records[first : first + _BLOCK_RECORDS] for first in range(0, len(records), _BLOCK_RECORDS)]
    num_threads = max(1, min(threads_to_convert(), len(blocks), _MAX_PROCESSES))
    idle = [Isolated("dali_lmdb.inspect.pixels:measure", None) for _ in range(num_threads)]

    def work(block: npt.NDArray[np.int64]) -> list[Answer | Died]:
        process = idle.pop()  # there are as many as threads
        try:
            sizes = (store.gather(name, block).tolist() for name in ("height", "width"))
            limits = map(pixel_limit, *sizes)
            samples = [Sample(data, limit) for data, limit in zip(store.arrays(block), limits, strict=True)]
            return process.work(samples)
        finally:
            idle.append(process)

    found: list[list[list[int]]] = []
    processes = list(idle)
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for number, answers in enumerate(pool.map(work, blocks), start=1):
                found += [answer.value for answer in answers if isinstance(answer, Answer) and answer.value]
                if progress is not None:
                    progress(Progress("decoding", min(number * _BLOCK_RECORDS, len(records)), len(records), 0))
        finally:
            for process in processes:
                process.close()
            pool.shutdown(cancel_futures=True)
    return np.array(found, np.int64).reshape(-1, 2, 3)


def measure(settings: None) -> Callable[[Sequence[Sample], Callable[[int | None], None]], list[Answer]]:
    """The ``isolated.Handler``: a sample's note is ``max_pixels``; an answer is ``channel_sums``, None if bad."""
    del settings

    def handle(samples: Sequence[Sample], begin: Callable[[int | None], None]) -> list[Answer]:
        answers = []
        for number, (data, max_pixels) in enumerate(samples):
            begin(number)
            try:
                sums = channel_sums(data, resize=RESIZE, size=SIZE, max_pixels=max_pixels)
            except BadImageError:
                answers.append(Answer(None))
            else:
                answers.append(Answer(sums))
        return answers

    return handle
