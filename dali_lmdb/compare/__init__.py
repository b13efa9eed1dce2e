"""One way of loading measured against another, on the same records and the same work.

``throughput`` measures images/s; ``repeat`` makes small data sets last long enough for that. The command
is ``python -m dali_lmdb.compare``.
"""

from dali_lmdb.compare.throughput import (
    BACKENDS,
    CompareSettings,
    Comparison,
    Measurement,
    Round,
    compare_throughput,
)

__all__ = ["BACKENDS", "CompareSettings", "Comparison", "Measurement", "Round", "compare_throughput"]
