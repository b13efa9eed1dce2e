"""The identity of a data set: a hash of its records and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

__all__ = ["Fingerprint", "fingerprint"]

_RECORDS_AT_ONCE = 1 << 20  # to limit memory


class Fingerprint:
    """Identity of a data set: SHA-256 (first 32 hex digits) over labels and CRCs in record order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, labels: npt.NDArray[np.int32], crc32: npt.NDArray[np.uint32]) -> None:
        """Add the next records, int32 and uint32 of shape (n,); how many at a time makes no difference."""
        for start in range(0, len(labels), _RECORDS_AT_ONCE):
            run = slice(start, start + _RECORDS_AT_ONCE)
            pairs = np.empty(len(labels[run]), dtype=[("label", "<i4"), ("crc32", "<u4")])
            pairs["label"], pairs["crc32"] = labels[run], crc32[run]
            self._digest.update(pairs.data)

    def hexdigest(self) -> str:
        """The fingerprint of all records added so far."""
        return self._digest.hexdigest()[:32]


def fingerprint(parts: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.uint32]]]) -> str:
    """Compute the fingerprint of a data set from the (labels, crc32) of consecutive parts of it."""
    found = Fingerprint()
    for labels, checksums in parts:
        found.add(labels, checksums)
    return found.hexdigest()
