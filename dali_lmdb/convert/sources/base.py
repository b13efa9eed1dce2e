"""The interface between the converter and a source of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["Item", "Source"]


def _no_stamp() -> int:
    return 0


class Item(NamedTuple):
    """One image of a source, not yet read."""

    name: str
    """Path inside the source, with forward slashes: ``class/file``."""
    label: int
    read: Callable[[], bytes]
    """Called once, in any thread.

    Raises:
        SourceError: the image is gone, changed while it was read, or cannot be read.
    """
    stamp: Callable[[], int] = _no_stamp
    """A number that changes when the image does (a file's mtime in ns), compared on resuming; 0 if ``identity``
    covers every change. Once ``read`` was called, it describes the bytes that were read. Called in any thread."""


class Source(ABC):
    """Images with labels in a fixed order: the order of the store's records."""

    kind: str
    """Name of this kind of source, as ``--source`` takes it."""
    kept_bytes: int = 64 << 20  # 1.28 million members of ImageNet's training tar take 55 MB
    """How many bytes of the listing to hold in memory, plus a quarter of that for hashes of names; the rest goes
    to a temporary file. Set it before the first use."""
    reads_in_order: bool = False
    """Whether reading images in sequence is far faster than reading them in several threads."""

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Class names; a label is a position in it."""

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """Yield all items in order, the same on every pass; no image is read."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Properties that must be the same when a conversion is resumed, as plain JSON types."""

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Yield (name, reason) of files that lie among the images and are ignored, for the report.

        Class folders report every such file, tars of class folders only the images outside these folders. Others
        report nothing: WebDataset shards, for example, may well hold more than images.
        """
        return iter(())

    def count(self) -> int:
        """Number of items."""
        return sum(1 for _ in self.items())
