"""The loaders of a rank's training and validation data, opened with the settings of a run."""

from __future__ import annotations

import torch

from dali_lmdb.loaders.backends import open_loader
from dali_lmdb.loaders.base import Loader
from dali_lmdb.threads import threads_per_rank
from dali_lmdb.torchrun import RankEnvironment
from dali_lmdb.train.crashes import in_flight_path
from dali_lmdb.train.settings import TrainSettings

__all__ = ["open_data"]


def open_data(
    settings: TrainSettings,
    *,
    training: bool,
    ranks: RankEnvironment,
    device: torch.device,
    precision: torch.dtype,
    return_index: bool = False,
) -> Loader:
    """Open the loader of a rank's training or validation data.

    Args:
        precision: what the model computes in, see ``choose_precision``.
        return_index: see ``DaliLoader``.
    """
    on_gpu = device.type == "cuda"
    return open_loader(
        settings.train if training else settings.val,
        backend=settings.backend,
        workers=threads_per_rank(ranks.ranks_per_node) if settings.workers is None else settings.workers,
        transform=settings.train_transform if training else settings.val_transform,
        batch_size=settings.batch_size,
        device="cuda" if on_gpu else "cpu",
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=settings.seed,
        shuffle=settings.shuffle if training else "none",
        on_bad=settings.on_bad,
        quarantine=settings.quarantine,
        dali=settings.dali,
        in_flight_file=None
        if settings.output is None
        else in_flight_path(settings.output, "train" if training else "val", ranks.rank),
        return_index=return_index,
        # Half the memory traffic where the model computes in 16 bits anyway.
        dtype="float32" if precision is torch.float32 else "float16",
        layout="NHWC" if on_gpu else "NCHW",
    )
