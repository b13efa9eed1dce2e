"""Distributed training of torchvision's classification models from a store.

``settings`` and ``models`` say what is trained, ``distributed`` where (ranks and devices), ``trainer``
how; ``metrics`` counts and logs it and ``checkpoint`` keeps it. The command is
``python -m dali_lmdb.train``; each of its ranks runs :func:`~dali_lmdb.train.trainer.train`.
"""

from dali_lmdb.train.settings import TrainSettings
from dali_lmdb.train.trainer import train

__all__ = ["TrainSettings", "train"]
