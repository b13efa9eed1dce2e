"""A folder of class folders, by the rules of torchvision's ``ImageFolder``."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from dali_lmdb.convert.sources._files import (
    FolderListing,
    ImageFile,
    check_inside,
    is_as_listed,
    is_file,
    is_folder,
    list_folder,
    list_images,
)
from dali_lmdb.convert.sources._names import printable, repeated_name
from dali_lmdb.convert.sources._scratch import Spool
from dali_lmdb.convert.sources.base import Item, Source
from dali_lmdb.errors import SourceError
from dali_lmdb.images.names import IMAGE_EXTENSIONS, is_image_name

__all__ = ["FolderSource", "advice_below", "has_images"]


_LEVELS_BELOW, _FOLDERS_BELOW = 3, 100  # that ``advice_below`` searches


class FolderSource(Source):
    """Classes are the folder's sub-folders, sorted; images lie in them at any depth.

    A hidden folder (``.git``) is a class only if it has images.

    Order: classes, then the images of each as ``_files.list_images`` gives them, which is ``ImageFolder``'s
    order. The folder is listed once; one class's file names are held in memory at a time.

    Args:
        path: the folder.
        follow_links: follow symbolic links that lead out of the folder, as ``ImageFolder`` does.
        allow_empty: accept classes without images.

    Raises:
        SourceError: no such folder, no class folder in it, a class without images, or a link that leads out.
    """

    kind = "folder"

    def __init__(
        self, path: str | os.PathLike[str], *, follow_links: bool = False, allow_empty: bool = False
    ) -> None:
        self.path = Path(path)
        if not os.path.isdir(path):
            found = "not a folder" if os.path.exists(path) else "no such folder"
            raise SourceError(f"{path}: {found}; expected a folder with one folder of images for each class")
        self._root = os.path.realpath(path)
        self._follow_links, self._allow_empty = follow_links, allow_empty
        self._folders: list[str] = []
        beside: list[str] = []
        for entry in list_folder(str(path)):
            if is_folder(entry) and entry.name.startswith(".") and not has_images(entry.path):
                beside.append(entry.name + "/")
            elif is_folder(entry):
                check_inside(entry.path, root=self._root, follow_links=follow_links)
                self._folders.append(entry.name)
            else:
                beside.append(entry.name)
        self._beside = _compressed(beside)
        if not self._folders:
            raise SourceError(
                f"{path}: no class folders in it; {advice_below(path) or 'expected CLASS/IMAGE files'}"
            )
        self._check_distinct(self._folders)

    @property
    def classes(self) -> list[str]:
        return [printable(name) for name in self._folders]

    def items(self) -> Iterator[Item]:
        """All items in order.

        Raises:
            SourceError: as for the class, or images were added or removed since they were counted.
        """
        prefix = os.path.join(self.path, "")
        for label, folder in enumerate(self._folders):
            for name in self._images(folder, self._listing.of_class(label)):
                file = ImageFile(prefix + name)
                yield Item(printable(name), label, file.read, file.stamp)

    def count(self) -> int:
        return self._listing.num_images

    def left_out(self) -> Iterator[tuple[str, str]]:
        for label in range(len(self._folders)):
            for name in sorted(self._listing.of_class(label).others):
                yield printable(name), "no image file extension"
        for name in json.loads(zlib.decompress(self._beside)):
            yield printable(name), "a hidden folder without images" if name.endswith("/") else "in no class folder"

    def identity(self) -> dict[str, Any]:
        return {
            "path": os.path.abspath(self.path),
            "images": self._listing.num_images,
            "names": self._listing.digest,
        }

    @cached_property
    def _listing(self) -> _Listing:
        num_images, digest, spool = 0, hashlib.sha256(), Spool(self.kept_bytes)
        for folder in self._folders:
            found = self._list(folder)
            num_images += len(found.images)
            digest.update(os.fsencode("\0".join([*found.images, ""])))
            spool.new(_compressed(found))
        return _Listing(num_images, digest.hexdigest()[:32], spool)

    def _list(self, folder: str) -> FolderListing:
        top = os.path.join(self.path, folder)
        found = list_images(top, below=str(self.path), root=self._root, follow_links=self._follow_links)
        if not found.images and not self._allow_empty:
            advice = advice_below(self.path) or "remove the folder, add images or give --allow-empty"
            extensions = " ".join(IMAGE_EXTENSIONS)
            raise SourceError(
                f"{top}: no image in this class folder (expected files ending in {extensions}); {advice}"
            )
        self._check_distinct(found.images)
        return found

    def _images(self, folder: str, listed: FolderListing) -> list[str]:
        """The images of a class as they were counted; a folder is only listed again if it changed since."""
        if not all(is_as_listed(path, changed_ns) for path, changed_ns in listed.folders.items()):
            self._check_same(folder, listed.images, self._list(folder).images)
        return listed.images

    def _check_distinct(self, names: list[str]) -> None:
        """Refuse a name that is not UTF-8 and equals another name once escaped."""
        if any(printable(name) != name for name in names) and (repeated := repeated_name(map(printable, names))):
            raise SourceError(f"{self.path}: {repeated}: two names are equal once escaped; rename one")

    def _check_same(self, folder: str, before: list[str], now: list[str]) -> None:
        where = os.path.join(self.path, folder)
        for what, names in (("vanished", set(before) - set(now)), ("appeared", set(now) - set(before))):
            if names:
                example = printable(min(names))
                raise SourceError(
                    f"{where}: {example} {what} since the images were counted; convert again when nothing "
                    "writes to the folder"
                )


class _Listing(NamedTuple):
    """The folder as it was when its images were counted."""

    num_images: int
    digest: str
    """Hash of all names."""
    spool: Spool
    """Holds each class's ``FolderListing``, compressed: ImageNet's 1.28 million images take 5 MB."""

    def of_class(self, label: int) -> FolderListing:
        return FolderListing(*json.loads(zlib.decompress(self.spool.whole(label))))


def advice_below(top: str | os.PathLike[str]) -> str | None:
    """Name a folder below that looks like the data, as in ``TOP/data has .parquet files, give that``."""
    level = [str(top)]
    for _ in range(_LEVELS_BELOW):
        level = [inside.path for folder in level for inside in _folders_in(folder)][:_FOLDERS_BELOW]
        for folder in level:
            suffixes = {os.path.splitext(entry.name)[1] for entry in list_folder(folder) if is_file(entry)}
            packed = sorted(suffixes & {".parquet", ".tar", ".lmdb", ".mdb"})
            if packed:
                return f"{folder} has {packed[0]} files, give that"
            num_classes = sum(
                any(is_image_name(entry.name) for entry in list_folder(inside.path))
                for inside in _folders_in(folder)
            )
            if num_classes > 1:
                return f"{folder} has {num_classes} folders of images, give that if they are the classes"
    return None


def has_images(folder: str) -> bool:
    """Whether there are images at any depth; links are not followed."""
    return any(is_image_name(name) for _, _, names in os.walk(folder) for name in names)


def _folders_in(folder: str) -> list[os.DirEntry[str]]:
    return [entry for entry in list_folder(folder) if is_folder(entry) and not entry.name.startswith(".")]


def _compressed(value: FolderListing | list[str]) -> bytes:
    return zlib.compress(json.dumps(value).encode(), 1)
