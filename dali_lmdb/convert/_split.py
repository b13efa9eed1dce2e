"""A class-balanced split of a source in two parts, which depends on names and a seed alone."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from dali_lmdb.convert.sources.base import Item, Source

__all__ = ["Split", "SplitSource"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """How to divide the images of each class between a training and a validation store.

    Of a class of n images, the round(``fraction`` * n) whose hashes of seed and name are smallest are for
    validation, but at least one image is left in either part; a class of one image is for training. So an image
    that is added or removed moves at most one other image of its class.

    Raises:
        ValueError: the fraction is not between 0 and 1, or the seed is negative.
    """

    fraction: float
    """Share of each class that is for validation."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction is {self.fraction}, expected more than 0 and less than 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected at least 0")

    def identity(self, part: str) -> dict[str, Any]:
        """What a store says of the part it holds, as plain JSON types."""
        return {"part": part, "fraction": self.fraction, "seed": self.seed}

    def validation_mask(
        self, hashes: npt.NDArray[np.uint64], labels: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.bool_]:
        """Return which items are for validation, bool of shape (n,).

        Args:
            hashes: what ``hash_of`` returns for each item's name, of shape (n,).
            labels: each item's label, of shape (n,).
        """
        order = np.lexsort((hashes, labels))  # by label, then by hash
        sizes = np.bincount(labels)
        taken = np.floor(sizes * self.fraction + 0.5).astype(np.int64)
        taken = np.where(sizes > 1, np.clip(taken, 1, sizes - 1), 0)
        rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        mask = np.zeros(len(labels), dtype=np.bool_)
        mask[order] = rank < np.repeat(taken, sizes)
        return mask

    def hash_of(self, name: str) -> int:
        """A 64-bit hash of the seed and a name."""
        data = f"{self.seed}\0{name}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class SplitSource(Source):
    """A source's items, those for training first, each part in the source's order.

    Holds 1 byte for each item, and some 50 while the source is divided.
    """

    def __init__(self, source: Source, split: Split) -> None:
        self._source, self._split = source, split
        self.kind, self.reads_in_order = source.kind, source.reads_in_order

    @property
    def classes(self) -> list[str]:
        return self._source.classes

    def items(self) -> Iterator[Item]:
        mask = self._mask
        for part in (~mask, mask):
            yield from compress(self._source.items(), part)

    def count(self) -> int:
        return len(self._mask)

    def part_counts(self) -> tuple[int, int]:
        """Number of items for training and for validation; none for validation if no class has two."""
        num_val = int(np.count_nonzero(self._mask))
        return len(self._mask) - num_val, num_val

    def left_out(self) -> Iterator[tuple[str, str]]:
        return self._source.left_out()

    def identity(self) -> dict[str, Any]:
        return self._source.identity()

    @cached_property
    def _mask(self) -> npt.NDArray[np.bool_]:
        hashes, labels = array("Q"), array("i")
        for item in self._source.items():
            hashes.append(self._split.hash_of(item.name))
            labels.append(item.label)
        return self._split.validation_mask(np.array(hashes, np.uint64), np.array(labels, np.int32))
