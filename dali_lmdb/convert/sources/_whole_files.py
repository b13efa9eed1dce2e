"""Sources made of whole files, which must stay as they were when the source was opened."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from dali_lmdb.convert.sources._digest import NameDigest, digest_of
from dali_lmdb.convert.sources._files import reading
from dali_lmdb.convert.sources.base import Source
from dali_lmdb.errors import SourceError
from dali_lmdb.store.regular import check_regular

__all__ = ["FileSource", "FileState"]


class FileState(NamedTuple):
    """The size and mtime of a file, which show whether it changed."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileState:
        """The state of a file now.

        Raises:
            SourceError: it is missing, cannot be accessed, or is no regular file.
        """
        with reading(path):
            return cls.from_stat(Path(path), check_regular(path, error=SourceError))

    @classmethod
    def from_stat(cls, path: Path, status: os.stat_result) -> FileState:
        """The state of a file according to its ``os.stat``."""
        return cls(path, status.st_size, status.st_mtime_ns)

    def check(self, status: os.stat_result) -> None:
        """Compare with the file's current ``os.stat``.

        Raises:
            SourceError: the file changed.
        """
        if self.from_stat(self.path, status) != self:
            raise SourceError(f"{self.path}: changed meanwhile; convert again when nothing writes to it")


class FileSource(Source):
    """A source identified by the states of its files and the names of its records, which must be distinct.

    Args:
        path: as the user gave it.
        files: the files' states, in order.
    """

    def __init__(self, path: str | os.PathLike[str], files: Sequence[FileState]) -> None:
        self._path, self._files = path, files

    def count(self) -> int:
        return self._names.num_names

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path, size, mtime_ns in self._files:
            digest.update(os.fsencode(f"{os.path.abspath(path)}\0{size}\0{mtime_ns}\n"))
        return {
            "path": os.path.abspath(str(self._path)),
            "files": len(self._files),
            "bytes": sum(file.size for file in self._files),
            "modified_ns": max(file.mtime_ns for file in self._files),
            "state": digest.hexdigest()[:32],
            "images": self.count(),
            "names": self._names.hexdigest,
        }

    @cached_property
    def _names(self) -> NameDigest:
        return self._digest_of_distinct(lambda: (item.name for item in self.items()))

    def _digest_of(self, names: Callable[[], Iterable[str]]) -> NameDigest:
        return digest_of(names, kept_bytes=self.kept_bytes // 4)

    def _digest_of_distinct(self, names: Callable[[], Iterable[str]]) -> NameDigest:
        digest = self._digest_of(names)
        if digest.repeated is not None:
            raise SourceError(f"{self._path}: two images are named {digest.repeated!r}; leave one of them out")
        return digest
