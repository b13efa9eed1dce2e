"""Published recipes, as settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["RECIPES", "Recipe"]


class Recipe(NamedTuple):
    """Settings that were published with a result."""

    about: str
    """What it reached, and its source."""
    settings: Mapping[str, Any]
    """By field of ``TrainSettings``."""


RECIPES = {
    "rn50-90": Recipe(
        "76.1 % with ResNet-50; github.com/pytorch/vision, references/classification (8 ranks)",
        {
            "arch": "resnet50",
            "epochs": 90,
            "batch_size": 32,
            "opt": "sgd",
            "lr": "auto",
            "lr_scheduler": "step",
            "lr_warmup_epochs": 0,
            "norm_weight_decay": 1e-4,
        },
    ),
    # Without its BlurPool and its evaluation of both flips.
    "rn50-16": Recipe(
        "73.8 % with ResNet-50; github.com/libffcv/ffcv-imagenet, 16 epochs (8 ranks; with BlurPool too)",
        {
            "arch": "resnet50",
            "epochs": 16,
            "batch_size": 512,
            "opt": "sgd",
            "lr": "auto",
            "lr_base": 0.10625,  # 1.7 for 4,096
            "lr_scheduler": "linear",
            "lr_warmup_epochs": 2,
            "label_smoothing": 0.1,
            "start_size": 160,
            "size": 192,
            "val_size": 256,
            "val_resize": 293,
        },
    ),
    # Without its TrivialAugment and repeated augmentation.
    "rn50-modern": Recipe(
        "80.9 % with ResNet-50; torchvision's weights IMAGENET1K_V2 (8 ranks; with TrivialAugment too)",
        {
            "arch": "resnet50",
            "epochs": 600,
            "batch_size": 128,
            "opt": "sgd",
            "lr": "auto",
            "lr_base": 0.125,  # 0.5 for 1,024
            "lr_warmup_epochs": 5,
            "weight_decay": 2e-5,
            "label_smoothing": 0.1,
            "mixup_alpha": 0.2,
            "cutmix_alpha": 1.0,
            "random_erase": 0.1,
            "model_ema_decay": 0.99997,  # 0.99998 and its adjustment, for each step instead of every 32nd
            "size": 176,
            "val_size": 224,
            "val_resize": 232,
        },
    ),
    "finetune": Recipe(
        "ImageNet's weights, for your classes; pytorch.org's transfer learning tutorial (1 rank)",
        {
            "arch": "resnet18",
            "weights": "DEFAULT",
            "epochs": 25,
            "batch_size": 32,
            "opt": "sgd",
            "lr": "auto",
            "lr_base": 0.064,  # 0.001 for 4
            "lr_scheduler": "step",
            "lr_warmup_epochs": 0,
            "lr_step_size": 7,
            "weight_decay": 0,
        },
    ),
}
