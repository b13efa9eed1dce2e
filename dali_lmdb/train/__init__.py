"""Distributed training of torchvision's classification models from a store.

``settings`` and ``models`` define what is trained, ``preflight`` checks that it can be, ``distributed`` starts the
ranks and connects them, ``trainer`` trains and evaluates, ``metrics`` measures and logs, and ``checkpoint`` saves.
The command is ``python -m dali_lmdb.train``; each of its ranks runs :func:`~dali_lmdb.train.trainer.train`.
"""

from dali_lmdb.train.settings import TrainSettings
from dali_lmdb.train.trainer import train

__all__ = ["TrainSettings", "train"]
