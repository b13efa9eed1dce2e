"""Rank and world size of torch.distributed's process group."""

from __future__ import annotations

import logging
import os

import torch.distributed

__all__ = ["process_group", "warn_without_group"]

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
