"""The process group of torch.distributed, and what a loader made before it must check."""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed

from dali_lmdb.loaders.settings import LoaderSettings

__all__ = ["check_device", "process_group", "warn_without_group"]

_log = logging.getLogger("dali_lmdb")


def process_group() -> tuple[int, int] | None:
    """(rank, world size) of the process group, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return None


def warn_without_group() -> None:
    """Warn if the launcher started several ranks, and there is no group of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _log.warning(
            "WORLD_SIZE is %s, but torch.distributed is not initialised: this loader reads the records of all "
            "ranks; call init_process_group before its first batch, or give rank and world_size",
            os.environ["WORLD_SIZE"],
        )


def check_device(settings: LoaderSettings) -> None:
    """Refuse the GPU that was torch's current one before the ranks chose theirs.

    Raises:
        RuntimeError: this rank's GPU is another one.
    """
    if settings.is_current_device and torch.cuda.current_device() != settings.device_id:
        raise RuntimeError(
            f"this loader was made for GPU {settings.device_id}, before the process group, and this rank's GPU is "
            f"{torch.cuda.current_device()} now; make it later, or with device='cuda:N'"
        )
