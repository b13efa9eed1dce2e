"""Whether two backends differ, or only their measurements do."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Interval", "interval_of"]

# Student's t for 99 % (two-sided), by degrees of freedom; between them the next lower one is used, which is wider.
_T_99 = {1: 63.66, 2: 9.925, 3: 5.841, 4: 4.604, 5: 4.032, 6: 3.707, 7: 3.499, 8: 3.355, 9: 3.250, 10: 3.169}
_T_99 |= {12: 3.055, 14: 2.977, 16: 2.921, 18: 2.878, 20: 2.845, 25: 2.787, 30: 2.750, 60: 2.660, 120: 2.617}


class Interval(NamedTuple):
    """Where the true ratio lies, with 99 % confidence."""

    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether 1, no difference, lies outside."""
        return not self.low <= 1 <= self.high


def interval_of(ratios: Sequence[float]) -> Interval:
    """The interval for the mean of the rounds' ratios, whose logarithms are taken to be normally distributed.

    The windows of a round follow each other, so what slows the machine for longer than a round drops out of their
    ratio. One round says nothing: its interval is unbounded.
    """
    logs = [math.log(ratio) for ratio in ratios]
    if len(logs) < 2:
        return Interval(0.0, math.inf)
    known = list(_T_99)
    t = _T_99[known[bisect.bisect_right(known, len(logs) - 1) - 1]]
    mean, half = statistics.fmean(logs), t * statistics.stdev(logs) / math.sqrt(len(logs))
    return Interval(math.exp(mean - half), math.exp(min(mean + half, 700.0)))
