"""What a source of images is to the converter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["IMAGE_EXTENSIONS", "Item", "Source", "is_image_name", "no_stamp"]

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision.datasets.folder.IMG_EXTENSIONS."""


def is_image_name(name: str) -> bool:
    """Whether ``ImageFolder`` would take a file of this name."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def no_stamp() -> int:
    """``Item.stamp`` of sources that are watched as a whole, in ``identity``."""
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
    stamp: Callable[[], int]
    """A number that changes when the image does (a file's time in ns), to notice it on resuming; 0 where the
    source as a whole is watched. After ``read`` that of what was read. Called in any thread."""


class Source(ABC):
    """Images with labels in a fixed order: the order of the store's records."""

    kind: str
    """Name of this kind of source, as ``--source`` takes it."""

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Class names; a label is a position in it."""

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """All items in order, found while iterating; no image is read."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be the same when a conversion is resumed: plain JSON types."""

    def left_out(self) -> Iterator[tuple[str, str]]:
        """Files that lie among the images and are not taken, as (name, reason); the report lists them.

        Known to class folders only, and of a tar of them the images beside them; other members of archives and
        rows of tables are meant to hold other things too.
        """
        return iter(())

    def count(self) -> int:
        """Number of items."""
        return sum(1 for _ in self.items())
