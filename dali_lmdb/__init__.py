"""JPEG data sets in one LMDB file, fed to PyTorch training through NVIDIA DALI.

The names below are imported on first use, so that ``import dali_lmdb`` needs neither torch nor DALI.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from dali_lmdb.errors import DaliLmdbError, RecordError, SourceError, StateError, StoreError

if TYPE_CHECKING:
    from dali_lmdb.loaders.dali_loader import DaliLoader
    from dali_lmdb.loaders.dataset import ImageFolderLMDB
    from dali_lmdb.loaders.normalize import Normalize
    from dali_lmdb.loaders.torch_loader import TorchLoader
    from dali_lmdb.plan.augment import EvalTransform, TrainTransform
    from dali_lmdb.store import Store, open_store

__version__ = "0.1.0"

_LAZY = {
    "DaliLoader": "dali_lmdb.loaders.dali_loader",
    "EvalTransform": "dali_lmdb.plan.augment",
    "ImageFolderLMDB": "dali_lmdb.loaders.dataset",
    "Normalize": "dali_lmdb.loaders.normalize",
    "Store": "dali_lmdb.store",
    "TorchLoader": "dali_lmdb.loaders.torch_loader",
    "TrainTransform": "dali_lmdb.plan.augment",
    "open_store": "dali_lmdb.store",
}

__all__ = [
    "DaliLmdbError",
    "DaliLoader",
    "EvalTransform",
    "ImageFolderLMDB",
    "Normalize",
    "RecordError",
    "SourceError",
    "StateError",
    "Store",
    "StoreError",
    "TorchLoader",
    "TrainTransform",
    "open_store",
]


def _open_standard_descriptors() -> None:
    """Open /dev/null for each closed descriptor among 0 to 2; daemons may start programs with these closed.

    Otherwise a data file would get that number, and the output of C libraries would be written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: open(2) returns the lowest free number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


_open_standard_descriptors()  # before any import that could open files


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
