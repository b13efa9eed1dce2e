"""Compare ways of loading, on the same records and the same work.

``throughput`` measures images/s in rounds, as ``settings`` say, one ``window`` after the other, with what each
takes (``usage``); ``confidence`` says which differences are more than noise. ``dali_reader`` and ``transforms_v2``
are references made of DALI's and torchvision's own parts, ``model`` is a consumer that trains; ``repeat`` makes
small data sets last long enough. ``tuning`` searches for the fastest arguments of ``DaliLoader``. ``report`` holds
what every result contains, ``table`` and ``plot`` show it. The commands are ``dali-lmdb compare`` and, in
``commands``, ``dali-lmdb tune``.
"""

from dali_lmdb.compare.settings import CompareSettings
from dali_lmdb.compare.throughput import BACKENDS, Comparison, Measurement, Round, Turn, compare_throughput
from dali_lmdb.compare.tuning import Tuning, tune

__all__ = [
    "BACKENDS",
    "CompareSettings",
    "Comparison",
    "Measurement",
    "Round",
    "Tuning",
    "Turn",
    "compare_throughput",
    "tune",
]
