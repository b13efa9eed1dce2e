"""Mixup and cutmix of a batch, torchvision's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["Mixing", "mixing_of"]

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def mixing_of(*, mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> Mixing | None:
    """Make what mixes the images and labels of a batch, or None if neither is on.

    Mixed labels are probabilities, float of shape (batch, classes). The randomness is torch's default generator's,
    which the trainer seeds for each batch.
    """
    if not mixup_alpha and not cutmix_alpha:
        return None
    from torchvision.transforms import v2  # not above: few runs need it

    kinds = [(v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha)]
    made = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    mix: Mixing = v2.RandomChoice(made)
    return mix
