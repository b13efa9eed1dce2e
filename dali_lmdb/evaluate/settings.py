"""What is evaluated, and the checks made before any rank is started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dali_lmdb.errors import StateError
from dali_lmdb.loaders.backends import Backend
from dali_lmdb.plan.augment import Interpolation
from dali_lmdb.train import checkpoint, preflight
from dali_lmdb.train.distributed import find_device
from dali_lmdb.train.settings import DeviceChoice, Precision, TrainSettings

__all__ = ["EvaluateSettings", "check", "label_map", "load", "settings_of"]

# What a model's figures depend on, and what the checkpoint's run has chosen for its data.
_OF_CHECKPOINT = (
    "arch",
    "size",
    "val_size",
    "val_resize",
    "interpolation",
    "precision",
    "backend",
    "batch_size",
    "decode",
)


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Settings of one evaluation. Plain values only, to be sent to ranks; None: as the checkpoint's run had it."""

    checkpoint: str
    val: str
    """Store to evaluate on, or a folder of class folders with ``backend="torch"``."""
    allow_subset: bool = False
    """Whether the store may lack some of the checkpoint's classes."""
    ema: bool | None = None
    """Evaluate the averaged weights only, or the plain ones only; None: those that the checkpoint has."""
    backend: Backend | None = None
    device: DeviceChoice = "auto"
    precision: Precision | None = None
    batch_size: int | None = None
    """Records that one rank processes at once."""
    val_size: int | None = None
    """Height and width of the images in pixels."""
    val_resize: int | None = None
    """Length of their shorter side before the central crop; None with another ``val_size``: that * 256 / 224."""
    interpolation: Interpolation | None = None
    workers: int | None = None
    """DALI's threads, or DataLoader's worker processes, of each rank; None: its share of the node's cores."""
    json: bool = False
    """Print the result as JSON."""
    per_class: str | None = None
    """File for the figures of each class, as TSV."""
    predictions: str | None = None
    """File for each record's most probable labels, as Parquet."""
    worst: str | None = None
    """File for a picture of the most confident mistakes, as PNG."""

    @property
    def outputs(self) -> dict[str, str]:
        """The files to be written, by option."""
        files = {"--per-class": self.per_class, "--predictions": self.predictions, "--worst": self.worst}
        return {option: path for option, path in files.items() if path is not None}


def load(path: str) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        StateError: it cannot be read or used.
    """
    return checkpoint.load(Path(path), then="give another checkpoint")


def settings_of(content: dict[str, Any], settings: EvaluateSettings) -> TrainSettings:
    """The checkpoint's settings of model and images, and this evaluation's.

    Raises:
        ValueError: they do not fit together, or this version does not know the model.
    """
    values = {name: content["settings"][name] for name in _OF_CHECKPOINT if name in content["settings"]}
    if content["settings"].get("decode_device") == "cpu":  # perhaps since the GPU does not decode the images
        values["decode_device"] = "cpu"
    if settings.val_size is not None:
        values["val_resize"] = None
    known = {field.name for field in fields(TrainSettings)}
    values |= {name: value for name, value in asdict(settings).items() if name in known and value is not None}
    try:
        return TrainSettings(train=settings.val, **values)
    except ValueError as error:
        raise ValueError(f"{settings.checkpoint}: {error}") from error


def label_map(trained: Sequence[str], classes: Sequence[str], *, path: str, allow_subset: bool) -> list[int]:
    """The checkpoint's label for each of a store's, by class name.

    Raises:
        ValueError: the store has other classes, or only some of them and that is not allowed.
    """
    place = {name: label for label, name in enumerate(trained)}
    unknown = [name for name in classes if name not in place]
    if unknown:
        raise ValueError(
            f"{path}: classes that the checkpoint does not know: {preflight.some(unknown)}; give a store of its "
            f"{len(trained)} classes"
        )
    missing = sorted(set(trained) - set(classes))
    if missing and not allow_subset:
        raise ValueError(
            f"{path}: {len(classes)} of the checkpoint's {len(trained)} classes, without "
            f"{preflight.some(missing)}; use --allow-subset to evaluate on these only"
        )
    return [place[name] for name in classes]


def check(settings: EvaluateSettings, *, ranks_per_node: int) -> None:
    """Find errors that would stop every rank.

    Raises:
        ValueError: settings, a store or files that do not fit.
        StoreError, SourceError, DeviceError, StateError: data, GPUs or the checkpoint are missing or do not fit.
    """
    _check_outputs(settings)
    content = load(settings.checkpoint)
    if settings.ema and content.get("ema") is None:
        raise StateError(f"{settings.checkpoint}: has no averaged weights; leave out --ema")
    training = settings_of(content, settings)
    find_device(training.device, local_rank=0, ranks_per_node=ranks_per_node)
    num_records, classes, _ = preflight.describe(training.val, backend=training.backend)
    if num_records == 0:
        raise ValueError(f"{training.val}: no records to evaluate on")
    label_map(content["classes"], classes, path=training.val, allow_subset=settings.allow_subset)


def _check_outputs(settings: EvaluateSettings) -> None:
    """Refuse to write over anything, be it the checkpoint, the data or another output."""
    options: dict[str, str] = {}  # by the file that they write
    for option, path in settings.outputs.items():
        preflight.check_file(Path(path), option=option)
        for file in (path, partial_of(path)):
            if os.path.lexists(file):
                raise ValueError(f"{option} {path}: {file} exists; remove it or choose another file")
            other = options.setdefault(os.path.realpath(file), option)
            if other != option:
                raise ValueError(f"{option} {path}: {other} would write {file} too; choose another file")


def partial_of(path: str) -> str:
    """Where a file is written before it has its name."""
    return f"{path}.partial"
