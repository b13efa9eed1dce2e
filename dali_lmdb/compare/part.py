"""Settings and records of the benchmarks without decoding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dali_lmdb.errors import StoreError
from dali_lmdb.plan.order import epoch_order
from dali_lmdb.plan.sampling import Listed
from dali_lmdb.store import Store

__all__ = ["ReadingSettings", "shuffled_part"]

_PART_SEED = 0x70617274  # not the epochs' seed, so that their order is independent of this choice


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """Settings of a benchmark that does not decode.

    Raises:
        ValueError: a setting is out of range.
    """

    batch_size: int = 256
    """Number of records per step, at most ``records``."""
    rounds: int = 5
    """Number of measured rounds."""
    seconds: float = 5.0
    """Length of a window, in seconds."""
    records: int = 10_000
    """Number of records to read, chosen at random, at most all; they must fit in the page cache."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.rounds < 1 or self.records < 1:
            raise ValueError(
                f"batch_size {self.batch_size}, rounds {self.rounds}, records {self.records}: "
                "expected at least 1 each"
            )
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}, expected more than 0")

    def fitted_to(self, store: Store) -> ReadingSettings:
        """These settings with at most as many records as the store has.

        Raises:
            StoreError: the store is empty.
        """
        if len(store) == 0:
            raise StoreError(f"{store.path}: no records to read; convert a folder with images in it")
        records = min(self.records, len(store))
        return replace(self, records=records, batch_size=min(self.batch_size, records))


def shuffled_part(store: Store, num_records: int) -> Listed:
    """A uniform random sample of the store's records, in a different order in each epoch."""
    records = epoch_order(len(store), seed=_PART_SEED, epoch=0)(np.arange(num_records))
    return Listed(records, seed=0, shuffle="full")
