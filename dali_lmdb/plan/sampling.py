"""Map epoch positions to records: every record once, or those of a list, a sampler or weighted draws."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dali_lmdb.plan.order import EpochOrder, Shuffle, epoch_order
from dali_lmdb.plan.random import key_of, uniform

__all__ = ["AllRecords", "Listed", "Sampled", "Sampling", "Weighted", "sampling_of"]

_WEIGHTS_KEY = 1  # besides seed and epoch, so that weighted draws and augmentation do not share random numbers


class Sampling(Protocol):
    """Maps positions of an epoch to records."""

    @property
    def num_positions(self) -> int:
        """Number of positions in an epoch."""

    @property
    def identity(self) -> str:
        """Identifies the order; a saved state fits only a sampling with the same one."""

    def records(self, positions: npt.NDArray[np.int64], *, epoch: int) -> npt.NDArray[np.int64]:
        """Records at some positions: int64 of the same shape (n,)."""


class AllRecords:
    """Every record once, in the order of ``epoch_order``."""

    def __init__(self, num_records: int, *, seed: int, shuffle: Shuffle) -> None:
        self.num_positions, self.identity = num_records, str(shuffle)
        self._seed, self._shuffle = seed, shuffle
        self._order(0)  # checks the arguments

    def records(self, positions: npt.NDArray[np.int64], *, epoch: int) -> npt.NDArray[np.int64]:
        return self._order(epoch)(positions)

    def _order(self, epoch: int) -> EpochOrder:
        return epoch_order(self.num_positions, seed=self._seed, epoch=epoch, shuffle=self._shuffle)


class Listed:
    """The listed records, in the given order or shuffled differently in every epoch."""

    def __init__(self, indices: npt.NDArray[np.int64], *, seed: int, shuffle: Shuffle) -> None:
        self._indices = indices
        self._places = AllRecords(len(indices), seed=seed, shuffle=shuffle)
        self.num_positions = len(indices)
        self.identity = f"{shuffle}, {len(indices)} listed, {_digest(indices)}"

    def records(self, positions: npt.NDArray[np.int64], *, epoch: int) -> npt.NDArray[np.int64]:
        listed: npt.NDArray[np.int64] = self._indices[self._places.records(positions, epoch=epoch)]
        return listed


class Weighted:
    """N draws with replacement from N records, each with a probability proportional to its weight."""

    def __init__(self, weights: npt.NDArray[np.float64], *, seed: int) -> None:
        # Scaled by a power of two, which is exact, so that no sum overflows or loses bits to subnormal numbers.
        _, exponent = np.frexp(weights.max())
        self._cumulative, self._seed = np.cumsum(np.ldexp(weights, -exponent)), seed
        self.num_positions = len(weights)
        self.identity = f"weights {_digest(weights)}"

    def records(self, positions: npt.NDArray[np.int64], *, epoch: int) -> npt.NDArray[np.int64]:
        drawn = uniform(key_of(self._seed, epoch, _WEIGHTS_KEY), positions, 0) * self._cumulative[-1]
        records: npt.NDArray[np.int64] = np.searchsorted(self._cumulative, drawn, side="right").astype(np.int64)
        return records


class Sampled:
    """The records of a PyTorch ``Sampler``; its ``set_epoch`` is called if it has one.

    It must yield the records of all ranks, the same ones on each rank and after a resume, so seed its generator by
    the epoch. It is called from a thread of the loader, and for the next epoch before the current one is over.
    On resuming, only its class and its length can be compared.
    """

    def __init__(self, sampler: Any, *, num_records: int) -> None:
        self._sampler, self._num_records = sampler, num_records
        self.num_positions = len(sampler)
        self.identity = f"sampler {type(sampler).__name__}"
        self._lock = threading.Lock()
        # By epoch, the last two: the reader's thread may be in the next one while the loader uses this one.
        self._listed: dict[int, npt.NDArray[np.int64]] = {}

    def records(self, positions: npt.NDArray[np.int64], *, epoch: int) -> npt.NDArray[np.int64]:
        with self._lock:
            if epoch not in self._listed:
                self._listed = dict([*self._listed.items()][-1:]) | {epoch: self._list(epoch)}
            return self._listed[epoch][positions]

    def _list(self, epoch: int) -> npt.NDArray[np.int64]:
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)
        listed = _checked_indices(self._sampler, self._num_records)
        if len(listed) != self.num_positions:
            raise ValueError(
                f"sampler gave {len(listed)} indices in epoch {epoch}, its len() is {self.num_positions}"
            )
        return listed


def sampling_of(
    num_records: int,
    *,
    sampler: Iterable[int] | None,
    weights: Sequence[float] | npt.NDArray[np.float64] | None,
    seed: int,
    shuffle: Shuffle | bool | None,
    default_shuffle: Shuffle,
) -> Sampling:
    """Make the sampling for a loader's arguments.

    Args:
        num_records: records of the store.
        sampler: a PyTorch ``Sampler`` (see ``Sampled``), or a sequence, array or tensor of record indices.
        weights: one for each record.
        shuffle: for all records or a sequence; None means ``default_shuffle`` for the first, ``"none"`` for the
            second. True is ``"full"`` and False ``"none"``, which any ``sampler`` or ``weights`` may have beside
            it, as in a ``DataLoader``.

    Raises:
        ValueError: an index or weight is out of range, two of the arguments exclude each other, or the sampler
            deals records to ranks itself.
    """
    if sampler is not None and weights is not None:
        raise ValueError("sampler and weights are both given; choose one")
    if shuffle is True:
        shuffle = "full"
    if sampler is None and weights is None:
        if shuffle is False:
            shuffle = "none"
        return AllRecords(num_records, seed=seed, shuffle=default_shuffle if shuffle is None else shuffle)
    if shuffle is False:
        shuffle = None
    if sampler is not None and _is_listed(sampler):
        indices = _checked_indices(sampler, num_records)
        if len(indices) == 0:
            raise ValueError("sampler is empty, expected at least one record index")
        return Listed(indices, seed=seed, shuffle="none" if shuffle is None else shuffle)
    if shuffle is not None:
        given = "sampler" if weights is None else "weights"
        raise ValueError(f"shuffle is {shuffle!r}, but {given} decides the order; leave shuffle out")
    if weights is None:
        _reject_distributed(sampler)
        if not hasattr(sampler, "__len__"):
            raise ValueError(
                f"sampler is {sampler!r}, which has no len(); give a list of record indices, or a Sampler that has"
            )
        sampled = Sampled(sampler, num_records=num_records)
        if sampled.num_positions == 0:
            raise ValueError("sampler is empty, expected at least one record index")
        return sampled
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (num_records,) or not (np.isfinite(array).all() and (array >= 0).all() and array.any()):
        raise ValueError(
            f"weights of shape {array.shape}, expected {num_records} finite numbers of at least 0, one above 0"
        )
    return Weighted(array, seed=seed)


def _reject_distributed(sampler: Any) -> None:
    """Refuse samplers that divide records among ranks: divided again, most of them would be lost.

    ``num_replicas`` is an attribute of torch's ``DistributedSampler`` and of those that follow its interface
    (timm's and torchvision's repeated augmentation, torchdata, transformers); mmengine's have ``world_size``.
    """
    for name in ("num_replicas", "world_size"):
        if hasattr(sampler, name):
            raise ValueError(
                f"sampler is a {type(sampler).__name__} ({name}={getattr(sampler, name)!r}), which divides "
                "records among ranks, as the loader does itself: leave sampler out, or give one that yields the "
                "records of all ranks, the same on each"
            )
    if hasattr(sampler, "sampler"):  # it wraps another
        _reject_distributed(sampler.sampler)


def _is_listed(indices: Iterable[int]) -> bool:
    """Return whether indices are a sequence, or convertible to an array, as torch's tensors are."""
    return isinstance(indices, Sequence) or hasattr(indices, "__array__")


def _checked_indices(indices: Iterable[int], num_records: int) -> npt.NDArray[np.int64]:
    try:
        array = np.asarray(indices if _is_listed(indices) else list(indices))
    except ValueError:  # lists of different lengths
        array = np.empty((0, 0))
    if array.ndim == 2:
        raise ValueError("sampler gives lists, as a BatchSampler does, expected record indices; give its sampler")
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        raise ValueError(f"sampler gives {array.dtype} of shape {array.shape}, expected integers of shape (n,)")
    array = array.astype(np.int64)
    wrong = array[(array < 0) | (array >= num_records)]
    if len(wrong):
        raise ValueError(f"sampler gives record {wrong[0]}, expected 0 to {num_records - 1}")
    return array


def _digest(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
