"""Settings of a training run, validated where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from dali_lmdb.loaders.backends import Backend
from dali_lmdb.loaders.bad import OnBad
from dali_lmdb.loaders.settings import DaliSettings, Decode, DecodeDevice
from dali_lmdb.plan.augment import EvalTransform, Interpolation, TrainTransform
from dali_lmdb.threads import MAX_THREADS
from dali_lmdb.train import checkpoint, models, schedule, weights
from dali_lmdb.train.schedule import Scheduler

__all__ = [
    "RANGES",
    "DeviceChoice",
    "LearningRate",
    "Optimizer",
    "Precision",
    "Range",
    "TrainSettings",
    "TrainShuffle",
]

DeviceChoice = Literal["auto", "cuda", "cpu"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
TrainShuffle = Literal["full", "block"]
Optimizer = Literal["sgd", "sgd_nesterov", "adamw"]
LearningRate = float | Literal["auto"]

_LR_BASES = {
    "sgd": 0.1,  # Goyal et al. 2017, section 2.1
    "sgd_nesterov": 0.1,
    "adamw": 2.5e-4,  # Touvron et al. 2021 (DeiT), section 6: 5e-4 for 512
}
_LR_RECORDS = 256  # for which the above are


class Range(NamedTuple):
    """Values that a setting may have; none of them is infinite or not a number."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value lies in it."""
        return (
            math.isfinite(value)
            and (self.low < value or (value == self.low and not self.low_open))
            and (value < self.high or (value == self.high and not self.high_open))
        )

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"a finite number {'above' if self.low_open else 'of at least'} {self.low:g}"
        return f"{self.low:g} to {'below ' if self.high_open else ''}{self.high:g}"


_FRACTION = Range(0, 1)

RANGES = {
    "epochs": Range(1),
    "batch_size": Range(1),
    "accumulate": Range(1),
    "lr": Range(0, low_open=True),
    "lr_base": Range(0, low_open=True),
    "lr_warmup_epochs": Range(0),
    "lr_step_size": Range(0, low_open=True),
    "lr_gamma": _FRACTION,
    "momentum": Range(0, 1, high_open=True),
    "weight_decay": Range(0),
    "norm_weight_decay": Range(0),
    "label_smoothing": Range(0, 1, high_open=True),
    "mixup_alpha": Range(0),
    "cutmix_alpha": Range(0),
    "model_ema_decay": Range(0, 1, high_open=True),
    "clip_grad_norm": Range(0),
    "size": Range(1),
    "start_size": Range(1),
    "val_size": Range(1),
    "val_resize": Range(1),
    "crop_scale": Range(0, 1, low_open=True),
    "hflip": _FRACTION,
    "color_jitter": Range(0),
    "hue": Range(0, 0.5),
    "grayscale": _FRACTION,
    "random_erase": _FRACTION,
    "workers": Range(0, MAX_THREADS),
    "hw_decoder_load": _FRACTION,
    "prefetch_queue_depth": Range(1, MAX_THREADS),
    "readahead_bytes": Range(0),
    "seed": Range(0, 2**63 - 1),
    "checkpoint_every": Range(0),
    "keep": Range(0),
    "log_every": Range(1),
    "profile": Range(0),
}
"""What numbers each setting may have, by its name."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of one training run. Plain values only, to be sent to ranks and saved in checkpoints."""

    train: str
    """Store to train on, or a folder of class folders with ``backend="torch"``."""
    val: str
    """Store or folder to evaluate on after each epoch, with the same classes as ``train``."""
    arch: str = "resnet50"
    """Any torchvision classification model, or ``"MODULE:FUNCTION"``, which is called with ``num_classes``."""
    weights: str | None = None
    """Weights to begin with, see ``find_weights``; None: random ones, or those that ``MODULE:FUNCTION`` sets."""
    backend: Backend = "dali"
    """``"dali"`` decodes with DALI, ``"torch"`` with Pillow in DataLoader workers (the classic CPU path)."""
    device: DeviceChoice = "auto"
    """``"cuda"``: a GPU per rank, NCCL. ``"cpu"``: gloo. ``"auto"``: GPUs if there are any."""
    precision: Precision = "auto"
    """``"auto"``: mixed bfloat16 on GPUs that support it, mixed float16 on others, float32 on the CPU."""
    epochs: int = 90
    """Number of training epochs."""
    batch_size: int = 256
    """Records that one rank processes at once."""
    accumulate: int = 1
    """Number of batches of a rank whose gradients make one step."""

    opt: Optimizer = "sgd_nesterov"
    """The optimizer."""
    lr: LearningRate = "auto"
    """Peak learning rate. ``"auto"``: ``lr_base`` for every 256 records of a step, over all ranks."""
    lr_base: float | None = None
    """See ``lr``; None: 0.1 for SGD, 2.5e-4 for AdamW."""
    lr_scheduler: Scheduler = "cosine"
    """How the rate falls after the warm-up: to 0 on half a cosine or linearly, or by ``lr_gamma`` in steps."""
    lr_warmup_epochs: float | None = None
    """Epochs in which the rate rises linearly from 0; None: 5 % of the run."""
    lr_step_size: float = 30
    """Epochs between two steps of ``lr_scheduler="step"``."""
    lr_gamma: float = 0.1
    """Factor of each step of ``lr_scheduler="step"``."""
    momentum: float = 0.9
    """SGD momentum; the first beta of AdamW."""
    weight_decay: float = 1e-4
    norm_weight_decay: float = 0.0
    """Weight decay of normalisation layers and of biases."""
    label_smoothing: float = 0.0
    mixup_alpha: float = 0.0
    """Mixup's Beta distribution; 0: no mixup. Where cutmix is on too, each batch has one of the two."""
    cutmix_alpha: float = 0.0
    """Cutmix's Beta distribution; 0: no cutmix."""
    model_ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights in one step, less in the first steps; 0: none."""
    clip_grad_norm: float = 0.0
    """Largest norm of all gradients together; 0: no limit."""
    zero_init_residual: bool = False
    """Start with residual blocks that pass their input through (torchvision's ResNets): the weights of the last
    normalisation of each are 0."""
    sync_bn: bool = False
    """Normalise batches over all ranks instead of each rank's own."""
    compile: bool = False
    """Train through ``torch.compile``."""

    size: int = 224
    """Height and width of the training images in pixels."""
    start_size: int | None = None
    """Size in the first epochs, which then grows to ``size``, see ``schedule.sizes``; None: always ``size``."""
    val_size: int | None = None
    """Height and width of the validation images in pixels; None: ``size``."""
    val_resize: int | None = None
    """Length of the validation images' shorter side before the central crop; None: ``val_size`` * 256 / 224."""
    interpolation: Interpolation = "linear"
    """Resizing filter, for training and validation."""
    crop_scale: float = 0.08
    """Smallest fraction of an image's area that a training crop covers."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Strength of random changes of brightness, contrast and saturation."""
    hue: float = 0.0
    """Strength of random changes of the hue, at most 0.5."""
    grayscale: float = 0.0
    """Probability of conversion to grey."""
    random_erase: float = 0.0
    """Probability that a rectangle is erased."""

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
    tensorboard: str | None = None
    """Folder for TensorBoard's event files."""
    profile: int = 0
    """Number of steps of each rank that are recorded to ``trace-RANK.json.gz`` in ``output``."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name}: {getattr(self, name)!r}, expected one of {', '.join(get_args(choices))}"
                )
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is not None and value != "auto" and not allowed.holds(value):
                raise ValueError(f"{name}: {value}, expected {allowed}")
        if self.backend == "dali" and self.workers == 0:
            raise ValueError("workers: 0, DALI needs at least 1 thread")
        _ = self.dali  # raises ValueError for a bad value
        if self.val_resize is not None and self.val_resize < (self.val_size or self.size):
            raise ValueError(
                f"val_resize: {self.val_resize}, expected at least {self.val_size or self.size}, val_size"
            )
        if self.opt == "sgd_nesterov" and self.momentum == 0:
            raise ValueError("momentum: 0, Nesterov's needs more; set opt to sgd")
        if self.lr_warmup_epochs is not None and self.lr_warmup_epochs >= self.epochs:
            raise ValueError(
                f"lr_warmup_epochs: {self.lr_warmup_epochs:g}, expected fewer than {self.epochs} epochs"
            )
        for option in ("resume", "checkpoint_every", "keep", "profile"):
            if self.output is not None or not getattr(self, option):
                continue
            raise ValueError(f"{option}: there is no output folder for a checkpoint; set output")
        models.check_arch(self.arch)
        if self.weights is not None:
            weights.check_name(self.weights, arch=self.arch)
        if self.zero_init_residual:
            models.check_zero_init(self.arch)

    def peak_lr(self, world_size: int) -> float:
        """The peak learning rate; ``lr`` unless that is ``"auto"``."""
        if self.lr != "auto":
            return self.lr
        base = _LR_BASES[self.opt] if self.lr_base is None else self.lr_base
        return base * self.batch_size * self.accumulate * world_size / _LR_RECORDS

    @property
    def train_transform(self) -> TrainTransform:
        """How training images are augmented."""
        sizes = schedule.sizes(self.start_size or self.size, self.size, epochs=self.epochs)
        return TrainTransform(
            size=sizes[0][1],
            size_schedule=sizes[1:],
            interpolation=self.interpolation,
            scale=(self.crop_scale, 1.0),
            flip=self.hflip,
            brightness=self.color_jitter,
            contrast=self.color_jitter,
            saturation=self.color_jitter,
            hue=self.hue,
            grayscale=self.grayscale,
            erase=self.random_erase,
        )

    @property
    def val_transform(self) -> EvalTransform:
        """How validation images are cut."""
        size = self.val_size or self.size
        resize = self.val_resize or round(size * 256 / 224)  # 256 is usual with 224
        return EvalTransform(size=size, resize=resize, interpolation=self.interpolation)

    def changed(self) -> dict[str, Any]:
        """The settings that are not the default ones, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

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


_CHOICES = {
    "backend": Backend,
    "device": DeviceChoice,
    "precision": Precision,
    "shuffle": TrainShuffle,
    "on_bad": OnBad,
    "opt": Optimizer,
    "lr_scheduler": Scheduler,
    "interpolation": Interpolation,
}
