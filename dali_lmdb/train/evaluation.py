"""Evaluation of a model on one rank's share of the validation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from dali_lmdb.train.precision import arrange, autocast

__all__ = ["evaluate", "top1_of"]


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    add: Callable[..., None],
    precision: torch.dtype,
) -> None:
    """Call ``add`` with the logits of each of this rank's ``batches``, and what the batch has beside its images.

    The model must not be wrapped in DDP: ranks may have different numbers of batches, even none, and the wrapper's
    forward exchanges buffers, which would wait for ranks that have already finished.

    Args:
        add: takes float logits of shape (batch, classes), and labels, int64 of shape (batch,); then, if the loader
            yields them, record indices.
    """
    model.eval()
    with torch.inference_mode():
        for images, *others in batches:
            with autocast(images.device, precision):
                logits = model(arrange(images))
            add(logits, *others)


def top1_of(result: Mapping[str, float]) -> float:
    """The top-1 by which an evaluation is the best one: that of the averaged weights, if there are any.

    It is timm's rule (``train.py`` saves by the averaged model's metrics): whoever averages weights will use them.
    """
    return result.get("ema_val_top1", result["val_top1"])
