"""What ``dali-lmdb parity`` says: as text, as plain types and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from dali_lmdb.errors import one_line
from dali_lmdb.images.grid import Cell, draw_grid, enlarged
from dali_lmdb.store import Store
from dali_lmdb.view.causes import causes, resemblance
from dali_lmdb.view.delivery import Way
from dali_lmdb.view.parity import Parity, Worst
from dali_lmdb.view.predictions import Top1

__all__ = ["Report"]

_BAR = 40  # characters
_LEVELS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)  # where the rows of the histogram begin
_NUM_LISTED = 8  # records that cannot be decoded


@dataclass(frozen=True, kw_only=True)
class Report:
    """A comparison of two ways of loading."""

    store: Store
    ways: tuple[Way, Way]
    what: dict[str, Any]
    """What was compared: ``task``, ``size``, ``epoch`` and ``seed``."""
    tolerance: float
    """Largest mean difference of an image, in grey levels."""
    parity: Parity
    top1: Top1 | None

    @property
    def is_beyond(self) -> bool:
        """Whether an image differs by more than the tolerance, or only one way can decode it."""
        return self.parity.num_beyond(self.tolerance) > 0

    @cached_property
    def _causes(self) -> dict[int, str]:
        """What is known of the causes, by record; of the worst ones."""
        found = {}
        for worst in self.parity.worst:
            known = causes(self.store, worst.record, self.ways)
            like = resemblance(worst.left, worst.right)
            found[worst.record] = ", ".join(known + ([] if like is None else [f"looks {like}"]))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        parity = self.parity
        left, right = (way.name for way in self.ways)
        return {
            "store": str(self.store.path),
            "left": left,
            "right": right,
            **self.what,
            "records": len(parity.records),
            "tolerance": self.tolerance,
            "num_beyond": parity.num_beyond(self.tolerance),
            "mean": parity.mean,
            "max": int(parity.maxima.max(initial=0)),
            "histogram": parity.histogram.tolist(),
            "worst": [
                {
                    "record": worst.record,
                    "name": self.store.name(worst.record),
                    "mean": worst.mean,
                    "max": int(worst.difference.max()),
                    "cause": self._causes[worst.record],
                }
                for worst in parity.worst
            ],
            "only_left": self._bad(parity.only_left),
            "only_right": self._bad(parity.only_right),
            "bad": self._bad(parity.bad),
            "top1": None if self.top1 is None else self.top1._asdict(),
        }

    def _bad(self, reasons: dict[int, str]) -> list[dict[str, Any]]:
        return [
            {"record": record, "name": self.store.name(record), "cause": reason}
            for record, reason in reasons.items()
        ]

    def text(self) -> str:
        """Lines for people."""
        parity = self.parity
        left, right = (way.name for way in self.ways)
        what = "{task}, {size} pixels, epoch {epoch}, seed {seed}".format(**self.what)
        lines = [f"{self.store.path}: {len(parity.records)} records, {left} and {right}, {what}"]
        lines += ["difference of values, in grey levels:", *self._histogram()]
        lines.append(
            f"mean {parity.mean:.3f}; of an image at most {parity.means.max(initial=0):.3f}; "
            f"of a value at most {parity.maxima.max(initial=0)}"
        )
        lines += [self._line(worst) for worst in parity.worst]
        for reasons, who in (
            (parity.only_left, f"only {left} decodes"),
            (parity.only_right, f"only {right} decodes"),
            (parity.bad, "cannot be decoded:"),
        ):
            lines += [f"{who} {self._named(record)}: {reasons[record]}" for record in list(reasons)[:_NUM_LISTED]]
            if len(reasons) > _NUM_LISTED:
                lines.append(f"{who} {len(reasons) - _NUM_LISTED} more")
        if self.top1 is not None:
            lines.append(
                f"top-1: {left} {self.top1.left:.2f} %, {right} {self.top1.right:.2f} %; "
                f"{self.top1.num_different} of {len(parity.records)} predictions differ"
            )
        lines.append(self._verdict())
        return "\n".join(map(one_line, lines))

    def _verdict(self) -> str:
        tolerance = f"the tolerance, a mean difference of {self.tolerance:g}"
        if not self.is_beyond:
            return f"every image is within {tolerance}"
        num_alone = len(self.parity.only_left) + len(self.parity.only_right)
        num_far = self.parity.num_beyond(self.tolerance) - num_alone
        return f"images beyond {tolerance}: {num_far}; decoded by one only: {num_alone}"

    def _histogram(self) -> list[str]:
        total = max(1, int(self.parity.histogram.sum()))
        lines = []
        for first, end in pairwise(_LEVELS):
            count = int(self.parity.histogram[first:end].sum())
            if count:
                levels = str(first) if end == first + 1 else f"{first} to {end - 1}"
                lines.append(f"{levels:>10}  {100 * count / total:8.4f} %  {'#' * -(-_BAR * count // total)}")
        return lines

    def _line(self, worst: Worst) -> str:
        cause = self._causes[worst.record]
        known = f": {cause}" if cause else ""
        return f"  mean {worst.mean:.3f}, at most {worst.difference.max()}: {self._named(worst.record)}{known}"

    def _named(self, record: int) -> str:
        return f"record {record} ({self.store.name(record)})"

    def picture(self) -> bytes:
        """The images that differ most, a row for each: left, right and their difference, amplified; a PNG."""
        cells: list[tuple[Cell, Sequence[str]]] = []
        for worst in self.parity.worst:
            difference = worst.difference
            factor = 255 // int(difference.max())
            names = [one_line(self.store.name(worst.record)), self._causes[worst.record]]
            how_far = [f"difference x {factor}", f"mean {worst.mean:.3f}, at most {difference.max()}"]
            left, right = (one_line(way.name) for way in self.ways)
            cells += [
                (enlarged(worst.left), [left, names[0]]),
                (enlarged(worst.right), [right, names[1]]),
                (enlarged((factor * difference).astype(np.uint8)), how_far),
            ]
        if not cells:
            cells = [("no image differs", [])]
        return draw_grid(cells, num_columns=3)
