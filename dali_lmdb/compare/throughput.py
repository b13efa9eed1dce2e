"""Images/s of loaders that do the same work, measured in turns so that the machine's load affects all alike.

Each round has one window of time for each backend, in an order that is reversed from round to round. All
windows of a round use the same plan: same records, same crops, same flips; only those not made of this package's
loaders draw their own. A warm-up round of short windows comes first.

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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch

from dali_lmdb.compare.confidence import Interval, interval_of
from dali_lmdb.compare.dali_reader import batches_of, decoded_batches, define_reader
from dali_lmdb.compare.model import Model
from dali_lmdb.compare.repeat import RepeatedStore
from dali_lmdb.compare.report import Measured, machine, spread, versions
from dali_lmdb.compare.settings import CompareSettings
from dali_lmdb.compare.transforms_v2 import V2Loader
from dali_lmdb.compare.window import Window, measure
from dali_lmdb.errors import DeviceError, SourceError, StoreError, one_line
from dali_lmdb.loaders.backends import Backend, open_loader
from dali_lmdb.loaders.base import Loader
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.folder import FolderStore
from dali_lmdb.loaders.settings import DaliSettings
from dali_lmdb.store import Store, open_store
from dali_lmdb.threads import threads_per_rank

__all__ = [
    "BACKENDS",
    "Comparison",
    "Measurement",
    "Round",
    "Turn",
    "compare_throughput",
    "open_dali",
    "repeated",
    "resolve",
]

BACKENDS = {
    "files": "image folder, Pillow in DataLoader workers",
    "torch": "store, Pillow in DataLoader workers (the classic path)",
    "torch-v2": "store, torchvision's decode_image and transforms.v2 in DataLoader workers, own crops",
    "dali": "store, DALI",
    "dali-image": "store, DALI, whole images decoded instead of windows",
    "dali-cpu": "store, DALI with decoding on the CPU, the rest on the GPU",
    "reader": "image folder, DALI's own file reader, own crops",
    "decode": "store, DALI's decoder alone on whole images: a limit for what decodes them",
    "model": "training on one batch that stays on the device: a limit for training",
    "torch+model": "training on what torch loads",
    "dali+model": "training on what dali loads",
}
"""The backends that can be measured, in the order of the table."""

# References, which are not this package's, and models, which a GPU may lack the memory for: one that fails costs
# only its row.
_MAY_FAIL = ("torch-v2", "reader", "decode", "model", "torch+model", "dali+model")
_IMAGE_FOLDER = ("files", "reader")

# At an epoch's end a DataLoader's prefetched batches run out, which happens every few steps with some hundred
# records and is negligible with ImageNet. Smaller data sets are repeated to make this many steps.
_EPOCH_STEPS = 1000

_WARM_UP_SHARE = 0.25  # of a window's seconds, in the warm-up round

# ResNet-18 takes 5 s for 64 images on two cores, and no more images/s than with 8.
_TRAIN_BATCH_SIZE_CPU = 8


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One backend's windows."""

    backend: str
    windows: list[Window]
    """Of each round."""
    ratios: list[float]
    """Images/s divided by those of ``base`` in the same round."""
    base: str
    """``torch``, or ``torch+model`` where a model trains; if that is not measured, the first of the table."""

    @property
    def rounds(self) -> list[float]:
        """Images/s of each round."""
        return [window.images_per_s for window in self.windows]

    @property
    def images_per_s(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds)

    @property
    def cpu_ms_per_image(self) -> float:
        """CPU time an image in ms, median over the rounds."""
        return 1000 * statistics.median(window.cpu_s_per_image for window in self.windows)

    @property
    def cores(self) -> float:
        """CPU time divided by elapsed time, median over the rounds."""
        return statistics.median(window.cores for window in self.windows)

    @property
    def memory_bytes(self) -> int | None:
        """The highest peak of all rounds, see ``Window``; None if unknown."""
        known = [window.memory_bytes for window in self.windows if window.memory_bytes is not None]
        return max(known, default=None)

    @property
    def read_bytes_per_image(self) -> float | None:
        """Bytes an image that came from storage, mean over the rounds, see ``Window``; None if unknown."""
        known = [found for window in self.windows if (found := window.read_bytes_per_image) is not None]
        return statistics.fmean(known) if len(known) == len(self.windows) else None

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> Interval:
        """Where the true ratio lies, with 99 % confidence."""
        return interval_of(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "images_per_s": spread(self.rounds),
            "base": self.base,
            "ratio": self.ratio,
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
            "ratio_low": self.interval.low if len(self.ratios) > 1 else None,
            "ratio_high": self.interval.high if len(self.ratios) > 1 else None,
            "differs": self.interval.differs,
            "cpu_ms_per_image": self.cpu_ms_per_image,
            "cores": self.cores,
            "memory_bytes": self.memory_bytes,
            "read_bytes_per_image": self.read_bytes_per_image,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison(Measured):
    """The result of ``compare_throughput``."""

    settings: CompareSettings
    """The settings that were used: ``batch_size`` fits the store, ``device`` and ``workers`` are known."""
    decoding: dict[str, dict[str, str]]
    """By backend, the ``decode`` and ``decode_device`` that a ``DaliLoader`` chose."""
    failed: dict[str, str]
    """Why a reference or a model was not measured, by backend; empty if all were."""
    measurements: list[Measurement]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return self._described(
            images={"dtype": self.settings.dtype, "layout": self.settings.layout},
            decoding=self.decoding,
            failed=self.failed,
            backends={found.backend: found.to_dict() for found in self.measurements},
            conclusion=self.conclusion,
        )

    @property
    def conclusion(self) -> str | None:
        """What limits training, in a sentence; None without a model and a loader."""
        rounds = {found.backend: found.rounds for found in self.measurements}
        if "model" not in rounds or not (loaders := [name for name in ("dali", "torch") if name in rounds]):
            return None
        name, both = loaders[0], f"{loaders[0]}+model"
        loading = _ratios(rounds[name], rounds["model"])
        times = statistics.median(loading)
        given = f"{name} gives {times:,.{0 if times >= 10 else 2}f} times what {self.settings.arch} takes here"
        interval = interval_of(loading)
        if interval.differs:
            given += f": {'the model' if interval.low > 1 else name} is the limit"
        else:
            given += ", which is not told apart from 1: neither is shown to be the limit"
        if both not in rounds:
            return given
        training = _ratios(rounds[both], rounds["model"])
        if interval_of(training).differs:
            return f"{given}; training reaches {statistics.median(training):.0%} of the model alone"
        return f"{given}; training is not told apart from the model alone"


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round's result, passed to the ``progress`` callback."""

    number: int
    """0 for the warm-up, then from 1."""
    windows: dict[str, Window]
    """What was measured, by backend."""

    @property
    def images_per_s(self) -> dict[str, float]:
        """Images/s by backend."""
        return {backend: window.images_per_s for backend, window in self.windows.items()}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A window that begins, passed to the ``on_window`` callback."""

    backend: str
    number: int
    """The round: 0 for the warm-up, then from 1 to ``rounds``."""
    rounds: int
    place: int
    """Of this window in its round, from 1 to ``num_backends``."""
    num_backends: int


def compare_throughput(
    store: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    settings: CompareSettings | None = None,
    progress: Callable[[Round], None] | None = None,
    on_window: Callable[[Turn], None] | None = None,
) -> Comparison:
    """Measure the images/s that each backend delivers to a consumer: one that does nothing with them, or a model.

    Args:
        store: the store that is read.
        images: the image folder that the store was made from, to measure ``files`` and ``reader`` too.
        settings: by default ``CompareSettings()``.
        progress: called after every round.
        on_window: called before every window.

    Raises:
        StoreError, SourceError: the data cannot be opened, or the folder does not hold the store's records.
        StoreError: all that should be measured failed.
        RecordError: an image cannot be decoded.
        DeviceError: ``device="cuda"`` without a usable GPU.
        ValueError: ``decode_device="gpu"`` on the CPU, or ``only`` names what is not measured with these settings.
    """
    opened = open_store(store)
    settings = resolve(settings or CompareSettings(), opened)
    data = _data_by_backend(opened, images, settings)
    if not any("model" in backend for backend in data):
        settings = replace(settings, arch=None)
    rounds, failed = [], dict[str, str]()
    for number in range(settings.rounds + 1):
        windows = {}
        used = settings if number else replace(settings, seconds=_WARM_UP_SHARE * settings.seconds)
        order = list(reversed(data) if number % 2 else data)
        for place, backend in enumerate(order, start=1):
            if on_window is not None:
                on_window(
                    Turn(
                        backend=backend,
                        number=number,
                        rounds=settings.rounds,
                        place=place,
                        num_backends=len(order),
                    )
                )
            try:
                windows[backend] = _window(backend, data[backend], used, number=number)
            except (RuntimeError, ValueError) as error:
                if backend not in _MAY_FAIL:
                    raise
                failed[backend] = _cause(error)
                del data[backend]
                if not data:
                    raise StoreError(f"{store}: {backend} cannot be measured: {failed[backend]}") from error
        rounds.append(Round(number=number, windows=windows))
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


def resolve(settings: CompareSettings, store: Store) -> CompareSettings:
    """Replace None and ``"auto"``, and limit the batch sizes to the store's records.

    Raises:
        StoreError, DeviceError, ValueError: as ``compare_throughput``.
    """
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
    train_batch_size = settings.train_batch_size or settings.batch_size
    if train_batch_size is None:
        train_batch_size = batch_size if chosen == "cuda" else _TRAIN_BATCH_SIZE_CPU
    arch = settings.arch
    if arch == "auto":
        arch = "resnet18" if settings.task == "train" else None
    return replace(
        settings,
        batch_size=min(batch_size, len(store)),
        train_batch_size=min(train_batch_size, len(store)),
        arch=arch,
        workers=settings.workers or threads_per_rank(),
        device=chosen,
    )


def _data_by_backend(
    store: Store, images: str | os.PathLike[str] | None, settings: CompareSettings
) -> dict[str, Store]:
    """What each backend reads, in the order of the table."""
    folder = None if images is None else _open_images(images, store)
    names = [name for name in BACKENDS if _can_be_measured(name, settings, has_images=folder is not None)]
    if unknown := [name for name in settings.only if name not in names]:
        shown = ", ".join(name or "''" for name in unknown)
        raise ValueError(f"only: {shown} cannot be measured here, only {', '.join(names)}")
    data: dict[str, Store] = {}
    for name in names:
        if settings.only and name not in settings.only:
            continue
        if name in _IMAGE_FOLDER:
            assert folder is not None
            # The reader's is not repeated: its epochs follow each other without a pause.
            data[name] = folder if name == "reader" else repeated(folder, settings)
        else:
            data[name] = repeated(store, settings)
    return data


def repeated(data: Store, settings: CompareSettings) -> Store:
    """The data, repeated until an epoch is long."""
    assert settings.batch_size is not None
    times = -(-_EPOCH_STEPS * settings.batch_size // len(data))
    return RepeatedStore(data, times=times) if times > 1 else data


def _can_be_measured(name: str, settings: CompareSettings, *, has_images: bool) -> bool:
    if name in _IMAGE_FOLDER:
        return has_images
    if name == "dali-image":  # on a GPU, dali decodes whole images anyway, and windows may crash
        return settings.device == "cpu" and settings.decode == "auto"
    if name == "dali-cpu":
        return settings.device == "cuda" and settings.decode_device is None
    return settings.arch is not None or "model" not in name


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


def _window(backend: str, data: Store, settings: CompareSettings, *, number: int) -> Window:
    """One round's window of a backend."""
    assert settings.batch_size is not None
    assert settings.workers is not None
    if isinstance(data, FolderStore) and backend == "reader":
        if settings.device == "cpu":
            return _reader_window(data, settings, number)
        # On a GPU the reader decodes windows, for which nvImageCodec's issue 55 reports crashes: they must not end
        # the comparison.
        found: Window = _in_own_process(_reader_window, data, settings, number)
        return found
    if backend == "decode":
        return measure(decoded_batches(data, **_dali_arguments(settings)), settings, burst=1)
    if backend == "torch-v2":
        loader = V2Loader(
            data,
            transform=settings.transform,
            batch_size=settings.batch_size,
            num_workers=settings.workers,
            seed=number,
            device="cuda" if settings.device == "cuda" else "cpu",
        )
        return measure(loader, settings, burst=settings.workers)
    # A model is made for its window: its memory must not count for what is measured after it.
    burst, model = 1 if _uses_dali_loader(backend) else settings.workers, None
    if "model" in backend:
        settings = settings.for_training
        burst, model = 1, Model(settings, num_classes=len(data.classes))
        if backend == "model":
            return measure(model.batches(), settings, burst=burst, consume=model)
    with _open_loader(backend, data, settings) as loader_of_ours:
        loader_of_ours.set_epoch(number)
        return measure(loader_of_ours, settings, burst=burst, consume=model)


def _dali_arguments(settings: CompareSettings) -> dict[str, Any]:
    return {
        "batch_size": settings.batch_size,
        "device_id": torch.cuda.current_device() if settings.device == "cuda" else None,
        "decode_device": settings.decode_device or ("gpu" if settings.device == "cuda" else "cpu"),
        "hw_decoder_load": settings.hw_decoder_load,
        "num_threads": settings.workers,
    }


def _reader_window(folder: FolderStore, settings: CompareSettings, number: int) -> Window:
    reader = define_reader(
        folder.files,
        folder.labels.tolist(),
        transform=settings.transform,
        seed=number,
        **_dali_arguments(settings),
    )
    return measure(batches_of(reader), settings, burst=1)


def _in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own; if that crashes, raise ``RuntimeError``."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _cause(error: Exception) -> str:
    """What went wrong, on one line; DALI's messages begin with a traceback, a worker's end with one."""
    text = str(error).strip()
    if "\nOriginal Traceback" in text:
        return one_line(text.rpartition("\n")[2])
    return one_line(text.partition("encountered:\n\n")[2].partition("\n")[0] or text)


def _uses_dali_loader(backend: str) -> bool:
    return backend.partition("+")[0] in ("dali", "dali-image", "dali-cpu")


def _open_loader(backend: str, data: Store, settings: CompareSettings) -> Loader:
    dali = settings.dali
    if backend == "dali-cpu":
        dali = replace(dali, decode_device="cpu")
    if backend == "dali-image":
        dali = replace(dali, decode="image")
    return _open(data, settings, "dali" if _uses_dali_loader(backend) else "torch", dali)


def open_dali(data: Store, settings: CompareSettings, dali: DaliSettings) -> Loader:
    """Open a ``DaliLoader``; its ``num_threads`` are the settings' ``workers`` unless given."""
    return _open(data, settings, "dali", dali)


def _open(data: Store, settings: CompareSettings, backend: Backend, dali: DaliSettings) -> Loader:
    assert settings.batch_size is not None
    assert settings.workers is not None
    return open_loader(
        data,
        backend=backend,
        workers=dali.num_threads or settings.workers,
        transform=settings.transform,
        batch_size=settings.batch_size,
        device="cuda" if settings.device == "cuda" else "cpu",
        rank=0,
        world_size=1,
        last_batch="drop",  # a short batch is not the same work
        dtype=settings.dtype,
        layout=settings.layout,
        dali=dali,
    )


def _decoding(data: Store, backend: str, settings: CompareSettings) -> dict[str, str]:
    """The ``decode`` and ``decode_device`` that a ``DaliLoader`` chose, which needs no pipeline."""
    with _open_loader(backend, data, settings) as loader:
        assert isinstance(loader, DaliLoader)
        return {"decode": loader.graph.decode, "decode_device": loader.graph.decode_device}


def _measurements(rounds: list[Round]) -> list[Measurement]:
    names = [name for name in BACKENDS if all(name in one.windows for one in rounds)]
    found = []
    for name in names:
        base = _base_of(name, names)
        ratios = [one.images_per_s[name] / one.images_per_s[base] for one in rounds]
        windows = [one.windows[name] for one in rounds]
        found.append(Measurement(backend=name, windows=windows, ratios=ratios, base=base))
    return found


def _ratios(rounds: list[float], others: list[float]) -> list[float]:
    """Of each round's images/s."""
    return [one / other for one, other in zip(rounds, others, strict=True)]


def _base_of(name: str, names: list[str]) -> str:
    """What a backend is compared with."""
    alike = [other for other in names if ("model" in other) == ("model" in name)]
    base = "torch+model" if "model" in name else "torch"
    return base if base in alike else alike[0]
