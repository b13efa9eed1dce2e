"""Where images come from: each kind of source in a module of its own."""

from __future__ import annotations

import os

from dali_lmdb.convert.sources.base import Item, Source
from dali_lmdb.convert.sources.folder import FolderSource

__all__ = ["FolderSource", "Item", "Source", "open_source"]


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open what is at ``path``.

    Raises:
        SourceError: there is nothing that can be converted.
    """
    return FolderSource(path)
