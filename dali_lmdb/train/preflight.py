"""Checks of a run's data, model, checkpoint and output files, made once, before any rank is started."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from dali_lmdb.errors import SourceError
from dali_lmdb.loaders.backends import Backend
from dali_lmdb.loaders.bad import check_quarantine
from dali_lmdb.loaders.folder import is_image_folder, open_data
from dali_lmdb.plan.sampling import AllRecords
from dali_lmdb.plan.state import LoaderState
from dali_lmdb.store import open_store
from dali_lmdb.torchrun import RankEnvironment
from dali_lmdb.train import checkpoint, metrics, models, scalars
from dali_lmdb.train.distributed import find_device
from dali_lmdb.train.resuming import differences
from dali_lmdb.train.settings import TrainSettings
from dali_lmdb.train.weights import check_weights, find_weights

__all__ = ["check", "check_file", "describe", "some"]


def check(settings: TrainSettings, *, world_size: int, ranks_per_node: int) -> None:
    """Find errors that would stop every rank; if there are none, create the output folder.

    Raises:
        ValueError: settings that do not fit the data, or files that cannot be written.
        StoreError, SourceError, DeviceError, StateError: data, GPUs or a checkpoint are missing or do not fit.
    """
    device = find_device(settings.device, local_rank=0, ranks_per_node=ranks_per_node)
    if settings.backend == "dali" and settings.decode_device == "gpu" and device.type == "cpu":
        raise ValueError("--decode-device gpu: training is on the CPU; use --decode-device cpu")
    if settings.sync_bn and world_size > 1 and device.type == "cpu":
        raise ValueError(
            "--sync-bn: torch normalises over ranks on GPUs only, and training is on the CPU; leave it out"
        )
    if settings.compile and device.type == "cpu":
        _check_compiler()
    data = describe(settings.train, backend=settings.backend)
    val_data, classes = describe(settings.val, backend=settings.backend), data.classes
    _check_classes(classes, val_data.classes, settings=settings)
    _check_batch(data.num_records, settings=settings, world_size=world_size)
    if val_data.num_records == 0:
        raise ValueError(f"{settings.val}: no records to evaluate on")
    _check_sizes(settings, num_classes=len(classes))
    _check_checkpoint(settings, data=data)
    _check_weights(settings, classes=classes)
    _check_files(settings)


def _check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")  # what torch.compile takes on the CPU
    if shutil.which(compiler) is None:
        raise ValueError(
            f"--compile: torch.compile needs a C++ compiler on the CPU, and there is no {compiler}; install g++, "
            "set CXX, or leave it out"
        )


def _check_sizes(settings: TrainSettings, *, num_classes: int) -> None:
    """Check that the model takes images of all sizes that the run has."""
    for image_size in sorted(
        {settings.size, *(size for size in (settings.start_size, settings.val_size) if size)}
    ):
        models.check_input(
            settings.arch,
            num_classes=num_classes,
            size=settings.size,
            image_size=image_size,
            batch_size=settings.batch_size,
        )


class DataDescription(NamedTuple):
    num_records: int
    classes: list[str]
    fingerprint: str


def describe(path: str, *, backend: Backend) -> DataDescription:
    """Describe a store or, with ``backend="torch"``, an image folder."""
    if backend == "dali" and is_image_folder(path):
        target = f"{path.rstrip(os.sep)}.lmdb"
        raise SourceError(
            f"{path}: a folder, and --backend dali reads stores; convert it with: "
            f"dali-lmdb convert {path} {target} (or read it as it is with --backend torch)"
        )
    with open_data(path) if backend == "torch" else open_store(path) as store:
        return DataDescription(len(store), list(store.classes), store.fingerprint)


def _check_classes(train: list[str], val: list[str], *, settings: TrainSettings) -> None:
    if train == val:
        return
    differences = [
        f"only in {path}: {some(sorted(set(own) - set(other)))}"
        for path, own, other in ((settings.train, train, val), (settings.val, val, train))
        if set(own) - set(other)
    ]
    if not differences:  # the same names in another order: labels would not mean the same
        first = next(i for i, (own, other) in enumerate(zip(train, val, strict=True)) if own != other)
        differences = [f"label {first} is {train[first]} in {settings.train}, {val[first]} in {settings.val}"]
    raise ValueError(
        f"classes of --train ({len(train)}) and --val ({len(val)}) differ: {'; '.join(differences)}; "
        "make both from the same classes"
    )


def some(names: list[str], *, limit: int = 5) -> str:
    """The first names, and how many more there are."""
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


def _check_checkpoint(settings: TrainSettings, *, data: DataDescription) -> None:
    """Check that the run can go on from its checkpoint, where this machine has it."""
    path = settings.checkpoint_path
    if path is None:
        return
    checkpoint.check_folder(path.parent, resume=settings.resume)
    if not os.path.exists(path):  # Path.exists raises where the name is too long
        return
    content = checkpoint.load(path)
    checkpoint.check_fits(content, arch=settings.arch, classes=data.classes, path=path)
    differences(content["settings"], settings, path=path)
    order = AllRecords(data.num_records, seed=settings.seed, shuffle=settings.shuffle)
    own = LoaderState(
        seed=settings.seed,
        epoch=0,
        position=0,
        order=order.identity,
        fingerprint=data.fingerprint,
        num_positions=order.num_positions,
    )
    LoaderState.from_dict(content["loader"]).check_against(own, where=settings.train)


def _check_weights(settings: TrainSettings, *, classes: list[str]) -> None:
    """Check that the model can begin with the weights, where rank 0 reads them."""
    ranks, path = RankEnvironment.from_environment(), settings.checkpoint_path
    if settings.weights is None or (ranks is not None and ranks.rank != 0):
        return
    if settings.resume and path is not None and os.path.exists(path):  # which comes instead
        return
    found = find_weights(settings.weights, arch=settings.arch)
    check_weights(found, arch=settings.arch, size=settings.size, classes=classes)


def _check_files(settings: TrainSettings) -> None:
    """Check that the log and the quarantine can be written, and create the output folders."""
    for option, name in (("--log-json", settings.log_json), ("--quarantine", settings.quarantine)):
        if name is not None and not _is_made_with_output(Path(name).parent, output=settings.output):
            check_file(Path(name), option=option)
    if settings.log_json is not None:
        _check_log(settings.log_json, settings=settings)
    if settings.tensorboard is not None and not scalars.has_tensorboard():
        raise ValueError("--tensorboard: TensorBoard is not installed; pip install 'dali-lmdb[tensorboard]'")
    for option, name in (("--output", settings.output), ("--tensorboard", settings.tensorboard)):
        if name is not None:
            _make_folder(name, option=option)
    if settings.quarantine is not None:  # which may be in one of them
        check_quarantine(Path(settings.quarantine))


def _is_made_with_output(folder: Path, *, output: str | None) -> bool:
    """Whether a folder is missing, and is the output folder or one above it."""
    return (
        output is not None
        and not os.path.exists(folder)
        and Path(output).absolute().is_relative_to(folder.absolute())
    )


def _make_folder(name: str, *, option: str) -> None:
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise ValueError(f"{option} {name}: cannot be created: {cause}") from cause
    if not os.access(name, os.W_OK):
        raise ValueError(f"{option} {name}: not writable; choose another folder")


def _check_log(name: str, *, settings: TrainSettings) -> None:
    if not os.path.isfile(name) or os.stat(name).st_size == 0:  # a device and a pipe hold nothing to lose
        return
    if not settings.resume:
        raise ValueError(
            f"--log-json {name}: exists; choose another file, or remove it (a run with --resume continues its own)"
        )
    assert settings.output is not None
    metrics.find_end(name, output=settings.output, epoch=0, step=0)


def check_file(file: Path, *, option: str) -> None:
    """Raise ValueError if an option's file cannot be written."""
    if os.path.isdir(file):
        raise ValueError(f"{option} {file}: a folder, expected a file")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{option} {file}: no folder {file.absolute().parent}; create it first")
    if not os.access(file if os.path.exists(file) else file.absolute().parent, os.W_OK):
        raise ValueError(f"{option} {file}: not writable; choose another file")
