"""Images in one flat folder or tar with their labels in a text file, such as ImageNet's validation set."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

from dali_lmdb.convert.sources._archive import Archive, Member
from dali_lmdb.convert.sources._files import ImageFile, lines_of, list_images
from dali_lmdb.convert.sources._names import (
    classes_of,
    integer,
    printable,
    record_name,
    safe_path,
)
from dali_lmdb.convert.sources._whole_files import FileSource, FileState
from dali_lmdb.convert.sources.base import Item
from dali_lmdb.errors import SourceError
from dali_lmdb.images.names import is_image_name

__all__ = ["FlatSource"]


class FlatSource(FileSource):
    """Images that do not lie in class folders.

    The labels file is one of:

    * ``path label`` on each line, separated by spaces or a tab: the path inside the folder or tar, and a
      class name or an integer (Caffe's ``val.txt``);
    * one label per line, in the order of the sorted image names
      (``imagenet_2012_validation_synset_labels.txt``: line *i* belongs to ``ILSVRC2012_val_0000000i.JPEG``).

    If all labels are integers, they are used as they are; otherwise the classes are the distinct labels,
    sorted, as with class folders. Records are named ``class/file`` and ordered by class, then name:
    those ``FolderSource`` would give with the images moved into class folders. Names and labels of all images are
    held in memory, about 500 bytes for each: this is meant for validation sets.

    Args:
        path: a folder or an uncompressed tar.
        val_labels: the labels file, UTF-8.
        follow_links: follow symbolic links that lead out of the folder.

    Raises:
        SourceError: the folder, tar or labels file cannot be read or is malformed; on first
            use: images and labels do not match, or a member is refused (see ``_archive.py``).
    """

    kind = "flat"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        val_labels: str | os.PathLike[str],
        follow_links: bool = False,
    ) -> None:
        self.path, self.labels_path = Path(path), Path(val_labels)
        if not os.path.exists(path):
            raise SourceError(f"{path}: no such folder or tar")
        self._archive = None if os.path.isdir(path) else Archive(path)
        self._follow_links = follow_links
        labels = FileState.of(val_labels)
        self._lines = _read_lines(self.labels_path)
        super().__init__(path, [labels] if self._archive is None else [labels, self._archive.state])

    @property
    def classes(self) -> list[str]:
        return self._labelled[0]

    def items(self) -> Iterator[Item]:
        classes, labels, images = self._labelled
        rows = zip(labels, _without_top(images), images, strict=True)
        for label, path, image in sorted(rows, key=lambda row: (row[0], *os.path.split(row[1]))):
            name = record_name(classes[label], path)
            if self._archive is not None:
                read = partial(self._archive.read, name, image.offset, image.size)
                yield Item(name, label, read)
            else:
                file = ImageFile(os.path.join(self.path, image.path))
                yield Item(name, label, file.read, file.stamp)

    @cached_property
    def _labelled(self) -> tuple[list[str], list[int], list[Member]]:
        """(classes, label of each image, images sorted by path)."""
        images = sorted(self._images(), key=lambda image: image.path)
        if all(len(line) == 1 for line in self._lines):
            texts = self._labels_in_order(len(images))
        else:
            texts = self._labels_by_path(images)
        classes = classes_of(texts, where=self.labels_path)
        label_of = {name: label for label, name in enumerate(classes)}
        return classes, [label_of[text] for text in texts], images

    def _images(self) -> Iterator[Member]:
        """Yield the images of the tar, or of the folder with offset and size 0."""
        if self._archive is not None:
            yield from (member for member in self._archive.members(is_image_name) if not member.is_folder)
            return
        top = str(self.path)
        found = list_images(top, below=top, root=os.path.realpath(top), follow_links=self._follow_links)
        for file in found.images:
            yield Member(file, 0, 0)

    def _labels_in_order(self, num_images: int) -> list[str]:
        texts = [line[0] for line in self._lines]
        if len(texts) != num_images:
            raise SourceError(
                f"{self.labels_path}: {len(texts)} labels, but {self.path} has {num_images} images; "
                "expected one label for each, in the order of their names"
            )
        if "0" not in texts and all(integer(text) is not None for text in texts):
            raise SourceError(
                f"{self.labels_path}: integers without 0; ILSVRC2012_validation_ground_truth.txt numbers the "
                "classes in another order than their names; give a list of synset names (n01440764), one a line"
            )
        return texts

    def _labels_by_path(self, images: list[Member]) -> list[str]:
        label_of: dict[str, str] = {}
        for number, line in enumerate(self._lines, start=1):
            where = f"{self.labels_path}: label {number}"
            if len(line) != 2:
                raise SourceError(f"{where}: {' '.join(line)[:80]!r}, expected a path and a label")
            path = safe_path(line[0], where=where)
            if path in label_of:
                raise SourceError(f"{where}: {path!r} is listed twice; remove one of its lines")
            label_of[path] = line[1]
        texts = []
        for image, short in zip(images, _without_top(images), strict=True):
            text = label_of.pop(image.path, None) or label_of.pop(short, None)
            if text is None:
                raise SourceError(
                    f"{self.labels_path}: no label for {printable(image.path)!r} of {self.path}; add it"
                )
            texts.append(text)
        if label_of:
            path = next(iter(label_of))
            raise SourceError(
                f"{self.labels_path}: {path!r} is not in {self.path}; remove its line or add the image"
            )
        return texts


def _without_top(images: list[Member]) -> list[str]:
    """Paths relative to the folder that they share."""
    top = os.path.commonpath([os.path.dirname(image.path) for image in images]) if images else ""
    return [image.path[len(top) + 1 if top else 0 :] for image in images]


def _read_lines(path: Path) -> list[list[str]]:
    """Split each line that is not blank into (path, label) or (label,).

    Raises:
        SourceError: as ``lines_of``, or a line has another form.
    """
    texts = [line.strip() for line in lines_of(path, what="labels")]
    lines = [text.rsplit(None, 1) for text in texts]  # paths may contain spaces, labels do not
    for number, (text, line) in enumerate(zip(texts, lines, strict=True), start=1):
        first = re.split("[,;]", line[0])[0]
        if is_image_name(line[0]) if len(line) == 2 else not is_image_name(first):
            continue
        columns = text.split("\t") if "\t" in text else text.split()
        remedy = "separate them by a space or a tab"
        if len(columns) > 2 and is_image_name(columns[0]):
            option = "" if "\t" in text else "-d' ' "
            remedy = f"keep the first two of {len(columns)} columns: cut {option}-f1,2 {path}"
        raise SourceError(
            f"{path}: label {number}: {text[:80]!r}, expected a path and a label, or a label alone; {remedy}"
        )
    return lines
