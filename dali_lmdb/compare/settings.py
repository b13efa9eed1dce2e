"""Settings of a comparison, validated where they are made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dali_lmdb.loaders.settings import DaliSettings, Decode, DecodeDevice, Dtype, Layout
from dali_lmdb.plan.augment import EvalTransform, TrainTransform, Transform
from dali_lmdb.train.models import check_arch

__all__ = ["CompareSettings"]


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What to measure, and for how long.

    Raises:
        ValueError: a setting is out of range.
    """

    batch_size: int | None = None
    """Images per step, at most the number of records in the store; None: 256 on a GPU, else 64."""
    train_batch_size: int | None = None
    """The same for the steps of a model; None: ``batch_size`` if that is given or on a GPU, else 8."""
    rounds: int = 5
    """Number of measured windows of each backend."""
    seconds: float = 1.5
    """Length of a window, in seconds; it ends with a batch, so it is a little longer."""
    workers: int | None = None
    """DataLoader worker processes, and threads of DALI's pipeline; None: the cores this process may use."""
    size: int = 224
    """Height and width of the images, in pixels."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where batches are delivered; ``"auto"`` uses the GPU if there is one."""
    decode: Decode = DaliSettings.decode
    """Whether ``DaliLoader`` decodes whole images or crop windows."""
    decode_device: DecodeDevice | None = DaliSettings.decode_device
    """Where DALI decodes; None: on ``device``, and with a GPU also on the CPU, as a backend of its own."""
    hw_decoder_load: float = DaliSettings.hw_decoder_load
    """Fraction of a batch that DALI offers to the GPU's hardware JPEG engine."""
    task: Literal["train", "eval"] = "train"
    """``"train"``: shuffled, random crops and flips; ``"eval"``: in order, central crops."""
    arch: str | None = "auto"
    """torchvision classification model to train: alone, on one batch, and on what ``torch`` and ``dali`` load;
    None: no training. ``"auto"``: resnet18, and None with task ``"eval"``."""
    only: tuple[str, ...] = ()
    """Names of the backends to measure; empty: all that can be."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "train_batch_size", "rounds", "size", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}, expected more than 0")
        if self.device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"device is {self.device!r}, expected 'auto', 'cuda' or 'cpu'")
        if self.task not in ("train", "eval"):
            raise ValueError(f"task is {self.task!r}, expected 'train' or 'eval'")
        if self.arch not in ("auto", None):
            check_arch(self.arch)
            if self.task == "eval":
                raise ValueError("arch needs task 'train'")
        _ = self.dali  # raises ValueError for a bad value

    @property
    def for_training(self) -> CompareSettings:
        """The same, with the batch size of a model's steps."""
        return replace(self, batch_size=self.train_batch_size)

    @property
    def dali(self) -> DaliSettings:
        """The settings of ``DaliLoader``."""
        return DaliSettings(
            decode=self.decode, decode_device=self.decode_device, hw_decoder_load=self.hw_decoder_load
        )

    @property
    def dtype(self) -> Dtype:
        """Type of the images: what a model computes in."""
        return "float16" if self.device == "cuda" else "float32"

    @property
    def layout(self) -> Layout:
        """Layout of the images: what is fastest for convolutions."""
        return "NHWC" if self.device == "cuda" else "NCHW"

    @property
    def transform(self) -> Transform:
        """The transform of the task; evaluation resizes the shorter side to size * 256 / 224."""
        if self.task == "train":
            return TrainTransform(size=self.size)
        return EvalTransform(size=self.size, resize=round(self.size * 256 / 224))
