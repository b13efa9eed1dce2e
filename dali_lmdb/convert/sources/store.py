"""A store as a source: to re-encode its images, to shard it differently, to take a part of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dali_lmdb.convert.sources.base import Item, Source
from dali_lmdb.errors import RecordError, SourceError, StoreDamagedError, StoreError
from dali_lmdb.store import Store, open_store

__all__ = ["StoreSource", "class_names"]


class StoreSource(Source):
    """Records of a store, in its order, with its names; a subset is selected again on every pass, not held.

    Args:
        store: a store or its path.
        classes: take only these classes, by name; they keep the store's order and are renumbered.
        per_class: take only the first ``per_class`` records of each class.
        records_at_a_time: records whose labels are read together.

    Raises:
        StoreError: the store cannot be opened.
        SourceError: it has no class of that name, or no record is selected.
        ValueError: ``per_class`` is less than 1.
    """

    kind = "store"

    def __init__(
        self,
        store: Store | str | os.PathLike[str],
        *,
        classes: Sequence[str] | None = None,
        per_class: int | None = None,
        records_at_a_time: int = 1 << 16,
    ) -> None:
        if per_class is not None and per_class < 1:
            raise ValueError(f"per_class is {per_class}, expected at least 1")
        self._store = store if isinstance(store, Store) else open_store(store)
        self._per_class, self._records_at_a_time = per_class, records_at_a_time
        known = self._store.classes
        wanted = set(known if classes is None else classes)
        unknown = sorted(wanted - set(known))
        if unknown:
            raise SourceError(
                f"{self._store.path}: no class {', '.join(map(repr, unknown[:5]))}; it has {len(known)}: "
                f"{', '.join(map(repr, known[:5]))}{', ...' if len(known) > 5 else ''}; choose from these"
            )
        self._classes = [name for name in known if name in wanted]
        self._takes_all_classes = len(self._classes) == len(known)
        label_of = {name: label for label, name in enumerate(self._classes)}
        self._new_labels = np.array([label_of.get(name, -1) for name in known], dtype=np.int32)
        self._count = sum(len(records) for records, _ in self._taken())
        if self._count == 0:
            raise SourceError(f"{self._store.path}: no records to take; choose other classes")

    @property
    def classes(self) -> list[str]:
        return self._classes

    def items(self) -> Iterator[Item]:
        for records, labels in self._taken():
            for index, label in zip(records.tolist(), labels.tolist(), strict=True):
                yield Item(self._store.name(index), label, partial(self._read, index))

    def count(self) -> int:
        return self._count

    def identity(self) -> dict[str, Any]:
        return {
            "path": os.path.abspath(self._store.path),
            "images": self._count,
            "fingerprint": self._store.fingerprint,
            "classes": None if self._takes_all_classes else self._classes,
            "per_class": self._per_class,
        }

    def _taken(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]]:
        """Yield the indices and new labels of the selected records, ascending, in batches."""
        num_classes = len(self._new_labels)
        num_before = np.zeros(num_classes, dtype=np.int64)  # records of each class in earlier runs
        for start in range(0, len(self._store), self._records_at_a_time):
            records = np.arange(start, min(start + self._records_at_a_time, len(self._store)))
            labels = self._store.gather("label", records)
            if not 0 <= labels.min() <= labels.max() < num_classes:
                raise StoreDamagedError(f"{self._store.path}: damaged: a label without a class; convert it again")
            new_labels = self._new_labels[labels]
            taken = new_labels >= 0
            if self._per_class is not None:
                taken &= num_before[labels] + _rank_in_class(labels) < self._per_class
                num_before += np.bincount(labels, minlength=num_classes)
            yield records[taken], new_labels[taken]
            self._store.release_pages()

    def _read(self, index: int) -> bytes:
        try:
            return next(self._store.checked_copies(range(index, index + 1)))
        except (StoreError, RecordError) as error:
            raise SourceError(str(error)) from error


def class_names(texts: Iterable[str], classes: Iterable[str]) -> list[str]:
    """Split class names that were given one by one or joined by commas.

    Args:
        texts: a text that is the name of a class is kept, even if it has commas; others are split at commas.
        classes: the store's classes.
    """
    known = set(classes)
    return [name for text in texts for name in ([text] if text in known else text.split(","))]


def _rank_in_class(labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Number of records of the same label before each record, int64 of shape (n,)."""
    by_label = np.argsort(labels, kind="stable")
    ranked = labels[by_label]
    first = np.searchsorted(ranked, ranked)  # where each label begins
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_label] = np.arange(len(labels)) - first
    return ranks
