"""Counter-based random numbers: a hash of (key, record, draw), so there is no generator state to carry.

The hash is the output function of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom
Number Generators", OOPSLA 2014), here in numpy on uint64 with wrap-around arithmetic; the values
depend on no library's version.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["key_of", "mix", "uniform", "uniforms"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: SplitMix64's step
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11 = (np.uint64(bits) for bits in (30, 27, 31, 11))
_MASK = (1 << 64) - 1


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's bijective hash of each element, uint64 of the same shape."""
    z = values + _GOLDEN
    z = (z ^ (z >> _30)) * _FIRST
    z = (z ^ (z >> _27)) * _SECOND
    return z ^ (z >> _31)


def key_of(*numbers: int) -> np.uint64:
    """One 64-bit key from integers (seed, epoch, …); order matters."""
    key = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        key = mix(key ^ mix(np.array([number & _MASK], dtype=np.uint64)))
    result: np.uint64 = key[0]
    return result


def uniform(key: np.uint64, records: npt.NDArray[np.int64], draw: int) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each record.

    Args:
        key: from ``key_of(seed, epoch)``.
        records: int64 of shape (n,).
        draw: number of the draw; different draws of a record are independent.

    Returns:
        float64 of shape (n,), multiples of 2^-53.
    """
    numbers: npt.NDArray[np.float64] = uniforms(key, records, range(draw, draw + 1))[0]
    return numbers


def uniforms(key: np.uint64, records: npt.NDArray[np.int64], draws: range) -> npt.NDArray[np.float64]:
    """``uniform`` for several draws: float64 of shape (len(draws), n)."""
    record_keys: npt.NDArray[Any] = mix(records.astype(np.uint64) ^ key)
    bits = mix(record_keys ^ mix(np.array(draws, dtype=np.uint64))[:, None])
    return (bits >> _11).astype(np.float64) * 2.0**-53
