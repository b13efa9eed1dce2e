"""Compare ways of loading, on the same records and the same work.

``throughput`` measures images/s, as ``settings`` say, and ``dali_reader`` is its reference; ``repeat`` makes small
data sets last long enough for that; ``report`` holds what every result contains. The command is
``python -m dali_lmdb.compare``.
"""

from dali_lmdb.compare.settings import CompareSettings
from dali_lmdb.compare.throughput import BACKENDS, Comparison, Measurement, Round, compare_throughput

__all__ = [
    "BACKENDS",
    "CompareSettings",
    "Comparison",
    "Measurement",
    "Round",
    "compare_throughput",
]
