"""What is read where nothing is decoded: a part of a store's records, in random order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dali_lmdb.errors import StoreError
from dali_lmdb.plan.order import epoch_order
from dali_lmdb.plan.sampling import Listed
from dali_lmdb.store import Store

__all__ = ["ReadingSettings", "shuffled_part"]

_PART_SEED = 0x70617274  # unlike the seed of the epochs, so that their order does not follow the choice


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """What is read, and for how long.

    Raises:
        ValueError: a setting is out of range.
    """

    batch_size: int = 256
    """Records of a step; no more than are read."""
    rounds: int = 5
    """Rounds that count."""
    seconds: float = 5.0
    """Length of a window."""
    records: int = 10_000
    """Records that are read, taken at random; no more than the store has. They must fit in memory."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.rounds < 1 or self.records < 1:
            raise ValueError(
                f"batch_size {self.batch_size}, rounds {self.rounds}, records {self.records}: "
                "expected at least 1 each"
            )
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}, expected more than 0")

    def fitted_to(self, store: Store) -> ReadingSettings:
        """The same with no more records than there are.

        Raises:
            StoreError: there are none.
        """
        if len(store) == 0:
            raise StoreError(f"{store.path}: no records to read; convert a folder with images in it")
        records = min(self.records, len(store))
        return replace(self, records=records, batch_size=min(self.batch_size, records))


def shuffled_part(store: Store, num_records: int) -> Listed:
    """Some records, taken evenly at random from the whole store, in another order in every epoch."""
    records = epoch_order(len(store), seed=_PART_SEED, epoch=0)(np.arange(num_records))
    return Listed(records, seed=0, shuffle="full")
