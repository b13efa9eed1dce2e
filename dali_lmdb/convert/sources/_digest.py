"""Count and hash a source's names and find a repeated one, in bounded memory."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dali_lmdb.convert.sources._names import repeated_name
from dali_lmdb.convert.sources._scratch import ScratchFile
from dali_lmdb.errors import SourceError

__all__ = ["NameDigest", "digest_of", "digest_of_distinct"]

_KEPT_HASHES = 1 << 21  # 16 MB, and as much again while they are sorted
_PARTS = 256  # compared one after the other: 3 MB each for 100 million names
_MAX_SUSPECTS = 1000  # by chance, 100 million different names have one pair of equal hashes in 3,700 cases


@dataclass(frozen=True)
class NameDigest:
    """Number and hash of a sequence of names."""

    num_names: int
    hexdigest: str
    """32 hex digits over all of them."""
    repeated: str | None
    """The first name to come again, or None; any such name if more than a thousand do."""


def digest_of(names: Callable[[], Iterable[str]]) -> NameDigest:
    """Count and hash names, and find one that comes twice.

    Args:
        names: called a second time if a name may come twice, to find it.

    Raises:
        SourceError: there are more than ``_KEPT_HASHES``, and the temporary folder is missing or full.
    """
    total, hashes, num_names = hashlib.sha256(), _Hashes(), 0
    for name in names():
        raw = _encoded(name)
        total.update(raw + b"\n")
        hashes.add(_hash(raw))
        num_names += 1
    suspects = hashes.repeated()
    repeated = None
    if suspects:
        repeated = repeated_name(name for name in names() if _hash(_encoded(name)) in suspects)
    return NameDigest(num_names, total.hexdigest()[:32], repeated)


def digest_of_distinct(names: Callable[[], Iterable[str]], *, where: object) -> NameDigest:
    """``digest_of`` names of records, which must differ.

    Raises:
        SourceError: a name comes twice; or as ``digest_of``.
    """
    digest = digest_of(names)
    if digest.repeated is not None:
        raise SourceError(f"{where}: two images are named {digest.repeated!r}; leave one of them out")
    return digest


class _Hashes:
    """Hashes of names, in memory; beyond ``_KEPT_HASHES``, in sorted runs in a temporary file."""

    def __init__(self) -> None:
        self._kept = array("Q")
        self._file = ScratchFile()
        self._runs: list[npt.NDArray[np.int64]] = []
        """Offsets in the file of each run's parts, and of the end of the last one."""

    def add(self, value: int) -> None:
        self._kept.append(value)
        if len(self._kept) >= _KEPT_HASHES:
            self._write_run()

    def repeated(self) -> set[int]:
        """Hashes that came more than once, at least ``_MAX_SUSPECTS`` of them if there are so many."""
        found: set[int] = set()
        for hashes in self._parts():
            hashes.sort()
            found.update(hashes[1:][hashes[1:] == hashes[:-1]][:_MAX_SUSPECTS].tolist())
            if len(found) >= _MAX_SUSPECTS:
                break
        return found

    def _write_run(self) -> None:
        hashes = np.array(self._kept, dtype=np.uint64)
        hashes.sort()
        inner = np.searchsorted(hashes, np.arange(1, _PARTS, dtype=np.uint64) << np.uint64(56))
        bounds = np.array([0, *inner, len(hashes)], dtype=np.int64)
        self._runs.append(self._file.append(hashes) + bounds * hashes.itemsize)
        self._kept = array("Q")

    def _parts(self) -> Iterator[npt.NDArray[np.uint64]]:
        """Yield all hashes; equal ones are in the same array."""
        if not self._runs:
            yield np.array(self._kept, dtype=np.uint64)
            return
        self._write_run()
        for part in range(_PARTS):
            ends = ((int(bounds[part]), int(bounds[part + 1])) for bounds in self._runs)
            raw = b"".join(self._file.read(start, end - start) for start, end in ends)
            yield np.array(memoryview(raw).cast("Q"), dtype=np.uint64)


def _encoded(name: str) -> bytes:
    return name.encode(errors="surrogateescape")


def _hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
