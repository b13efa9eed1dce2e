"""How a model computes on a device: precision and memory format."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["arrange", "autocast", "choose_precision"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_precision(name: str, *, device: torch.device) -> torch.dtype:
    """The dtype that a ``Precision`` means on a device."""
    if device.type != "cuda":
        return torch.float32
    if name != "auto":
        return _DTYPES[name]
    # GPUs older than Ampere emulate bfloat16, slowly.
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A context in which a model computes in ``precision``, where that is safe."""
    return torch.autocast(device.type, dtype=precision, enabled=precision is not torch.float32)


def arrange(images: Tensor) -> Tensor:
    """Convert images to the model's memory format; no copy if they already have it."""
    if images.device.type != "cuda":
        return images
    return images.contiguous(memory_format=torch.channels_last)
