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
        SourceError: it vanished, changed while it was read, or cannot be read.
    """
    stamp: Callable[[], int] = _no_stamp
    """A number that changes when the image does (a file's time of change in ns), compared on resuming; 0 where
    ``identity`` notices every change. After ``read``, that of the bytes read. Called in any thread."""


class Source(ABC):
    """Images with labels in a fixed order: the order of the store's records."""

    kind: str
    """Name of this kind of source, as ``--source`` takes it."""
    kept_bytes: int = 64 << 20  # 1.28 million members of ImageNet's training tar take 55 MB
    """Most bytes of its listing in memory, and a quarter of that for hashes of names; the rest is in a temporary
    file. Set it before the first use."""
    reads_in_order: bool = False
    """Whether images are read far faster one after the other than by several threads."""

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Class names; a label is a position in it."""

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """Yield all items in order, the same on every pass; no image is read."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must not differ when a conversion is resumed: plain JSON types."""

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Yield (name, reason) of files that lie among the images and are ignored, for the report.

        Only class folders know them, and tars of class folders know images beside these; other archives and tables
        may hold other things too.
        """
        return iter(())

    def count(self) -> int:
        """Number of items."""
        return sum(1 for _ in self.items())
