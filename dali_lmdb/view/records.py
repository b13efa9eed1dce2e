"""Which records of a store are shown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dali_lmdb.disk import os_errors
from dali_lmdb.errors import StateError, one_line
from dali_lmdb.plan.order import Shuffle, epoch_order
from dali_lmdb.store import Store
from dali_lmdb.store.regular import check_regular

__all__ = ["Named", "check_any", "checked", "first_of_epoch", "in_report", "sample"]

_AT_ONCE = 8192  # positions of an epoch


class Named(NamedTuple):
    """An image that a report names."""

    record: int | None
    """None: not in the store."""
    name: str
    reason: str


def checked(store: Store, records: Sequence[int]) -> list[int]:
    """The records, each once.

    Raises:
        ValueError: the store has no such record.
    """
    for record in records:
        if not 0 <= record < len(store):
            raise ValueError(f"{store.path}: no record {record}, expected 0 to {len(store) - 1}")
    return list(dict.fromkeys(records))


def check_any(store: Store, records: Sequence[int]) -> None:
    """Raise ValueError if there are no records."""
    if not records:
        raise ValueError(f"{store.path}: no records, expected some; choose another store or class")


def sample(store: Store, count: int, *, seed: int) -> list[int]:
    """Some records, the same for the same seed, in the store's order."""
    count = min(count, len(store))
    order = epoch_order(len(store), seed=seed, epoch=0, shuffle="full")
    chosen: list[int] = np.sort(order(np.arange(count))).tolist()
    return chosen


def first_of_epoch(
    store: Store, count: int, *, seed: int, epoch: int, shuffle: Shuffle, classes: Sequence[str] = ()
) -> list[int]:
    """The records with which an epoch begins.

    Args:
        classes: only records of these; none: of all.

    Raises:
        ValueError: the store has no such class.
    """
    labels = [_label(store, name) for name in classes]
    found: list[int] = []
    for records in _in_order(store, seed=seed, epoch=epoch, shuffle=shuffle):
        if labels:
            records = records[np.isin(store.gather("label", records), labels)]
        found += records.tolist()
        if len(found) >= count:
            break
    return found[:count]


def _in_order(store: Store, *, seed: int, epoch: int, shuffle: Shuffle) -> Iterator[npt.NDArray[np.int64]]:
    if len(store):
        order = epoch_order(len(store), seed=seed, epoch=epoch, shuffle=shuffle)
        for start in range(0, len(store), _AT_ONCE):
            yield order(np.arange(start, min(start + _AT_ONCE, len(store))))


def _label(store: Store, name: str) -> int:
    try:
        return store.classes.index(name)
    except ValueError:
        raise ValueError(f"{store.path}: no class {name!r}; dali-lmdb info --json lists its classes") from None


def in_report(store: Store, path: str | os.PathLike[str]) -> list[Named]:
    """The images that a report names: ``STORE.bad.tsv`` of ``convert``, or the file of a ``quarantine``.

    Files that ``convert`` left out, since they are no images by name or place, do not count; nor do a quarantine's
    records of other stores.

    Raises:
        StateError: it cannot be read.
        ValueError: it is neither of the two.
    """
    with os_errors(path, "cannot be read", StateError):
        check_regular(path, error=StateError)
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    try:
        if lines[:1] == ["name\treason"]:
            return _of_converter(store, lines[1:])
        return _of_quarantine(store, lines)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{os.fspath(path)}: expected STORE.bad.tsv of convert or a quarantine file: {error}"
        ) from error


def _of_converter(store: Store, lines: Sequence[str]) -> list[Named]:
    bad: dict[str, str] = {}
    for line in lines:
        name, reason = line.split("\t")
        if not reason.startswith("left out: "):
            bad[name] = reason
    records = {name: record for record, name in enumerate(map(one_line, store.names().to_pylist())) if name in bad}
    return [Named(records.get(name), name, reason) for name, reason in bad.items()]


def _of_quarantine(store: Store, lines: Sequence[str]) -> list[Named]:
    found: dict[int, Named] = {}
    for line in lines:
        values = json.loads(line)
        record, name = int(values["index"]), str(values["name"])
        if 0 <= record < len(store) and store.name(record) == name:
            found[record] = Named(record, name, str(values["cause"]))
    return list(found.values())
