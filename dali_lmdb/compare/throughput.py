"""Images/s of loaders that do the same work, measured in turns so that the machine's load affects all alike.

Each round has one window of time for each backend, in an order that is reversed from round to round. All
windows of a round use the same plan: same records, same crops, same flips. A warm-up round comes first.

This compares loading from the page cache: if data are missing from it, the first backend of a round reads
them from disk and the others do not.

Only one loader exists at a time: it is opened for its window and closed after it. An open loader would
continue to fill its queue during the next one's window. Batches prefetched before the clock starts would
inflate the result, so that many are dropped first; the queue is then in the same state at both ends of the
window.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from dali_lmdb.compare.repeat import RepeatedStore
from dali_lmdb.compare.report import Measured, machine, spread, versions
from dali_lmdb.errors import DeviceError, SourceError, StoreError
from dali_lmdb.loaders.backends import open_loader
from dali_lmdb.loaders.base import Loader
from dali_lmdb.loaders.folder import open_data
from dali_lmdb.plan.augment import EvalTransform, TrainTransform, Transform
from dali_lmdb.store import Store, open_store
from dali_lmdb.threads import threads_per_rank

__all__ = ["BACKENDS", "CompareSettings", "Comparison", "Measurement", "Round", "compare_throughput"]

BACKENDS = {
    "files": "image folder, Pillow in DataLoader workers",
    "torch": "store, Pillow in DataLoader workers (the classic path)",
    "dali": "store, DALI",
}
"""The backends that can be measured, in the order of the table."""

# At an epoch's end a DataLoader's prefetched batches run out, which happens every few steps with some hundred
# records and is negligible with ImageNet. Smaller data sets are repeated to make this many steps.
_EPOCH_STEPS = 1000

# Batches that a loader may have ready: DataLoader's prefetch_factor and DaliLoader's prefetch_queue_depth are both
# 2 by default, DataLoader's for each worker.
_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What to measure, and for how long.

    Raises:
        ValueError: a setting is out of range.
    """

    batch_size: int = 64
    """Images per step, at most the number of records in the store."""
    rounds: int = 5
    """Number of measured windows of each backend."""
    seconds: float = 5.0
    """Length of a window, in seconds; it ends with a batch, so it is a little longer."""
    workers: int | None = None
    """DataLoader worker processes, and threads of DALI's pipeline; None: the cores this process may use."""
    size: int = 224
    """Height and width of the images, in pixels."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where batches are delivered and DALI decodes; ``"auto"`` uses the GPU if there is one."""
    task: Literal["train", "eval"] = "train"
    """``"train"``: shuffled, random crops and flips; ``"eval"``: in order, central crops."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.rounds < 1 or self.size < 1:
            raise ValueError(
                f"batch_size {self.batch_size}, rounds {self.rounds}, size {self.size}: expected at least 1 each"
            )
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}, expected more than 0")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}, expected at least 1")
        if self.device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"device is {self.device!r}, expected 'auto', 'cuda' or 'cpu'")
        if self.task not in ("train", "eval"):
            raise ValueError(f"task is {self.task!r}, expected 'train' or 'eval'")

    @property
    def transform(self) -> Transform:
        """Evaluation resizes the shorter side to size * 256 / 224."""
        if self.task == "train":
            return TrainTransform(size=self.size)
        return EvalTransform(size=self.size, resize=round(self.size * 256 / 224))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One backend's windows."""

    backend: str
    rounds: list[float]
    """Images/s of each round."""
    ratios: list[float]
    """Images/s divided by that of ``torch`` in the same round."""

    @property
    def images_per_s(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds)

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios."""
        return statistics.median(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "images_per_s": spread(self.rounds),
            "ratio": self.ratio,
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
        }


@dataclass(frozen=True, kw_only=True)
class Comparison(Measured):
    """The result of ``compare_throughput``."""

    settings: CompareSettings
    """The settings that were used: nothing is None or ``"auto"``, ``batch_size`` fits the store."""
    measurements: list[Measurement]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return self._described(
            backends={found.backend: found.to_dict() for found in self.measurements},
        )


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round's result, passed to the ``progress`` callback."""

    number: int
    """0 for the warm-up, then from 1."""
    images_per_s: dict[str, float]
    """Images/s by backend."""


def compare_throughput(
    store: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    settings: CompareSettings | None = None,
    progress: Callable[[Round], None] | None = None,
) -> Comparison:
    """Measure the images/s that each backend delivers to a consumer that does nothing with them.

    Args:
        store: the store that ``torch`` and ``dali`` read.
        images: the image folder that the store was made from, to measure ``files`` too.
        settings: by default ``CompareSettings()``.
        progress: called after every round.

    Raises:
        StoreError, SourceError: the data cannot be opened, or the folder does not hold the store's records.
        RecordError: an image cannot be decoded.
        DeviceError: ``device="cuda"`` without a usable GPU.
    """
    opened = open_store(store)
    settings = _resolve(settings or CompareSettings(), opened)
    data = {"torch": opened, "dali": opened}
    if images is not None:
        data = {"files": _open_images(images, opened)} | data
    repeats = -(-_EPOCH_STEPS * settings.batch_size // len(opened))
    if repeats > 1:
        data = {backend: RepeatedStore(one, times=repeats) for backend, one in data.items()}

    rounds = []
    for number in range(settings.rounds + 1):
        speeds = {}
        for backend in reversed(data) if number % 2 else data:
            with _open_loader(backend, data[backend], settings) as loader:
                loader.set_epoch(number)
                speeds[backend] = _window(loader, settings, burst=_burst(backend, settings))
        rounds.append(Round(number=number, images_per_s=speeds))
        if progress is not None:
            progress(rounds[-1])
    return Comparison(
        store=str(store),
        num_records=len(opened),
        image_bytes=int(opened.column("num_bytes").sum(dtype=np.int64)),
        settings=settings,
        measurements=_measurements(rounds[1:]),
        versions=versions(),
        machine=machine(settings.device),
    )


def _resolve(settings: CompareSettings, store: Store) -> CompareSettings:
    """Replace None and ``"auto"``, and limit the batch size to the store's records."""
    if len(store) == 0:
        raise StoreError(f"{store.path}: no records to read; convert a folder with images in it")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device 'cuda': no usable GPU found; install its driver or use device 'cpu'")
    chosen = settings.device
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    return replace(
        settings,
        batch_size=min(settings.batch_size, len(store)),
        workers=settings.workers or threads_per_rank(),
        device=chosen,
    )


def _open_images(path: str | os.PathLike[str], store: Store) -> Store:
    if not os.path.isdir(path):
        found = "not a folder" if os.path.exists(path) else "no such folder"
        raise SourceError(f"{path}: {found}; expected the image folder that {store.path} was made from")
    folder = open_data(path)
    if len(folder) != len(store) or folder.classes != store.classes or (folder.labels != store.labels).any():
        raise SourceError(
            f"{path}: {len(folder)} images of {len(folder.classes)} classes are not the {len(store)} records of "
            f"{len(store.classes)} classes of {store.path}; give the image folder that the store was made from"
        )
    return folder


def _open_loader(backend: str, data: Store, settings: CompareSettings) -> Loader:
    assert settings.workers is not None
    return open_loader(
        data,
        backend="dali" if backend == "dali" else "torch",
        workers=settings.workers,
        transform=settings.transform,
        batch_size=settings.batch_size,
        device="cuda" if settings.device == "cuda" else "cpu",
        rank=0,
        world_size=1,
        last_batch="drop",  # a short batch is not the same work
    )


def _burst(backend: str, settings: CompareSettings) -> int:
    """Batches that tend to arrive together: one from each DataLoader worker."""
    assert settings.workers is not None
    return 1 if backend == "dali" else settings.workers


def _window(loader: Loader, settings: CompareSettings, *, burst: int) -> float:
    """Images/s of one window.

    Only whole bursts are counted: otherwise a window could begin after the first batch of one burst and end after
    the first of another, which counts up to one batch per worker too many.
    """
    batches = _endless(loader)
    try:
        for _ in range(_AHEAD * burst + 1):
            next(batches)
        begin = _now(settings.device)
        num_images = 0
        while time.perf_counter() - begin < settings.seconds:
            num_images += sum(next(batches) for _ in range(burst))
        return num_images / (_now(settings.device) - begin)
    finally:
        batches.close()


def _endless(loader: Loader) -> Generator[int, None, None]:
    """The number of images of each batch, epoch after epoch."""
    while True:
        for batch in loader:
            num_images = len(batch[1])
            del batch  # its memory belongs to the pipeline, which reuses it for the next one
            yield num_images


def _now(device: str) -> float:
    """The time in seconds, after all work given to the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _measurements(rounds: list[Round]) -> list[Measurement]:
    return [
        Measurement(
            backend=backend,
            rounds=[one.images_per_s[backend] for one in rounds],
            ratios=[one.images_per_s[backend] / one.images_per_s["torch"] for one in rounds],
        )
        for backend in BACKENDS
        if backend in rounds[0].images_per_s
    ]
