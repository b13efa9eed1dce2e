"""A store repeated several times, as if it were a larger one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dali_lmdb.store import Store

__all__ = ["RepeatedStore"]


class RepeatedStore(Store):
    """The records of ``store``, repeated ``times`` times: record i is record i mod len(store).

    Args:
        store: has at least one record.
        times: at least 1.
    """

    def __init__(self, store: Store, *, times: int) -> None:
        self.path = store.path
        self._store = store
        self._times = times

    def __len__(self) -> int:
        return len(self._store) * self._times

    @property
    def classes(self) -> list[str]:
        return self._store.classes

    @property
    def fingerprint(self) -> str:
        return f"{self._store.fingerprint}x{self._times}"

    def column(self, name: str) -> npt.NDArray[Any]:
        return np.tile(self._store.column(name), self._times)

    def gather(self, name: str, records: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        return self._store.gather(name, records % len(self._store))

    def arrays(self, records: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
        return self._store.arrays(records % len(self._store))

    def byte_ranges(
        self, records: npt.NDArray[np.int64]
    ) -> list[tuple[Path, npt.NDArray[np.uint64], npt.NDArray[np.uint32]]]:
        return self._store.byte_ranges(records % len(self._store))

    def name(self, index: int) -> str:
        return self._store.name(self._checked_index(index) % len(self._store))

    def where(self, index: int) -> str:
        return self._store.where(self._checked_index(index) % len(self._store))

    def __reduce__(self) -> Any:
        return partial(RepeatedStore, times=self._times), (self._store,)
