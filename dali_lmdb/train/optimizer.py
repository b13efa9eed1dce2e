"""The optimizer: SGD or AdamW, with a weight decay of its own for normalisation layers and biases."""

from __future__ import annotations

import torch
from torch import nn

from dali_lmdb.train.settings import TrainSettings

__all__ = ["build_optimizer"]


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Make the optimizer of a model; its two groups of parameters are those with and without ``weight_decay``.

    Normalisation layers and biases are the parameters of one dimension, as in timm.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": settings.norm_weight_decay},
    ]
    if settings.opt == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=(settings.momentum, 0.999))  # the step sets lr
    return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, nesterov=settings.opt == "sgd_nesterov")
