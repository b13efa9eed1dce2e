"""Learning rate and image size over a run: pure functions of the place in it."""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["WARM_UP", "Scheduler", "learning_rate", "sizes"]

Scheduler = Literal["cosine", "linear", "step"]

WARM_UP = 0.05  # fraction of the run: 4.5 of 90 epochs; Goyal et al. 2017 (section 2.2) warm up for 5 of 90

# FFCV's 16 epochs on ImageNet grow after the 11th until the 13th, by multiples of 32 pixels.
_GROWS_FROM, _GROWS_UNTIL, _SIZE_STEP = 11 / 16, 13 / 16, 32


def learning_rate(
    epoch: float,
    *,
    epochs: int,
    highest: float,
    scheduler: Scheduler = "cosine",
    warmup_epochs: float | None = None,
    step_size: float = 30,
    gamma: float = 0.1,
) -> float:
    """Linear warm-up, then the schedule.

    Args:
        epoch: place in the run, 0 to ``epochs``. It is counted in records, not in steps, so that a run resumed on
            another number of ranks follows the same curve.
        scheduler: ``"cosine"``, ``"linear"``: down to 0; ``"step"``: ``gamma`` every ``step_size`` epochs.
        warmup_epochs: None for ``WARM_UP`` of the run.
    """
    warm_up = WARM_UP * epochs if warmup_epochs is None else warmup_epochs
    if epoch < warm_up:
        return highest * epoch / warm_up
    if scheduler == "step":
        return highest * gamma ** math.floor(epoch / step_size)
    done = (epoch - warm_up) / (epochs - warm_up)
    return highest * (1 - done if scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def sizes(first: int, last: int, *, epochs: int) -> tuple[tuple[int, int], ...]:
    """Training sizes that grow late in the run, in multiples of 32 pixels, as FFCV's.

    Returns:
        (epoch, size): from that epoch on, images have that height and width, in pixels; epoch 0 first.
    """
    pairs = [(0, first)]
    for epoch in range(epochs):
        done = (epoch / epochs - _GROWS_FROM) / (_GROWS_UNTIL - _GROWS_FROM)
        between = round((first + (last - first) * done) / _SIZE_STEP) * _SIZE_STEP
        size = first if done <= 0 else last if done >= 1 else min(max(between, min(first, last)), max(first, last))
        if size != pairs[-1][1]:
            pairs.append((epoch, size))
    return tuple(pairs)
