"""``ImageFolderLMDB``, the map-style data set for a ``DataLoader``."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from dali_lmdb.errors import RecordError, SourceError
from dali_lmdb.images.names import IMAGE_EXTENSIONS
from dali_lmdb.images.opening import BadImageError, open_image, pixel_limit, to_rgb
from dali_lmdb.loaders.pillow import pixel_limits
from dali_lmdb.store import Store, open_store

__all__ = ["ImageFolderLMDB", "store_of"]

_Sample = tuple[str, int]


class ImageFolderLMDB(Dataset[tuple[Any, Any]]):
    """A map-style data set over a store; a drop-in replacement for torchvision's ``ImageFolder``.

    Items are ``(image, label)``: a Pillow RGB image and an int, each after its transform; pixel for pixel
    what ``ImageFolder`` gives for the same files. Any process may use it, forked or spawned, before or
    after its parent has; it pickles as a path, unless ``samples``, ``imgs`` or ``targets`` were changed.

    Args:
        path: a store or its path; ``db_path`` and ``root`` are other names for it.
        transform: called with the Pillow image.
        target_transform: called with the label.
        loader: called with an open binary file, to decode it in place of Pillow; torchvision's own loaders stand
            for the default.
        is_valid_file: called once with each record's name (``class/file``), to keep it or not.
        allow_empty: let ``is_valid_file`` leave classes without records.

    Attributes:
        root, db_path: the path.
        classes: class names, sorted.
        class_to_idx: class name to label.
        extensions: the usual extensions of names; None with ``is_valid_file``.

    Raises:
        StoreError: the store cannot be opened.
        SourceError: ``is_valid_file`` leaves a class without records.
    """

    def __init__(
        self,
        path: Store | str | os.PathLike[str] | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        loader: Callable[[Any], Any] | None = None,
        is_valid_file: Callable[[str], bool] | None = None,
        *,
        allow_empty: bool = False,
        db_path: str | os.PathLike[str] | None = None,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        given = [value for value in (path, db_path, root) if value is not None]
        if len(given) != 1:
            raise TypeError(f"{len(given)} of path, db_path and root are given, expected one: the store's path")
        self.store = given[0] if isinstance(given[0], Store) else open_store(given[0])
        self.root = self.db_path = str(self.store.path)
        self.transform = transform
        self.target_transform = target_transform
        is_default = loader is None or getattr(loader, "__module__", "") == "torchvision.datasets.folder"
        self.loader = _load if is_default or loader is None else loader
        self.extensions = IMAGE_EXTENSIONS if is_valid_file is None else None
        self.classes, self.class_to_idx = self.find_classes(self.root)
        self._records, self._labels = self._chosen(is_valid_file)
        if is_valid_file is not None and not allow_empty:
            self._check_classes()

    def find_classes(self, directory: str | os.PathLike[str] | None = None) -> tuple[list[str], dict[str, int]]:
        """Class names and their labels, by default those of the store.

        A subclass may override it, as for ``ImageFolder``: records of classes that are not among the labels are
        left out.
        """
        del directory
        classes = list(self.store.classes)
        return classes, {name: label for label, name in enumerate(classes)}

    def _chosen(
        self, is_valid_file: Callable[[str], bool] | None
    ) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64] | None]:
        """The records of the items, if not all; and the label of each of the store's, if not its own."""
        labels, keep = None, np.ones(len(self.store), dtype=np.bool_)
        new = [self.class_to_idx.get(name, -1) for name in self.store.classes]
        if new != list(range(len(new))):
            labels = np.array(new, np.int64)
            keep &= labels[self.store.labels] >= 0
        if is_valid_file is not None:
            keep &= [bool(is_valid_file(name)) for name in self.store.names().to_pylist()]
        return None if keep.all() else np.flatnonzero(keep), labels

    def _check_classes(self) -> None:
        empty = set(self.class_to_idx.values()) - set(self.targets)
        if empty:
            names = sorted(name for name, label in self.class_to_idx.items() if label in empty)
            raise SourceError(
                f"{self.root}: class {names[0]!r} has no valid record; give allow_empty=True, or another "
                "is_valid_file"
            )

    @cached_property
    def targets(self) -> list[int]:
        """Label of every item: a list, made on first use; assigning to it does not change the items."""
        return self._made_targets()

    def _made_targets(self) -> list[int]:
        labels = self.store.labels if self._records is None else self.store.labels[self._records]
        found: list[int] = (labels if self._labels is None else self._labels[labels]).tolist()
        return found

    @cached_property
    def samples(self) -> list[_Sample]:
        """(name, label) of every item, where ``ImageFolder`` has paths: a list, made on first use.

        The items are those of this list, also after it was changed or another was assigned.
        """
        names = self.store.names()
        if self._records is not None:
            names = names.take(self._records)
        samples = list(zip(names.to_pylist(), self.targets, strict=True))
        self._original = tuple(samples)
        return samples

    @cached_property
    def imgs(self) -> list[_Sample]:
        """``samples``; assigning to it does not change the items."""
        return self.samples

    @property
    def transforms(self) -> Any:
        """Both transforms as torchvision's ``StandardTransform``; None without any."""
        if self.transform is None and self.target_transform is None:
            return None
        from torchvision.datasets.vision import StandardTransform  # not above: it takes a second

        return StandardTransform(self.transform, self.target_transform)

    @property
    def is_whole(self) -> bool:
        """Whether the items are the store's records, with its labels, in its order."""
        return self._records is None and self._labels is None and not self._is_changed

    @property
    def _is_changed(self) -> bool:
        """Whether ``samples`` is no longer as it was made."""
        return "samples" in vars(self) and (
            "_original" not in vars(self) or self.samples != list(self._original)  # compares by identity first
        )

    def __len__(self) -> int:
        if "samples" in vars(self):
            return len(self.samples)
        return len(self.store) if self._records is None else len(self._records)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """``(image, label)`` of an item; negative indices count from the end.

        Raises:
            IndexError: no such item.
            RecordError: its bytes are not an image that Pillow decodes, or ``samples`` was changed and has a name
                that is not that of one record.
        """
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {self.root}: expected 0 to {len(self) - 1}")
        record, label = self._record_and_label(index)
        image = self._image(record)
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label

    def _record_and_label(self, index: int) -> tuple[int, Any]:
        if "samples" in vars(self):
            sample = self.samples[index]
            original = vars(self).get("_original", ())
            if index >= len(original) or sample is not original[index]:
                return self._record_named(sample[0]), sample[1]
        record = index if self._records is None else int(self._records[index])
        label = int(self.store.gather("label", np.array([record]))[0])
        return record, label if self._labels is None else int(self._labels[label])

    def _record_named(self, name: str) -> int:
        record = self._by_name.get(name)
        if record is None:
            raise RecordError(f"{self.root}: samples has {name!r}, expected the name of one of its records")
        return record

    @cached_property
    def _by_name(self) -> dict[str, int | None]:
        """Record by name; None if several have that name."""
        found: dict[str, int | None] = {}
        for record, name in enumerate(self.store.names().to_pylist()):
            found[name] = None if name in found else record
        return found

    def _image(self, record: int) -> Any:
        raw = self.store.read(record)
        if self.loader is not _load:
            return self.loader(io.BytesIO(raw))
        (limit,) = pixel_limits(self.store, np.array([record]))
        try:
            return to_rgb(open_image(raw, max_pixels=limit))
        except BadImageError as error:
            raise RecordError(
                f"{self.store.where(record)}: not an image that Pillow decodes: {error}; convert again without it "
                "(--on-bad skip --check decode)"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        made_again = ["_by_name"]  # in the other process, from the store
        if "targets" in state and self.targets == self._made_targets():
            made_again.append("targets")
        if not self._is_changed and state.get("imgs") in (None, state.get("samples")):
            made_again += ["samples", "imgs", "_original"]
        for name in made_again:
            state.pop(name, None)
        return state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r}, {len(self)} records)"


def store_of(
    data: Store | ImageFolderLMDB | str | os.PathLike[str], *, open_path: Callable[[Any], Store]
) -> Store:
    """The store that a loader's data are: as it is, of a data set, or opened with ``open_path``.

    Raises:
        ValueError: the data set has other records or labels than its store.
    """
    if not isinstance(data, ImageFolderLMDB):
        return data if isinstance(data, Store) else open_path(data)
    if not data.is_whole or data.target_transform is not None:
        raise ValueError(
            f"{data!r} has not all records of its store, or other labels, and a loader takes those of the store; "
            "give dataset.store, and which records to show as sampler="
        )
    return data.store


def _load(file: Any) -> Any:
    """The default ``loader``: an open binary file's image as Pillow's RGB."""
    return to_rgb(open_image(file.read(), max_pixels=pixel_limit(0, 0)))
