"""Settings of a training run, and the checks that are made before ranks are started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dali_lmdb.errors import SourceError
from dali_lmdb.loaders.backends import Backend
from dali_lmdb.loaders.bad import OnBad
from dali_lmdb.loaders.folder import is_image_folder, open_data
from dali_lmdb.plan.augment import EvalTransform, TrainTransform
from dali_lmdb.store import open_store
from dali_lmdb.train import checkpoint, models
from dali_lmdb.train.distributed import find_device

__all__ = [
    "DataSummary",
    "DeviceChoice",
    "Precision",
    "TrainSettings",
    "TrainShuffle",
    "check",
    "describe_data",
]

DeviceChoice = Literal["auto", "cuda", "cpu"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
TrainShuffle = Literal["full", "block"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of one training run. Plain values only, to be sent to ranks and saved in checkpoints."""

    train: str
    """Store to train on, or a folder of class folders with ``backend="torch"``."""
    val: str
    """Store or folder to evaluate on after each epoch, with the same classes as ``train``."""
    arch: str = "resnet50"
    """Any torchvision classification model; trained from random weights."""
    backend: Backend = "dali"
    """``"dali"`` decodes with DALI, ``"torch"`` with Pillow in DataLoader workers (the classic CPU path)."""
    device: DeviceChoice = "auto"
    """``"cuda"``: a GPU per rank, NCCL. ``"cpu"``: gloo. ``"auto"``: GPUs if there are any."""
    precision: Precision = "auto"
    """``"auto"``: mixed bfloat16 on GPUs that support it, mixed float16 on others, float32 on the CPU."""
    epochs: int = 90
    """Number of training epochs."""
    batch_size: int = 256
    """Records in a training step of one rank; ``lr`` is not scaled by it."""
    lr: float = 0.1
    """Peak learning rate, used as given: linear warm-up, then a cosine to 0."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 1e-4
    size: int = 224
    """Height and width of the images in pixels; evaluation resizes the shorter side to size * 256 / 224."""
    workers: int = 4
    """DALI's threads, or DataLoader's worker processes, of each rank."""
    shuffle: TrainShuffle = "full"
    """``"full"``: records in random order. ``"block"``: blocks of consecutive records in random order, shuffled
    with others; for storage that is slow at random reads."""
    on_bad: OnBad = "raise"
    """What happens if a record cannot be decoded. ``"raise"``: the run stops and names it. ``"substitute"``: a
    warning names it, and another record of its batch is used instead, also in evaluation."""
    seed: int = 0
    """Seed of the weights, the order of records, crops, flips and dropout."""
    output: str | None = None
    """Folder for ``checkpoint.pt``; no checkpoints without one."""
    resume: bool = False
    """Resume from the checkpoint in ``output``; start at the beginning if there is none yet."""
    checkpoint_every: int = 0
    """Number of steps between checkpoints within an epoch; 0 saves only at the end of epochs."""
    log_json: str | None = None
    """File for the measurements, one JSON object a line; appended to with ``resume``."""
    log_every: int = 10
    """Number of steps between reports; the last step of an epoch is always reported."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("backend", Backend),
            ("device", DeviceChoice),
            ("precision", Precision),
            ("shuffle", TrainShuffle),
            ("on_bad", OnBad),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name}: {getattr(self, name)!r}, expected one of {', '.join(get_args(choices))}"
                )
        for name in ("epochs", "batch_size", "size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
        for name in ("workers", "seed", "checkpoint_every", "momentum", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 0")
        if self.backend == "dali" and self.workers < 1:
            raise ValueError("workers: 0, DALI needs at least 1 thread")
        if not self.lr > 0:
            raise ValueError(f"lr: {self.lr}, expected more than 0")
        if self.output is None and (self.resume or self.checkpoint_every):
            option = "resume" if self.resume else "checkpoint_every"
            raise ValueError(f"{option}: there is no output folder for a checkpoint; name one with output")
        models.check_arch(self.arch)

    @property
    def train_transform(self) -> TrainTransform:
        """Random crops and flips."""
        return TrainTransform(size=self.size)

    @property
    def eval_transform(self) -> EvalTransform:
        """Central crops; the shorter side is resized to size * 256 / 224, as usual for 224."""
        return EvalTransform(size=self.size, resize=round(self.size * 256 / 224))

    @property
    def checkpoint_path(self) -> Path | None:
        """Where the checkpoint is, or will be."""
        return None if self.output is None else Path(self.output) / checkpoint.FILE_NAME


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """What must be known about a data set before ranks are started."""

    num_records: int
    classes: list[str]


def describe_data(path: str, *, backend: str) -> DataSummary:
    """Count the records and name the classes of a store or, with ``backend="torch"``, of an image folder.

    Raises:
        SourceError: an image folder that cannot be read, or one that DALI was to read.
        StoreError: not a store, or none at all.
    """
    if backend == "dali" and is_image_folder(path):
        target = f"{path.rstrip(os.sep)}.lmdb"
        raise SourceError(
            f"{path}: a folder, and --backend dali reads stores; convert it with: "
            f"dali-lmdb convert {path} {target} (or read it as it is with --backend torch)"
        )
    with open_data(path) if backend == "torch" else open_store(path) as store:
        return DataSummary(num_records=len(store), classes=list(store.classes))


def check(settings: TrainSettings, *, world_size: int, ranks_per_node: int) -> None:
    """Find errors that would stop every rank before any is started; create the output folder if there are none.

    Raises:
        ValueError: settings that do not fit the data, or files that cannot be written.
        StoreError, SourceError, DeviceError, StateError: data, GPUs or a checkpoint that is missing or unfit.
    """
    find_device(settings.device, local_rank=0, ranks_per_node=ranks_per_node)
    train = describe_data(settings.train, backend=settings.backend)
    val = describe_data(settings.val, backend=settings.backend)
    _check_classes(train.classes, val.classes, settings=settings)
    _check_batch(train.num_records, settings=settings, world_size=world_size)
    if val.num_records == 0:
        raise ValueError(f"{settings.val}: no records to evaluate on")
    models.check_input(
        settings.arch, num_classes=len(train.classes), size=settings.size, batch_size=settings.batch_size
    )
    _check_checkpoint(settings, classes=train.classes)
    _check_files(settings)


def _check_classes(train: Sequence[str], val: Sequence[str], *, settings: TrainSettings) -> None:
    if list(train) == list(val):
        return
    differences = [
        f"only in {path}: {_some(sorted(set(own) - set(other)))}"
        for path, own, other in ((settings.train, train, val), (settings.val, val, train))
        if set(own) - set(other)
    ]
    if not differences:  # the same names in another order, so labels would be mixed up
        first = next(i for i, (own, other) in enumerate(zip(train, val, strict=True)) if own != other)
        differences = [f"label {first} is {train[first]} in {settings.train}, {val[first]} in {settings.val}"]
    raise ValueError(
        f"classes of --train ({len(train)}) and --val ({len(val)}) differ: {'; '.join(differences)}; "
        "make both from the same classes"
    )


def _some(names: Sequence[str], *, limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _check_batch(num_records: int, *, settings: TrainSettings, world_size: int) -> None:
    global_batch_size = settings.batch_size * world_size
    if num_records >= global_batch_size:
        return
    largest = num_records // world_size
    remedy = f"use --batch-size {largest} or less" if largest else f"use --world-size {num_records} or less"
    raise ValueError(
        f"{settings.train}: {num_records} records, one step needs {global_batch_size} "
        f"(--batch-size {settings.batch_size} on {world_size} ranks); {remedy}"
    )


def _check_checkpoint(settings: TrainSettings, *, classes: Sequence[str]) -> None:
    path = settings.checkpoint_path
    if path is None or not os.path.exists(path):  # Path.exists raises where the name is too long
        return
    if not settings.resume:
        raise ValueError(f"{path} exists; resume from it with --resume, or choose another --output")
    checkpoint.check_fits(checkpoint.load(path), arch=settings.arch, classes=classes, path=path)


def _check_files(settings: TrainSettings) -> None:
    """Make the output folder and make sure that the log can be written; leave nothing else behind."""
    if settings.log_json is not None:
        log = Path(settings.log_json)
        if os.path.isdir(log):
            raise ValueError(f"--log-json {log}: a folder, expected a file")
        if not log.absolute().parent.is_dir():
            raise ValueError(f"--log-json {log}: no folder {log.absolute().parent}; make it first")
        if not os.access(log if os.path.exists(log) else log.absolute().parent, os.W_OK):
            raise ValueError(f"--log-json {log}: not writable; choose another file")
    if settings.output is not None:
        try:
            Path(settings.output).mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise ValueError(f"--output {settings.output}: cannot be made: {_one_line(cause)}") from cause
        if not os.access(settings.output, os.W_OK):
            raise ValueError(f"--output {settings.output}: not writable; choose another folder")


def _one_line(cause: BaseException) -> str:
    return " ".join(str(cause).split())
