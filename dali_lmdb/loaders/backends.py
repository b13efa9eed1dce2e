"""The backends of the trainer and the comparison, opened by name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Literal

from dali_lmdb.loaders.bad import OnBad
from dali_lmdb.loaders.base import Loader
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.settings import DaliSettings, Device, Dtype, Layout
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import Transform
from dali_lmdb.plan.order import LastBatch, Shuffle
from dali_lmdb.store import Store

__all__ = ["Backend", "open_loader"]

Backend = Literal["dali", "torch"]

_DALI_DEFAULTS = DaliSettings()


def open_loader(
    data: Store | str | os.PathLike[str],
    *,
    backend: Backend,
    workers: int,
    transform: Transform,
    batch_size: int,
    device: Device,
    rank: int,
    world_size: int,
    seed: int = 0,
    shuffle: Shuffle | None = None,
    sampler: Iterable[int] | None = None,
    last_batch: LastBatch | None = None,
    dtype: Dtype = "float32",
    layout: Layout = "NCHW",
    on_bad: OnBad = "raise",
    quarantine: str | os.PathLike[str] | None = None,
    dali: DaliSettings = _DALI_DEFAULTS,
    in_flight_file: str | os.PathLike[str] | None = None,
    return_index: bool = False,
) -> Loader:
    """Make the loader of a backend; arguments and errors are those of ``DaliLoader`` and ``TorchLoader``.

    Args:
        backend: ``"dali"`` or ``"torch"``.
        workers: DALI's threads, or the worker processes of a ``DataLoader``.
        dali: the arguments that only ``DaliLoader`` has; ``workers`` takes the place of its ``num_threads``.
        in_flight_file: another of these.
    """
    if backend == "dali":
        return DaliLoader(
            data,
            num_threads=workers,
            prefetch_queue_depth=dali.prefetch_queue_depth,
            hw_decoder_load=dali.hw_decoder_load,
            readahead_bytes=dali.readahead_bytes,
            decode=dali.decode,
            decode_device=dali.decode_device,
            preallocation_bytes=dali.preallocation_bytes,
            resize=dali.resize,
            decode_scale=dali.decode_scale,
            transform=transform,
            batch_size=batch_size,
            device=device,
            rank=rank,
            world_size=world_size,
            seed=seed,
            shuffle=shuffle,
            sampler=sampler,
            last_batch=last_batch,
            dtype=dtype,
            layout=layout,
            on_bad=on_bad,
            quarantine=quarantine,
            return_index=return_index,
            in_flight_file=in_flight_file,
        )
    return TorchLoader(
        data,
        num_workers=workers,
        transform=transform,
        batch_size=batch_size,
        device=device,
        rank=rank,
        world_size=world_size,
        seed=seed,
        shuffle=shuffle,
        sampler=sampler,
        last_batch=last_batch,
        dtype=dtype,
        layout=layout,
        on_bad=on_bad,
        quarantine=quarantine,
        return_index=return_index,
    )
