"""Records one by one, as a loader delivers them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dali_lmdb.errors import RecordError
from dali_lmdb.loaders.backends import Backend, open_loader
from dali_lmdb.loaders.settings import DaliSettings, Device
from dali_lmdb.plan.augment import Transform
from dali_lmdb.store import Store
from dali_lmdb.threads import threads_per_rank

__all__ = ["DALI_ARGUMENTS", "Pixels", "Shown", "Way", "deliver", "way_of"]

Pixels = npt.NDArray[np.uint8]
"""An image as a model sees it, before it is normalised: RGB, of shape (height, width, 3)."""
Shown = Pixels | str
"""An image, or why it cannot be decoded."""

_BATCH_SIZE = 32
_DEVICES: dict[str, Device] = {"cpu": "cpu", "gpu": "cuda"}
DALI_ARGUMENTS = ("resize", "decode", "decode_device", "decode_scale")
"""Arguments of ``DaliLoader`` that a way's name may have."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of loading a store."""

    name: str
    backend: Backend
    device: Device
    dali: DaliSettings = field(default_factory=DaliSettings)


def way_of(name: str) -> Way:
    """Read a way's name: ``torch``, ``dali``, ``dali:cpu`` or ``dali:gpu``, and arguments of ``DaliLoader``.

    ``dali`` is on the GPU if there is one. Arguments follow commas: ``dali:cpu,resize=dali``.

    Raises:
        ValueError: there is no such way.
    """
    loader, *arguments = name.split(",")
    backend, _, device = loader.partition(":")
    values: dict[str, Any] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        values[key] = value
    if backend == "torch" and not device and not values:
        return Way(name=name, backend="torch", device="cpu")
    if backend != "dali" or device not in ("", *_DEVICES) or not set(values) <= set(DALI_ARGUMENTS):
        raise ValueError(
            f"{name!r}: no way of loading, expected torch, dali, dali:cpu or dali:gpu; the last three with any of "
            f"{', '.join(f',{key}=...' for key in DALI_ARGUMENTS)}"
        )
    device = device or ("gpu" if torch.cuda.is_available() else "cpu")
    return Way(name=name, backend="dali", device=_DEVICES[device], dali=DaliSettings(**values))


def deliver(
    store: Store,
    records: Sequence[int],
    way: Way,
    *,
    transform: Transform,
    seed: int,
    epoch: int,
    workers: int | None = None,
    batch_size: int = _BATCH_SIZE,
) -> Generator[tuple[int, Shown], None, None]:
    """Yield each record with its image, or with the reason why it cannot be decoded.

    They come in the given order, but for those of batches with one that cannot be decoded, which are loaded again
    one by one and come last.

    Args:
        records: none of them twice.
        workers: as for ``open_loader``; None: this process's share of the cores.

    Raises:
        DeviceError, ValueError: as the loaders.
    """
    if not len(records):
        return
    left = set(records)
    with open_loader(
        store,
        backend=way.backend,
        workers=threads_per_rank() if workers is None else workers,
        transform=transform,
        batch_size=min(batch_size, len(records)),
        device=way.device,
        rank=0,
        world_size=1,
        seed=seed,
        sampler=list(records),
        last_batch="short",
        dtype="uint8",
        dali=way.dali,
        return_index=True,
    ) as loader:
        loader.set_epoch(epoch)
        batches = iter(loader)
        while True:
            try:
                images, _, delivered = next(batches)
            except StopIteration:
                break
            except RecordError as error:
                if error.end is None:  # the next one would be the same batch
                    raise
                continue
            pixels = images.permute(0, 2, 3, 1).cpu().numpy()
            for record, image in zip(delivered.tolist(), pixels, strict=True):
                left.discard(record)
                yield record, np.array(image, order="C")  # a copy: the loader reuses its memory
        bad = {record.index: record.cause for record in loader.bad_records}
    for record in records:
        if record in bad:
            yield record, bad[record]
    again = [record for record in records if record in left and record not in bad]
    if again:
        assert batch_size > 1, f"{store.path}: records {again} were not delivered"
        yield from deliver(
            store, again, way, transform=transform, seed=seed, epoch=epoch, workers=workers, batch_size=1
        )
