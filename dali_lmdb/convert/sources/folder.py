"""A folder with one folder for each class, by the rules of torchvision's ``ImageFolder``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from dali_lmdb.convert.sources.base import IMAGE_EXTENSIONS, Item, Source, is_image_name
from dali_lmdb.errors import SourceError

__all__ = ["FolderSource"]


class FolderSource(Source):
    """Classes are the folder's sub-folders, sorted; images lie in them at any depth.

    Order: classes, then their folders as ``sorted(os.walk(...))`` gives them, then file names, each sorted as
    strings: ``torchvision.datasets.folder.make_dataset``. One class's file names are held in memory at a time.

    Raises:
        SourceError: no such folder, no class folder in it, or a class without images.
    """

    kind = "folder"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            found = "not a folder" if self.path.exists() else "no such folder"
            raise SourceError(f"{path}: {found}; expected a folder with one folder of images for each class")
        try:
            self._classes = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
        if not self._classes:
            raise SourceError(f"{path}: no class folders in it; expected CLASS/IMAGE files")
        self._root = os.path.realpath(path)

    @property
    def classes(self) -> list[str]:
        return self._classes

    def items(self) -> Iterator[Item]:
        for label, class_name in enumerate(self._classes):
            found = False
            for file in self._class_files(class_name):
                found = True
                name = os.path.relpath(file, self.path).replace(os.sep, "/")
                yield Item(name, label, partial(_read, file), partial(_stamp, file))
            if not found:
                raise SourceError(
                    f"{self.path / class_name}: no image in this class folder (expected files ending in "
                    f"{' '.join(IMAGE_EXTENSIONS)}); remove the folder or add images"
                )

    def count(self) -> int:
        return self._listing[0]

    def identity(self) -> dict[str, Any]:
        count, digest = self._listing
        return {"path": os.path.abspath(self.path), "images": count, "names": digest}

    @cached_property
    def _listing(self) -> tuple[int, str]:
        """Number of images and a hash of their names."""
        count, digest = 0, hashlib.sha256()
        for item in self.items():
            count += 1
            digest.update(item.name.encode(errors="surrogateescape") + b"\n")
        return count, digest.hexdigest()[:32]

    def _class_files(self, class_name: str) -> Iterator[str]:
        def fail(error: OSError) -> None:
            raise SourceError(f"{error.filename}: cannot be read: {error.strerror}; check its permissions")

        top = os.path.join(self.path, class_name)
        for folder, _, files in sorted(os.walk(top, followlinks=True, onerror=fail)):
            for file in sorted(files):
                if is_image_name(file):
                    yield os.path.join(folder, file)


def _read(file: str) -> bytes:
    try:
        with open(file, "rb") as stream:
            before = os.fstat(stream.fileno())
            data = stream.read()
            after = os.fstat(stream.fileno())
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror}") from error
    if len(data) != after.st_size or before.st_mtime_ns != after.st_mtime_ns:
        raise SourceError(f"{file}: changed while it was read; convert again when nothing writes to it")
    return data


def _stamp(file: str) -> int:
    try:
        return os.stat(file).st_mtime_ns
    except OSError as error:
        raise SourceError(f"{file}: cannot be read: {error.strerror}") from error
