"""Settings of the loaders, validated where they are made."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from dali_lmdb.errors import DeviceError
from dali_lmdb.loaders.bad import OnBad
from dali_lmdb.loaders.prefetch import READAHEAD_BYTES
from dali_lmdb.plan.augment import EvalTransform, TrainTransform, Transform
from dali_lmdb.plan.order import LastBatch, Shuffle
from dali_lmdb.threads import MAX_THREADS

if TYPE_CHECKING:
    import torch

__all__ = [
    "DaliSettings",
    "Decode",
    "DecodeDevice",
    "DecodeScale",
    "Device",
    "Dtype",
    "Layout",
    "LoaderSettings",
    "Resize",
]

Device = Literal["cuda", "cpu"]
Dtype = Literal["float32", "float16", "uint8"]
Layout = Literal["NCHW", "NHWC"]
Decode = Literal["auto", "image", "window"]
DecodeDevice = Literal["gpu", "cpu"]
DecodeScale = Literal["exact", "fast"]
Resize = Literal["auto", "dali", "torch"]


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """The arguments that ``DaliLoader`` and ``TorchLoader`` share; ``DaliLoader`` documents them.

    Raises:
        ValueError: an argument is out of range.
        DeviceError: ``device="cuda"`` without a usable GPU.
    """

    transform: Transform
    batch_size: int
    device: Device | str | torch.device
    rank: int | None
    world_size: int | None
    seed: int
    shuffle: Shuffle | bool | None
    sampler: Iterable[int] | None
    weights: Sequence[float] | npt.NDArray[np.float64] | None
    last_batch: LastBatch | None
    dtype: Dtype
    layout: Layout
    on_bad: OnBad
    quarantine: str | os.PathLike[str] | None
    return_index: bool
    device_id: int | None = field(init=False, default=None)
    """Number of the GPU; None on the CPU."""
    is_current_device: bool = field(init=False, default=False)
    """Whether it was chosen as torch's current one, not named."""

    def __post_init__(self) -> None:

        if not isinstance(self.transform, (TrainTransform, EvalTransform)):
            raise ValueError(f"transform is {self.transform!r}, expected a TrainTransform or an EvalTransform")
        if self.dtype not in ("float32", "float16", "uint8"):
            raise ValueError(f"dtype is {self.dtype!r}, expected 'float32', 'float16' or 'uint8'")
        if self.layout not in ("NCHW", "NHWC"):
            raise ValueError(f"layout is {self.layout!r}, expected 'NCHW' or 'NHWC'")
        if self.on_bad not in ("raise", "substitute"):
            raise ValueError(f"on_bad is {self.on_bad!r}, expected 'raise' or 'substitute'")
        self._resolve_device()
        for name in ("seed", "batch_size"):  # accepts numpy's integers; TypeError for anything else
            object.__setattr__(self, name, operator.index(getattr(self, name)))
        if (self.rank is None) != (self.world_size is None):
            raise ValueError(f"rank is {self.rank} and world_size {self.world_size}; give both or neither")

    def _resolve_device(self) -> None:
        """Split ``device``, a name or torch's object, into kind and number."""
        import torch

        try:
            device = None if isinstance(self.device, bool) else torch.device(self.device)
        except (RuntimeError, TypeError):
            device = None
        if device is None or device.type not in ("cuda", "cpu"):
            raise ValueError(f"device is {self.device!r}, expected 'cuda', 'cuda:N' or 'cpu'")
        object.__setattr__(self, "device", device.type)
        if device.type == "cpu":
            return
        if not torch.cuda.is_available():
            raise DeviceError(f"device '{device}': no usable GPU found; install its driver or use device 'cpu'")
        number = torch.cuda.current_device() if device.index is None else device.index
        if number >= torch.cuda.device_count():
            raise DeviceError(f"device '{device}': only GPUs 0 to {torch.cuda.device_count() - 1} found")
        object.__setattr__(self, "device_id", number)
        object.__setattr__(self, "is_current_device", device.index is None)

    @property
    def is_training(self) -> bool:
        """True if images are augmented, which decides the defaults of ``shuffle`` and ``last_batch``."""
        return isinstance(self.transform, TrainTransform)


@dataclass(frozen=True, kw_only=True)
class DaliSettings:
    """The arguments that only ``DaliLoader`` has; it documents them.

    Raises:
        ValueError: an argument is out of range.
    """

    readahead_bytes: int = READAHEAD_BYTES
    num_threads: int | None = None
    prefetch_queue_depth: int = 2
    # DALI's own default. Other good values were found between 0.12 and 0.75, depending on GPU and CPU threads.
    hw_decoder_load: float = 0.65
    decode: Decode = "auto"
    decode_device: DecodeDevice | None = None
    preallocation_bytes: int = 1 << 30
    resize: Resize = "auto"
    decode_scale: DecodeScale = "exact"

    def __post_init__(self) -> None:
        for name in ("num_threads", "prefetch_queue_depth"):
            if (value := getattr(self, name)) is not None and not 1 <= value <= MAX_THREADS:
                raise ValueError(f"{name} is {value}, expected 1 to {MAX_THREADS}")
        if self.readahead_bytes < 0:
            raise ValueError(f"readahead_bytes is {self.readahead_bytes}, expected at least 0, which turns it off")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load is {self.hw_decoder_load}, expected 0 to 1")
        if self.decode not in ("auto", "image", "window"):
            raise ValueError(f"decode is {self.decode!r}, expected 'auto', 'image' or 'window'")
        if self.decode_device not in (None, "gpu", "cpu"):
            raise ValueError(f"decode_device is {self.decode_device!r}, expected 'gpu', 'cpu' or None")
        if self.resize not in ("auto", "dali", "torch"):
            raise ValueError(f"resize is {self.resize!r}, expected 'auto', 'dali' or 'torch'")
        if self.decode_scale not in ("exact", "fast"):
            raise ValueError(f"decode_scale is {self.decode_scale!r}, expected 'exact' or 'fast'")
        if self.preallocation_bytes < 0:
            raise ValueError(f"preallocation_bytes is {self.preallocation_bytes}, expected at least 0")
