"""Benchmarks that compare ways of loading, on the same records and the same work.

``throughput`` measures images/s; ``repeat`` makes small data sets last long enough for that. ``cold`` measures
reading from storage, ``handover`` the cost of feeding DALI without decoding. The command is
``python -m dali_lmdb.compare``.
"""

from dali_lmdb.compare.cold import COLD_WAYS, ColdComparison, ColdRound, ColdWindow, compare_cold
from dali_lmdb.compare.handover import Handover, HandoverRound, measure_handover
from dali_lmdb.compare.part import ReadingSettings
from dali_lmdb.compare.throughput import (
    BACKENDS,
    CompareSettings,
    Comparison,
    Measurement,
    Round,
    compare_throughput,
)

__all__ = [
    "BACKENDS",
    "COLD_WAYS",
    "ColdComparison",
    "ColdRound",
    "ColdWindow",
    "CompareSettings",
    "Comparison",
    "Handover",
    "HandoverRound",
    "Measurement",
    "ReadingSettings",
    "Round",
    "compare_cold",
    "compare_throughput",
    "measure_handover",
]
