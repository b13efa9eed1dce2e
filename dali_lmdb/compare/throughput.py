"""Images/s of loaders that do the same work, measured in turns so that the machine's load affects all alike.

Each round has one window of time for each backend, in an order that is reversed from round to round. All
windows of a round use the same plan: same records, same crops, same flips; only DALI's own file reader draws its
own. A warm-up round comes first.

This compares loading from the page cache: if data are missing from it, the first backend of a round reads
them from disk and the others do not.

Only one loader exists at a time: it is opened for its window and closed after it. An open loader would
continue to fill its queue during the next one's window. Batches prefetched before the clock starts would
inflate the result, so each window first takes as many without counting them, and more on a GPU, whose clocks and
buffers need some steps to settle; the queue is then in the same state at both ends of the window.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from dali_lmdb.compare.dali_reader import batches_of, define_reader
from dali_lmdb.compare.repeat import RepeatedStore
from dali_lmdb.compare.report import Measured, machine, spread, versions
from dali_lmdb.compare.settings import CompareSettings
from dali_lmdb.errors import DeviceError, SourceError, StoreError, one_line
from dali_lmdb.loaders.backends import open_loader
from dali_lmdb.loaders.base import Loader
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.folder import FolderStore
from dali_lmdb.store import Store, open_store
from dali_lmdb.threads import threads_per_rank

__all__ = ["BACKENDS", "Comparison", "Measurement", "Round", "compare_throughput"]

BACKENDS = {
    "files": "image folder, Pillow in DataLoader workers",
    "torch": "store, Pillow in DataLoader workers (the classic path)",
    "dali": "store, DALI",
    "dali-cpu": "store, DALI with decoding on the CPU, the rest on the GPU",
    "reader": "image folder, DALI's own file reader, which draws its own crops",
}
"""The backends that can be measured, in the order of the table."""

# At an epoch's end a DataLoader's prefetched batches run out, which happens every few steps with some hundred
# records and is negligible with ImageNet. Smaller data sets are repeated to make this many steps.
_EPOCH_STEPS = 1000

# Batches that a loader may have ready: DataLoader's prefetch_factor and DaliLoader's prefetch_queue_depth are both
# 2 by default, DataLoader's for each worker.
_AHEAD = 2

# Steps before each window on a GPU, not measured.
_GPU_WARM_UP = 50


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
    """The settings that were used: ``batch_size`` fits the store, ``device`` and ``workers`` are known."""
    decoding: dict[str, dict[str, str]]
    """By backend, the ``decode`` and ``decode_device`` that a ``DaliLoader`` chose."""
    failed: dict[str, str]
    """Why DALI's own file reader was not measured, by backend; empty if it was."""
    measurements: list[Measurement]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return self._described(
            images={"dtype": self.settings.dtype, "layout": self.settings.layout},
            decoding=self.decoding,
            failed=self.failed,
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
        images: the image folder that the store was made from, to measure ``files`` and ``reader`` too.
        settings: by default ``CompareSettings()``.
        progress: called after every round.

    Raises:
        StoreError, SourceError: the data cannot be opened, or the folder does not hold the store's records.
        RecordError: an image cannot be decoded.
        DeviceError: ``device="cuda"`` without a usable GPU.
        ValueError: ``decode_device="gpu"`` on the CPU.
    """
    opened = open_store(store)
    settings = _resolve(settings or CompareSettings(), opened)
    data = _data_by_backend(opened, images, settings)
    rounds, failed = [], dict[str, str]()
    for number in range(settings.rounds + 1):
        speeds = {}
        for backend in list(reversed(data) if number % 2 else data):
            try:
                speeds[backend] = _speed(backend, data[backend], settings, number=number)
            except RuntimeError as error:
                if backend != "reader":
                    raise
                failed[backend] = _cause(error)
                del data[backend]
        rounds.append(Round(number=number, images_per_s=speeds))
        if progress is not None:
            progress(rounds[-1])
    return Comparison(
        store=str(store),
        num_records=len(opened),
        image_bytes=int(opened.column("num_bytes").sum(dtype=np.int64)),
        settings=settings,
        decoding={
            backend: _decoding(data[backend], backend, settings) for backend in data if _uses_dali_loader(backend)
        },
        failed=failed,
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
    if chosen == "cpu" and settings.decode_device == "gpu":
        raise ValueError("decode_device is 'gpu' with device 'cpu', expected 'cpu' or None")
    batch_size = settings.batch_size or (256 if chosen == "cuda" else 64)
    return replace(
        settings,
        batch_size=min(batch_size, len(store)),
        workers=settings.workers or threads_per_rank(),
        device=chosen,
    )


def _data_by_backend(
    store: Store, images: str | os.PathLike[str] | None, settings: CompareSettings
) -> dict[str, Store]:
    """What each backend reads, in the order of the table."""
    assert settings.batch_size is not None
    times = -(-_EPOCH_STEPS * settings.batch_size // len(store))

    def repeated(data: Store) -> Store:
        return RepeatedStore(data, times=times) if times > 1 else data

    folder = None if images is None else _open_images(images, store)
    data = {} if folder is None else {"files": repeated(folder)}
    data |= {"torch": repeated(store), "dali": repeated(store)}
    if settings.device == "cuda" and settings.decode_device is None:
        data["dali-cpu"] = repeated(store)
    if folder is not None:
        data["reader"] = folder  # not repeated: its epochs follow each other without a pause
    return data


def _open_images(path: str | os.PathLike[str], store: Store) -> FolderStore:
    if not os.path.isdir(path):
        found = "not a folder" if os.path.exists(path) else "no such folder"
        raise SourceError(f"{path}: {found}; expected the image folder that {store.path} was made from")
    folder = FolderStore(path)
    if len(folder) != len(store) or folder.classes != store.classes or (folder.labels != store.labels).any():
        raise SourceError(
            f"{path}: {len(folder)} images of {len(folder.classes)} classes are not the {len(store)} records of "
            f"{len(store.classes)} classes of {store.path}; give the image folder that the store was made from"
        )
    return folder


def _speed(backend: str, data: Store, settings: CompareSettings, *, number: int) -> float:
    """Images/s of a backend in the window of one round."""
    if isinstance(data, FolderStore) and backend == "reader":
        if settings.device == "cpu":
            return _reader_window(data, settings, number)
        # On a GPU the reader decodes windows, for which nvImageCodec's issue 55 reports crashes: they must not end
        # the comparison.
        return _in_own_process(_reader_window, data, settings, number)
    with _open_loader(backend, data, settings) as loader:
        loader.set_epoch(number)
        return _window(loader, settings, burst=_burst(backend, settings))


def _reader_window(folder: FolderStore, settings: CompareSettings, number: int) -> float:
    assert settings.batch_size is not None
    assert settings.workers is not None
    reader = define_reader(
        folder.files,
        folder.labels.tolist(),
        transform=settings.transform,
        batch_size=settings.batch_size,
        device_id=torch.cuda.current_device() if settings.device == "cuda" else None,
        decode_device=settings.decode_device or ("gpu" if settings.device == "cuda" else "cpu"),
        hw_decoder_load=settings.hw_decoder_load,
        num_threads=settings.workers,
        seed=number,
    )
    return _window(batches_of(reader), settings, burst=1)


def _in_own_process(function: Callable[..., float], *arguments: Any) -> float:
    """Call a function in a process of its own; if that crashes, raise ``RuntimeError``."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _cause(error: RuntimeError) -> str:
    """What went wrong, on one line; DALI's messages begin with a traceback."""
    text = str(error)
    return one_line(text.partition("encountered:\n\n")[2].partition("\n")[0] or text)


def _uses_dali_loader(backend: str) -> bool:
    return backend in ("dali", "dali-cpu")


def _open_loader(backend: str, data: Store, settings: CompareSettings) -> Loader:
    assert settings.batch_size is not None
    assert settings.workers is not None
    return open_loader(
        data,
        backend="dali" if _uses_dali_loader(backend) else "torch",
        workers=settings.workers,
        transform=settings.transform,
        batch_size=settings.batch_size,
        device="cuda" if settings.device == "cuda" else "cpu",
        rank=0,
        world_size=1,
        last_batch="drop",  # a short batch is not the same work
        dtype=settings.dtype,
        layout=settings.layout,
        dali=replace(settings.dali, decode_device="cpu") if backend == "dali-cpu" else settings.dali,
    )


def _decoding(data: Store, backend: str, settings: CompareSettings) -> dict[str, str]:
    """The ``decode`` and ``decode_device`` that a ``DaliLoader`` chose, which needs no pipeline."""
    with _open_loader(backend, data, settings) as loader:
        assert isinstance(loader, DaliLoader)
        return {"decode": loader.graph.decode, "decode_device": loader.graph.decode_device}


def _burst(backend: str, settings: CompareSettings) -> int:
    """Batches that tend to arrive together: one from each DataLoader worker."""
    assert settings.workers is not None
    return 1 if _uses_dali_loader(backend) else settings.workers


def _window(loader: Iterable[tuple[torch.Tensor, ...]], settings: CompareSettings, *, burst: int) -> float:
    """Images/s of one window.

    Only whole bursts are counted: otherwise a window could begin after the first batch of one burst and end after
    the first of another, which counts up to one batch per worker too many.
    """
    batches = _endless(loader)
    try:
        for _ in range(_warm_up_steps(settings.device, burst=burst)):
            next(batches)
        begin = _now(settings.device)
        num_images = 0
        while time.perf_counter() - begin < settings.seconds:
            num_images += sum(next(batches) for _ in range(burst))
        return num_images / (_now(settings.device) - begin)
    finally:
        batches.close()


def _warm_up_steps(device: str, *, burst: int) -> int:
    """Number of steps before a window: more than a loader has ready, and on a GPU enough for it to settle."""
    return max(_AHEAD * burst + 1, _GPU_WARM_UP if device == "cuda" else 0)


def _endless(loader: Iterable[tuple[torch.Tensor, ...]]) -> Generator[int, None, None]:
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
        if all(backend in one.images_per_s for one in rounds)
    ]
