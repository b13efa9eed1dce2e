"""The exponential moving average of a model's weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["average_of"]

Tensors = tuple[Tensor, ...] | list[Tensor]


def average_of(model: nn.Module, *, decay: float) -> AveragedModel:
    """Make the average of a model's weights and buffers; ``update_parameters`` after each step.

    Args:
        decay: what a step leaves of the average; less in the first steps, (1 + n) / (10 + n) after n, so that the
            average of a short run is not that of its random weights.
    """

    def update(averages: Tensors, values: Tensors, _: Tensor | int) -> None:
        n = int(average.n_averaged)  # on the CPU; to read the copy passed here would wait for the GPU in each step
        now = min(decay, (1 + n) / (10 + n))
        get_ema_multi_avg_fn(now)(averages, values, n)  # type: ignore[no-untyped-call]

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return average
