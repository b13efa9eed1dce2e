"""An image folder read in place, for the classic path without a store."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from dali_lmdb.errors import RecordError, SourceError
from dali_lmdb.store import Store, open_store
from dali_lmdb.store.regular import check_regular
from dali_lmdb.store.shards import shard_files

__all__ = ["FolderStore", "is_image_folder", "open_data"]


def is_image_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a folder to read images from, not one of shards or of a classic database."""
    folder = Path(path)
    return folder.is_dir() and not (folder / "data.mdb").is_file() and not shard_files(folder)


class _VisibleFolders(ImageFolder):  # type: ignore[misc]  # torchvision comes without types
    """An ``ImageFolder`` that ignores hidden folders without images instead of refusing them."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        found = super().find_classes(directory)[0]
        classes = [name for name in found if not name.startswith(".") or _has_images(Path(directory) / name)]
        return classes, {name: label for label, name in enumerate(classes)}


def _has_images(folder: Path) -> bool:
    return any(name.lower().endswith(IMG_EXTENSIONS) for _, _, names in os.walk(folder) for name in names)


class FolderStore(Store):
    """The images of a folder with one folder per class, found by torchvision's ``ImageFolder``.

    A hidden folder (``.git``) is a class only if it has images, as when converting. Only labels and names are
    known; there is no index with checksums, and all sizes are 0.

    Attributes:
        files: path of each image, by record.

    Raises:
        SourceError: no such folder, no class folders in it, or a class without images.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            folder = _VisibleFolders(str(path))
        except (OSError, RuntimeError) as error:
            raise SourceError(
                f"{path}: cannot be read as an image folder: {error}; expected CLASS/IMAGE files"
            ) from error
        self._classes: list[str] = folder.classes
        self.files: list[str] = [file for file, _ in folder.samples]
        self._labels = np.array(folder.targets, dtype=np.int32)
        names = "\n".join(self.name(index) for index in range(len(self)))
        self._fingerprint = "folder-" + hashlib.sha256(names.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def classes(self) -> list[str]:
        return self._classes

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def column(self, name: str) -> npt.NDArray[Any]:
        if name in ("height", "width"):
            return np.zeros(len(self), dtype=np.int32)
        if name != "label":
            raise KeyError(f"an image folder has no column {name!r}, only 'label', 'height' and 'width'")
        return self._labels

    def gather(self, name: str, records: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        return self.column(name)[records]

    def arrays(self, records: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
        try:
            for record in records:
                check_regular(self.files[record], error=RecordError)
            return [np.fromfile(self.files[record], dtype=np.uint8) for record in records]
        except OSError as error:
            raise RecordError(f"{error.filename}: cannot be read: {error.strerror}") from error

    def name(self, index: int) -> str:
        return os.path.relpath(self.files[self._checked_index(index)], self.path)


def open_data(path: str | os.PathLike[str]) -> Store:
    """Open a store, or an image folder as one.

    Raises:
        StoreError, SourceError: it cannot be opened.
    """
    return FolderStore(path) if is_image_folder(path) else open_store(path)
