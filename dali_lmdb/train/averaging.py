"""The exponential moving average of a model's weights."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["average_of"]


def average_of(model: nn.Module, *, decay: float) -> AveragedModel:
    """Make the average of a model's weights and buffers; ``update_parameters`` after each step.

    Args:
        decay: what a step leaves of the average; less in the first steps, (1 + n) / (10 + n) after n, so that the
            average of a short run is not that of its random weights.
    """

    def update(averages: list, values: list, num_averaged: object) -> None:  # type: ignore[type-arg]
        n = int(num_averaged)  # type: ignore[call-overload]
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, values, num_averaged)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
