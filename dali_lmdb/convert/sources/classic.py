"""A classic database as a source: its records in the order of their keys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from dali_lmdb.convert.sources.base import Item, Source
from dali_lmdb.errors import RecordError, SourceError, StoreError
from dali_lmdb.store.classic import ClassicStore

__all__ = ["ClassicSource"]

_AT_A_TIME = 1024  # records; peeking at one maps up to 64 KB around each of its ends


class ClassicSource(Source):
    """Records of a database made by a script of the folder2lmdb family, see ``ClassicStore``.

    Such a database names neither classes nor files: classes are named by their labels, records
    ``LABEL/KEY.jpg``. Converting reads the file once, without the ``.dali-index`` that training on it needs.

    Raises:
        StoreError: not a classic database, or a damaged one.
    """

    kind = "classic"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._store = ClassicStore(path)
        self._num_seen, self._max_label = 0, -1  # of the records listed so far

    @property
    def classes(self) -> list[str]:
        for index in range(self._num_seen, len(self._store)):  # does nothing once all items were listed
            self._peek(index)
        return [str(label) for label in range(self._max_label + 1)]

    def items(self) -> Iterator[Item]:
        for index in range(len(self._store)):
            label, name = self._peek(index)
            yield Item(name, label, partial(self._read, index))

    def count(self) -> int:
        return len(self._store)

    def identity(self) -> dict[str, Any]:
        status = os.stat(self._store.file)
        return {
            "path": os.path.abspath(self._store.file),
            "images": len(self._store),
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
        }

    def _peek(self, index: int) -> tuple[int, str]:
        """Label and name of a record, from the ends of its value; the image between them is not read."""
        if index % _AT_A_TIME == 0:
            self._store.release_pages()
        label, name = self._store.peek(index)
        if index == self._num_seen:
            self._num_seen, self._max_label = index + 1, max(self._max_label, label)
        return label, name

    def _read(self, index: int) -> bytes:
        try:
            return self._store.copy(index)
        except (StoreError, RecordError) as error:
            raise SourceError(str(error)) from error
