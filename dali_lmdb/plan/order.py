"""The order of an epoch's records, and the positions that a rank takes in a step.

Both are pure functions: of (seed, epoch, position) and of (position, sizes). No permutation is stored; a
position's record is computed in O(log n) arithmetic operations, for up to 2^40 records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dali_lmdb.plan.random import key_of, mix

__all__ = ["BLOCK_RECORDS", "WINDOW_BLOCKS", "EpochOrder", "LastBatch", "Shuffle", "StepPlan", "epoch_order"]

Shuffle = Literal["full", "block", "none"]
LastBatch = Literal["drop", "pad", "short"]

BLOCK_RECORDS = 64
"""Records in a block with ``shuffle="block"``: 7 MB at 110 kB each, an efficient read from a network disk."""
WINDOW_BLOCKS = 64
"""Blocks shuffled together with ``shuffle="block"``: 4,096 records."""

# Hoang, Morris, Rogaway ("An Enciphering Scheme Based on a Card Shuffle", CRYPTO 2012) bound the
# distance from a random permutation for a number of rounds proportional to log2(n); 6 log2(n) is their
# practical choice. Small n need a minimum.
_ROUNDS_PER_BIT = 6
_MIN_ROUNDS = 48
_TOP_BIT = np.uint64(1 << 63)


def _permute(
    positions: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], keys: npt.NDArray[np.uint64], *, largest: int
) -> npt.NDArray[np.int64]:
    """Permute positions by a keyed bijection on [0, size): the swap-or-not shuffle.

    Args:
        positions: int64 of shape (n,), each in [0, size).
        sizes, keys: int64 and uint64, of shape (n,) or (1,): the domain and key of each position.
        largest: the largest size in the epoch, which decides the number of rounds, the same in every call.

    Every round pairs x with (k - x) mod size and swaps the two if a hash of the larger one says so. Each round,
    and so the whole, is a bijection for any size.
    """
    num_rounds = max(_MIN_ROUNDS, _ROUNDS_PER_BIT * largest.bit_length())
    # Unsigned numbers wrap around: a difference below 0 is huge, and right once the size is added.
    x, sizes = positions.astype(np.uint64), sizes.astype(np.uint64)
    for round_keys in mix(keys + np.arange(num_rounds, dtype=np.uint64)[:, None]):
        partner = round_keys % sizes - x
        partner = np.minimum(partner, partner + sizes)
        swaps = mix(np.maximum(x, partner) ^ round_keys) >= _TOP_BIT
        x = np.where(swaps, partner, x)
    return x.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The order of one epoch; make it with ``epoch_order``."""

    num_records: int
    seed: int
    epoch: int
    shuffle: Shuffle

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The records at some positions.

        Args:
            positions: int64 of shape (n,), each in [0, num_records).

        Returns:
            Record indices, int64 of shape (n,).
        """
        if self.shuffle == "none" or len(positions) == 0:
            return positions.astype(np.int64)
        key = key_of(self.seed, self.epoch)
        if self.shuffle == "full":
            return _permute(positions, np.array([self.num_records]), np.array([key]), largest=self.num_records)
        return self._block_records(positions, key)

    def _block_records(self, positions: npt.NDArray[np.int64], key: np.uint64) -> npt.NDArray[np.int64]:
        # Slots are mixed inside windows of whole blocks; then each block of slots becomes a random block
        # of records. The short block at the end of the store, if any, stays in the last window.
        window_records = BLOCK_RECORDS * WINDOW_BLOCKS
        windows = positions // window_records
        starts = windows * window_records
        sizes = np.minimum(window_records, self.num_records - starts)
        window_keys = mix(windows.astype(np.uint64) ^ key)
        slots = starts + _permute(positions - starts, sizes, window_keys, largest=window_records)
        blocks, inside = slots // BLOCK_RECORDS, slots % BLOCK_RECORDS
        whole_blocks = self.num_records // BLOCK_RECORDS
        movable = blocks < whole_blocks
        if whole_blocks:
            # Differs from the key of every window, since only (small) window numbers are mixed into those.
            block_key = np.array([~key])
            moved = _permute(
                np.where(movable, blocks, 0), np.array([whole_blocks]), block_key, largest=whole_blocks
            )
            blocks = np.where(movable, moved, blocks)
        return blocks * BLOCK_RECORDS + inside


def epoch_order(num_records: int, *, seed: int, epoch: int, shuffle: Shuffle = "full") -> EpochOrder:
    """The order of one epoch, the same in every process, today and after a resume.

    Args:
        num_records: 0 to 2^40.
        seed, epoch: any integers; each pair gives a different order.
        shuffle: ``"full"``: any record anywhere. ``"block"``: blocks of ``BLOCK_RECORDS`` consecutive
            records in random order, their records shuffled within windows of ``WINDOW_BLOCKS`` blocks; for
            storage that is slow at random reads. ``"none"``: stored order.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 <= num_records <= 1 << 40:
        raise ValueError(f"num_records is {num_records}, expected 0 to 2^40")
    if shuffle not in ("full", "block", "none"):
        raise ValueError(f"shuffle is {shuffle!r}, expected 'full', 'block' or 'none'")
    return EpochOrder(num_records=num_records, seed=seed, epoch=epoch, shuffle=shuffle)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Divides an epoch's positions among steps and ranks.

    A global step takes the next ``batch_size * world_size`` positions; each rank takes a run of them. With two
    ranks of batch size 2 and seven records::

        step  positions  rank 0  rank 1
        0     0 1 2 3    0 1     2 3
        1     4 5 6      4       5 6     last_batch="short": divided evenly, nothing twice
                         4 5     6 0     last_batch="pad": filled from the epoch's beginning
                         -       -       last_batch="drop": left out, the same on every rank

    An epoch may begin at any position, for instance where a run with another world size stopped.

    Args:
        num_positions: records of an epoch.
        batch_size: largest number of records in one rank's step.
        rank, world_size: torch.distributed's.
        last_batch: what happens to the positions that do not fill a global step. With ``"short"`` and fewer
            of them than ranks, some ranks have no such step.
    """

    num_positions: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    last_batch: LastBatch = "drop"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}, expected 0 to {self.world_size - 1} (world_size - 1)")
        if self.last_batch not in ("drop", "pad", "short"):
            raise ValueError(f"last_batch is {self.last_batch!r}, expected 'drop', 'pad' or 'short'")

    @property
    def global_batch_size(self) -> int:
        """Number of positions in a full global step."""
        return self.batch_size * self.world_size

    def end_of_step(self, start: int) -> int:
        """Positions consumed after the global step that begins at ``start``."""
        return min(start + self.global_batch_size, self.num_positions)

    def positions(self, start: int) -> npt.NDArray[np.int64] | None:
        """This rank's positions in the global step that begins at ``start``.

        Returns:
            int64 of shape (n,), 1 <= n <= batch_size; None if this rank has no step there: the epoch is over.
        """
        left = min(self.num_positions - start, self.global_batch_size)
        if left <= 0 or (left < self.global_batch_size and self.last_batch == "drop"):
            return None
        if left == self.global_batch_size or self.last_batch == "pad":
            first, count = start + self.rank * self.batch_size, self.batch_size
        else:
            first = start + left * self.rank // self.world_size
            count = start + left * (self.rank + 1) // self.world_size - first
            if count == 0:
                return None
        return np.arange(first, first + count, dtype=np.int64) % self.num_positions

    def num_records(self) -> int:
        """Positions of a rank in an epoch; with ``"short"``, where ranks may differ by one, the largest number."""
        if self.last_batch == "short":
            return -(-self.num_positions // self.world_size)
        return self.num_steps() * self.batch_size

    def num_steps(self, start: int = 0) -> int:
        """Steps of this rank from ``start`` to the end of the epoch."""
        whole, left = divmod(max(self.num_positions - start, 0), self.global_batch_size)
        return whole + (left > 0 and self.positions(self.num_positions - left) is not None)
