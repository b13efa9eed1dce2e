"""Sources of images, each kind in a module of its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dali_lmdb.convert.sources._detect import kind_of, kind_of_several
from dali_lmdb.convert.sources._names import listed
from dali_lmdb.convert.sources._patterns import matches_of
from dali_lmdb.convert.sources.base import Item, Source
from dali_lmdb.convert.sources.classic import ClassicSource
from dali_lmdb.convert.sources.flat import FlatSource
from dali_lmdb.convert.sources.folder import FolderSource
from dali_lmdb.convert.sources.manifest import ManifestSource
from dali_lmdb.convert.sources.named import NamedSource
from dali_lmdb.convert.sources.store import StoreSource, class_names
from dali_lmdb.convert.sources.tar import ImageNetTarSource, TarSource
from dali_lmdb.convert.sources.webdataset import WebDatasetSource
from dali_lmdb.errors import SourceError
from dali_lmdb.store import Store, open_store
from dali_lmdb.store.classic import ClassicStore
from dali_lmdb.store.shards import shard_files, shard_name

__all__ = ["KINDS", "FolderSource", "Item", "Source", "open_source"]

KINDS = (
    "folder",
    "webdataset",
    "tar",
    "imagenet-tar",
    "flat",
    "parquet",
    "manifest",
    "classic",
    "store",
)
"""What ``open_source`` can open, by name."""


def open_source(
    path: str | os.PathLike[str],
    *,
    kind: str | None = None,
    val_labels: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
    classes: Sequence[str] | None = None,
    per_class: int | None = None,
    allow_empty: bool = False,
    class_names: Sequence[str] | None = None,
) -> Source:
    """Open a source of images.

    Args:
        path: a file, a folder, or a pattern that matches one. It may match several WebDataset shards, Parquet
            files, class tars of ImageNet or shards of a store.
        kind: one of ``KINDS``; by default detected, and refused where it is ambiguous.
        val_labels: the labels of a flat folder or tar of images, see ``FlatSource``.
        follow_links: follow symbolic links that lead out of a folder of images.
        classes: names of the classes to take from a store, see ``store.class_names``.
        per_class: number of records to take of each class of a store, see ``StoreSource``.
        allow_empty: accept class folders without images, as ``ImageFolder`` does.
        class_names: names for the classes of a source that has only numbers, such as a classic database.

    Raises:
        ValueError: an unknown kind, or one that does not take an argument.
        SourceError: there is nothing that can be converted, or its kind is ambiguous.
    """
    opened = _open(
        path,
        kind=kind,
        val_labels=val_labels,
        follow_links=follow_links,
        classes=classes,
        per_class=per_class,
        allow_empty=allow_empty,
    )
    if allow_empty and opened.kind != "folder":
        raise ValueError(f"allow_empty with kind {opened.kind!r}, expected it with kind 'folder' only")
    return opened if class_names is None else NamedSource(opened, class_names, where=path)


def _open(
    path: str | os.PathLike[str],
    *,
    kind: str | None,
    val_labels: str | os.PathLike[str] | None,
    follow_links: bool,
    classes: Sequence[str] | None,
    per_class: int | None,
    allow_empty: bool,
) -> Source:
    path = os.fspath(path)
    if not path:
        raise SourceError("the source's path is empty; expected a file or folder")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if val_labels is not None and kind not in (None, "flat"):
        raise ValueError(f"val_labels with kind {kind!r}, expected it with kind 'flat' only")
    matches = _matched(path)
    if val_labels is not None:
        kind = "flat"
    elif kind is None:
        kind = kind_of(matches[0]) if len(matches) == 1 else kind_of_several(path, matches)
    if kind in ("store", "lmdb"):
        store = _open_lmdb(path, matches)
        if kind == "store" or not isinstance(store, ClassicStore):
            wanted = None if classes is None else class_names(classes, store.classes)
            return StoreSource(store, classes=wanted, per_class=per_class)
        kind = "classic"
    for name, value in (("classes", classes), ("per_class", per_class)):
        if value is not None:
            raise ValueError(f"{name} is {value!r}, which needs a store as the source; convert this one first")
    if len(matches) == 1:
        path = matches[0]
    elif kind not in ("webdataset", "parquet", "imagenet-tar"):
        raise SourceError(f"{path}: {len(matches)} files ({listed(matches)}), expected one path for kind {kind!r}")
    if val_labels is not None:
        return FlatSource(path, val_labels=val_labels, follow_links=follow_links)
    if kind == "folder":
        return FolderSource(path, follow_links=follow_links, allow_empty=allow_empty)
    if kind == "webdataset":
        return WebDatasetSource(path)
    if kind == "tar":
        return TarSource(path)
    if kind == "imagenet-tar":
        return ImageNetTarSource(path)
    if kind == "parquet":
        # Imported here: the import is a sixth of a conversion's start-up time.
        from dali_lmdb.convert.sources.parquet import ParquetSource

        return ParquetSource(path)
    if kind == "manifest":
        return ManifestSource(path, follow_links=follow_links)
    if kind == "flat":
        raise SourceError(f"{path}: a flat source needs its labels; give --val-labels FILE (val_labels=FILE)")
    return ClassicSource(path)


def _matched(path: str) -> list[str]:
    """Like ``matches_of``, but keeps the name of a set of shards, which need not exist as a file."""
    if os.path.lexists(path) or "\0" in path:
        return [path]
    shards = shard_files(path)
    if shards and shards[0].name.startswith(f"{Path(path).stem}-"):
        return [path]
    return matches_of(path)


def _open_lmdb(path: str, matches: list[str]) -> Store:
    """Open a classic database or a store.

    Args:
        path: as the user gave it.
        matches: the paths that it matches.
    """
    is_set = all(map(shard_name, matches)) and shard_files(path) == [Path(file) for file in matches]
    if len(matches) > 1 and not is_set:
        raise SourceError(
            f"{path}: {len(matches)} files ({listed(matches)}), expected one database or one set of shards; give "
            "one file, or for a set NAME.lmdb or its folder"
        )
    return open_store(path if is_set else matches[0])
