"""``ImageFolderLMDB``, the map-style data set for a ``DataLoader``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dali_lmdb.errors import RecordError
from dali_lmdb.images.opening import BadImageError, open_image, to_rgb
from dali_lmdb.loaders.pillow import pixel_limits
from dali_lmdb.store import Store, open_store

__all__ = ["ImageFolderLMDB"]


class ImageFolderLMDB(Dataset[tuple[Any, Any]]):
    """A map-style data set over a store; a drop-in replacement for torchvision's ``ImageFolder``.

    Items are ``(image, label)``: a Pillow RGB image and an int, each after its transform; pixel for pixel
    what ``ImageFolder`` gives for the same files. Any process may use it, forked or spawned, before or
    after its parent has; it pickles as a path.

    Args:
        path: a store or its path.
        transform: called with the Pillow image.
        target_transform: called with the label.

    Attributes:
        classes: class names, sorted.
        class_to_idx: class name to label.
        targets: label of every record, a list of ints.
        samples, imgs: (name, label) of every record, as a list.

    Raises:
        StoreError: the store cannot be opened.
    """

    def __init__(
        self,
        path: Store | str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.store = path if isinstance(path, Store) else open_store(path)
        self.transform = transform
        self.target_transform = target_transform
        self.classes = list(self.store.classes)
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}

    @property
    def targets(self) -> list[int]:
        return [int(label) for label in self.store.labels]

    @property
    def samples(self) -> list[tuple[str, int]]:
        """(name, label) of every record; ``ImageFolder`` has paths instead of names. Read again on each access."""
        return [(self.store.name(index), label) for index, label in enumerate(self.targets)]

    imgs = samples

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """``(image, label)`` of a record; negative indices count from the end.

        Raises:
            IndexError: no such record.
            RecordError: its bytes are not an image that Pillow decodes.
        """
        if index < 0:
            index += len(self)
        raw, (limit,) = self.store.read(index), pixel_limits(self.store, np.array([index]))
        try:
            image: Any = to_rgb(open_image(raw, max_pixels=limit))
        except BadImageError as error:
            raise RecordError(
                f"{self.store.where(index)}: not an image that Pillow decodes: {error}; convert again without it "
                "(--on-bad skip --check decode)"
            ) from error
        label: Any = int(self.store.gather("label", np.array([index]))[0])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.store.path)!r}, {len(self)} records)"
