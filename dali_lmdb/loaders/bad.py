"""Records that cannot be decoded: named, counted, listed, and replaced by others of their batch."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from dali_lmdb.errors import RecordError, one_line
from dali_lmdb.loaders.lines import write_line
from dali_lmdb.plan.batches import BatchPlan
from dali_lmdb.store import Store

__all__ = ["BadRecord", "BadRecords", "OnBad", "check_quarantine", "nothing_decodes", "substituted"]

OnBad = Literal["raise", "substitute"]

_log = logging.getLogger("dali_lmdb")


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be decoded."""

    index: int
    name: str
    cause: str


class BadRecords:
    """The bad records that a loader has met, and what to do about them.

    Args:
        store: the store that holds them.
        on_bad: ``"raise"`` or ``"substitute"``.
        quarantine: a file to which each bad record is appended when it is first met, as a JSON object on a line
            of its own (``store``, ``index``, ``name``, ``cause``).

    Attributes:
        met: every bad record once, by index.
        num_substituted: number of substitutions in batches handed out.

    Raises:
        ValueError: the quarantine file cannot be written.
    """

    def __init__(self, store: Store, *, on_bad: OnBad, quarantine: str | os.PathLike[str] | None) -> None:
        self._store, self.on_bad = store, on_bad
        self._quarantine = None if quarantine is None else Path(quarantine)
        if self._quarantine is not None:
            check_quarantine(self._quarantine)
        self.met: dict[int, BadRecord] = {}
        self.num_substituted = 0

    def report(self, failed: Mapping[int, str]) -> None:
        """Note records that could not be decoded.

        Args:
            failed: cause by record index.

        Raises:
            RecordError: with ``on_bad="raise"``; it names the first, and says how many there are.
        """
        for index, cause in failed.items():
            if index in self.met:
                continue
            self.met[index] = BadRecord(index, self._store.name(index), cause)
            if self._quarantine is not None:
                self._append(self.met[index], to=self._quarantine)
            if self.on_bad == "substitute":
                where = self._store.where(index)
                _log.warning("%s cannot be decoded; substituted: %s", where, one_line(cause))
        if self.on_bad == "raise" and failed:
            index, cause = next(iter(failed.items()))
            more = f" (and {len(failed) - 1} more in its batch)" if len(failed) > 1 else ""
            raise RecordError(
                f"{self._store.where(index)}{more}: not a decodable image: {cause}; convert again without it "
                "(--on-bad skip --check decode), or use on_bad='substitute'"
            )

    def _append(self, bad: BadRecord, *, to: Path) -> None:
        line = {"store": str(self._store.path), **asdict(bad)}
        try:
            with io.FileIO(to, "a") as file:
                write_line(file, line)
        except OSError as error:  # not worth stopping a training run for
            where = one_line(str(to))
            _log.warning("%s: cannot be written: %s; not listed: %s", where, error.strerror, line)


def check_quarantine(path: Path) -> None:
    """Create the quarantine file if it is absent.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        if path.is_fifo():  # whose reader would see an end after each record
            raise ValueError(f"quarantine {path}: a pipe, expected a file; name one")
        path.open("a").close()
    except OSError as error:
        raise ValueError(
            f"quarantine {path}: cannot be written: {error.strerror}; name a file that can"
        ) from error


def substituted(plan: BatchPlan, failed: Mapping[int, str], *, following: Iterable[int]) -> BatchPlan | None:
    """Replace the bad records of a step with good ones.

    The first bad record is replaced by the batch's first good one, and so on; in a batch without a good one, all
    are replaced by the first good one that follows. The result depends only on the plan and on which records are
    bad.

    Args:
        failed: cause by record index.
        following: the records that follow in the epoch's order, see ``Planner.following``.

    Returns:
        The plan with its records replaced; None if there is no good record.
    """
    is_bad = np.isin(plan.records, list(failed))
    good = plan.records[~is_bad]
    if len(good) == 0:
        good = np.array(list(islice((record for record in following if record not in failed), 1)), dtype=np.int64)
    if len(good) == 0:
        return None
    records = plan.records.copy()
    records[is_bad] = good[np.arange(is_bad.sum()) % len(good)]
    return replace(plan, records=records)


def nothing_decodes(store: Store) -> RecordError:
    """The error for a batch for which ``substituted`` finds no record."""
    return RecordError(f"{store.path}: no record of the store can be decoded; convert it again")
