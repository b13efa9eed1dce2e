"""Settings of a training run, validated where they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dali_lmdb.loaders.backends import Backend
from dali_lmdb.loaders.bad import OnBad
from dali_lmdb.loaders.settings import DaliSettings, Decode, DecodeDevice
from dali_lmdb.train import checkpoint, models

__all__ = ["DeviceChoice", "Precision", "TrainSettings", "TrainShuffle"]

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
    workers: int | None = None
    """DALI's threads, or DataLoader's worker processes, of each rank; None: its share of the node's cores."""
    decode: Decode = DaliSettings.decode
    """Whether DALI decodes whole images or crop windows; this and the next four settings are those of
    ``DaliLoader``, and have no effect with ``backend="torch"``."""
    decode_device: DecodeDevice | None = DaliSettings.decode_device
    """Where DALI decodes; None: on the training device."""
    hw_decoder_load: float = DaliSettings.hw_decoder_load
    """Fraction of a batch that is offered to the GPU's hardware JPEG engine."""
    prefetch_queue_depth: int = DaliSettings.prefetch_queue_depth
    """Number of batches that DALI works on ahead."""
    readahead_bytes: int = DaliSettings.readahead_bytes
    """Bytes requested from storage ahead of the batch that is needed next."""
    shuffle: TrainShuffle = "full"
    """``"full"``: records in random order. ``"block"``: blocks of consecutive records in random order, shuffled
    with others; for storage that is slow at random reads."""
    on_bad: OnBad = "raise"
    """What happens if a record cannot be decoded. ``"raise"``: the run stops and names it. ``"substitute"``: a
    warning names it, and another record of its batch is used instead, also in evaluation."""
    quarantine: str | None = None
    """File to which a JSON line is appended for each bad record."""
    seed: int = 0
    """Seed of the weights, the order of records, crops, flips and dropout."""
    output: str | None = None
    """Folder for ``last.pt`` and ``best.pt``; no checkpoints without one."""
    resume: bool = False
    """Resume from the checkpoint in ``output``; start at the beginning if there is none yet."""
    checkpoint_every: int = 0
    """Number of steps between checkpoints within an epoch; 0 saves only at the end of epochs."""
    keep: int = 0
    """Number of epochs whose checkpoints are kept as ``epoch-0007.pt``, besides ``last.pt`` and ``best.pt``."""
    log_json: str | None = None
    """File for the measurements, one JSON object a line; ``resume`` continues it from the checkpoint's step."""
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
        for name in ("workers", "seed", "checkpoint_every", "keep", "momentum", "weight_decay"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 0")
        if self.backend == "dali" and self.workers == 0:
            raise ValueError("workers: 0, DALI needs at least 1 thread")
        _ = self.dali  # raises ValueError for a bad value
        if not self.lr > 0:
            raise ValueError(f"lr: {self.lr}, expected more than 0")
        for option in ("resume", "checkpoint_every", "keep"):
            if self.output is not None or not getattr(self, option):
                continue
            raise ValueError(f"{option}: there is no output folder for a checkpoint; set output")
        models.check_arch(self.arch)

    @property
    def dali(self) -> DaliSettings:
        """The settings that only DALI's backend has."""
        return DaliSettings(
            prefetch_queue_depth=self.prefetch_queue_depth,
            hw_decoder_load=self.hw_decoder_load,
            readahead_bytes=self.readahead_bytes,
            decode=self.decode,
            decode_device=self.decode_device,
        )

    @property
    def checkpoint_path(self) -> Path | None:
        """Path of the checkpoint, whether it exists or not; None without ``output``."""
        return None if self.output is None else Path(self.output) / checkpoint.FILE_NAME
