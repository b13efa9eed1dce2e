"""Which records of a store can be decoded: what the probe found, remembered while it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dali_lmdb.loaders.external_source import Reduced, decoder_inputs
from dali_lmdb.loaders.finishing import UndecodableError
from dali_lmdb.loaders.pillow import pixel_limits
from dali_lmdb.loaders.pipeline import GraphSettings, feed_without_copy
from dali_lmdb.loaders.prefetch import Feed
from dali_lmdb.loaders.probe import Cause, Probe, Sizes
from dali_lmdb.plan.batches import BatchPlan, Planner
from dali_lmdb.store import Store

__all__ = ["Verdicts"]


class Verdicts:
    """Asks the probe about records of a store, once for each crop.

    Args:
        store: the store.
        graph: settings of the graph that decodes its records.

    Attributes:
        refused: causes of records that no decoder may get, by record index; those that crash one are added.
    """

    def __init__(self, store: Store, graph: GraphSettings) -> None:
        self._store, self._probe, self._graph = store, Probe(graph), graph
        self.refused: dict[int, str] = {}
        # By (epoch, record), since windows differ: why the record failed to decode; None if it decoded.
        self._known: dict[tuple[int, int], str | None] = {}

    def forget_before(self, epoch: int) -> None:
        """Forget what was found in earlier epochs, except for ``refused``."""
        self._known = {key: cause for key, cause in self._known.items() if key[0] >= epoch}

    def of_epoch(self, epoch: int) -> dict[int, str]:
        """Causes of the records known to fail with the crops of an epoch."""
        return {record: cause for (of, record), cause in self._known.items() if cause and of == epoch}

    def note(self, error: UndecodableError) -> dict[int, str]:
        """Remember why records cannot be decoded; return the causes by record index."""
        found = {int(error.plan.records[row]): reason for row, reason in error.reasons.items()}
        self._known |= {(error.plan.epoch, record): cause for record, cause in found.items()}
        return found

    def causes(
        self, plan: BatchPlan, feed: Feed, records: Sequence[int], *, failed_before: bool
    ) -> dict[int, str]:
        """Causes of those of some records of a batch that cannot be decoded.

        Args:
            feed: the batch's inputs.
            failed_before: as ``Probe.causes``, which says what may be raised.
        """
        unknown = {record for record in records if (plan.epoch, record) not in self._known}
        rows = {record: row for row, record in enumerate(plan.records.tolist()) if record in unknown}
        reduced = {record for record, row in rows.items() if row in _reduced(feed)}  # Pillow decodes them
        sizes = self._sizes(plan, feed, [row for record, row in rows.items() if record not in reduced])
        from_dali = self._probe.causes(self._inputs(feed), sizes, failed_before=failed_before)
        failed = {record for record, row in rows.items() if row not in sizes or row in from_dali} - reduced
        from_pillow = self._pillow_causes(sorted((failed | reduced) - self.refused.keys()))
        failed |= {record for record in reduced if from_pillow[record] is not None}
        for record, row in rows.items():
            cause = self._told(record, from_dali.get(row), from_pillow.get(record)) if record in failed else None
            self._known[plan.epoch, record] = cause
        found = {record: self._known[plan.epoch, record] for record in records}
        return {record: cause for record, cause in found.items() if cause is not None}

    def crashing(self, records: Sequence[int], *, epoch: int, planner: Planner) -> dict[int, str]:
        """Causes of those of some records that crash a decoder, with the crops of an epoch.

        A record that merely fails counts, too, if the records crash one when they are decoded together: from 32 on
        DALI parses headers in several threads, see ``probe``.
        """
        from_pillow = self._pillow_causes(records)
        found = {record: f"Pillow: {cause.text}" for record, cause in from_pillow.items() if cause and cause.died}
        rest = np.array([record for record in records if record not in found], np.int64)
        plan = BatchPlan(epoch=epoch, start=0, end=0, records=rest)
        feed = feed_without_copy(plan, planner, refused=self.refused, resize=self._graph.resize)
        causes = self._probe.causes(
            self._inputs(feed), self._sizes(plan, feed, range(len(rest))), failed_before=False
        )
        died = {row: cause for row, cause in causes.items() if cause.died}
        if causes and not died and self._probe.crashes_together(self._inputs(feed)):
            died = causes
        return found | {int(rest[row]): f"DALI: {cause.text}" for row, cause in died.items()}

    def _told(self, record: int, from_dali: Cause | None, from_pillow: Cause | None) -> str:
        """Why a record cannot be decoded: what DALI says, which is little, and what Pillow says.

        Args:
            from_dali: None if DALI did not get the record.
            from_pillow: None if Pillow decodes it, or did not get it either.
        """
        if record in self.refused:
            return self.refused[record]
        if from_dali is not None:
            cause = f"DALI: {from_dali.text}; Pillow{f': {from_pillow.text}' if from_pillow else ' decodes it'}"
        elif from_pillow is not None:
            cause = from_pillow.text
        else:
            cause = "the index has no size for it; convert it again with --check header"
        if any(found is not None and found.died for found in (from_dali, from_pillow)):
            self.refused[record] = cause
        return cause

    def _pillow_causes(self, records: Sequence[int]) -> dict[int, Cause | None]:
        """Why Pillow cannot decode records; None for those that it can."""
        files = [self._store.read(record) for record in records]
        limits = pixel_limits(self._store, np.array(records, dtype=np.int64))
        return dict(zip(records, self._probe.pillow_causes(files, limits), strict=True))

    def _sizes(self, plan: BatchPlan, feed: Feed, rows: Iterable[int]) -> Sizes:
        """Sizes of some records of a batch that DALI may decode, by row; the others are ``REFUSED``."""
        heights, widths = (self._store.gather(name, plan.records).tolist() for name in ("height", "width"))
        return {row: (heights[row], widths[row]) for row in rows if feed[0][row].shape() != [0]}

    def _inputs(self, feed: Feed) -> Feed:
        return decoder_inputs(feed, self._graph.transform, resize=self._graph.resize)

    def close(self) -> None:
        """End the probe's process; the next use starts another."""
        self._probe.close()


def _reduced(feed: Feed) -> dict[int, Reduced]:
    """The images of a batch that Pillow decodes at a fraction of their size, by row."""
    last = feed[-1]
    return last if isinstance(last, dict) else {}
