"""Image files in a folder: found in ``ImageFolder``'s order, read whole, never outside the folder unasked."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dali_lmdb.convert.sources.base import is_image_name
from dali_lmdb.errors import SourceError
from dali_lmdb.store.layout import MAX_RECORD_BYTES
from dali_lmdb.store.regular import check_regular

__all__ = [
    "ImageFile",
    "check_inside",
    "check_size",
    "identity_of_files",
    "image_files",
    "lines_of",
    "list_folder",
]


def list_folder(path: str) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted by name.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error


def image_files(top: str, *, root: str, follow_links: bool, others: list[str] | None = None) -> Iterator[str]:
    """Paths of the image files under a folder, at any depth.

    Order: folders as ``sorted(os.walk(top))`` gives them, then file names, each sorted as strings, which is
    the order of ``torchvision.datasets.folder.make_dataset``. The file names are held in memory.

    Args:
        top: the folder.
        root: symbolic links may lead anywhere inside this folder; a real path.
        follow_links: they may lead out of it, too.
        others: gets the paths of what is no image by its name.

    Raises:
        SourceError: a folder cannot be read, a link leads out of ``root`` or into a folder above itself, or
            an image name belongs to something that is not a file.
    """
    found, pending = [], [top]
    while pending:
        folder = pending.pop()
        files, below = _images_and_folders(folder, root, follow_links, others)
        found.append((folder, files))
        pending.extend(below)
    for folder, files in sorted(found):
        prefix = os.path.join(folder, "")
        for file in files:
            yield prefix + file


def _images_and_folders(
    folder: str, root: str, follow_links: bool, others: list[str] | None
) -> tuple[list[str], list[str]]:
    """Names of the images in a folder, sorted, and paths of the folders in it."""
    files, folders = [], []
    for entry in list_folder(folder):
        is_folder = entry.is_dir()
        if not is_folder and not is_image_name(entry.name):
            if others is not None:
                others.append(entry.path)
            continue
        if entry.is_symlink():
            check_inside(entry.path, root=root, follow_links=follow_links)
            real = os.path.realpath(entry.path)
            if is_folder and (os.path.realpath(folder) + os.sep).startswith(real + os.sep):
                raise SourceError(f"{entry.path}: a link to a folder above itself, an endless loop; remove it")
        if is_folder:
            folders.append(entry.path)
        elif entry.is_file():
            files.append(entry.name)
        else:
            found = "a link to nothing" if entry.is_symlink() else "not a regular file"
            raise SourceError(f"{entry.path}: {found}, expected an image file; remove it")
    return files, folders


def check_inside(path: str, *, root: str, follow_links: bool) -> None:
    """Refuse a path whose symbolic links lead out of a folder.

    Args:
        root: the folder, a real path.

    Raises:
        SourceError: they do, and ``follow_links`` is false.
    """
    real = os.path.realpath(path)
    if not follow_links and os.path.commonpath((real, root)) != root:
        raise SourceError(
            f"{path}: a link that leads out of {root}, to {real}; remove it, or allow it with --follow-links "
            "(follow_links=True)"
        )


def lines_of(path: Path, *, what: str) -> list[str]:
    """The lines of a text file that are not blank, without their ends.

    Args:
        what: what is on them, for messages.

    Raises:
        SourceError: it cannot be read, is not UTF-8, or has no such line.
    """
    try:
        check_regular(path, error=SourceError)
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise SourceError(f"{path}: no {what} in it; expected one on each line")
    return lines


class ImageFile:
    """An image in a file of its own: ``read`` and ``stamp`` of its ``Item``.

    Args:
        path: of a regular file.
        check: called with the path before it is read.
    """

    __slots__ = ("_check", "_mtime_ns", "_path")

    def __init__(self, path: str, *, check: Callable[[str], None] | None = None) -> None:
        self._path, self._check = path, check
        self._mtime_ns: int | None = None

    def read(self) -> bytes:
        """The bytes.

        Raises:
            SourceError: the file is missing, cannot be read, is no regular file, or changes meanwhile.
        """
        path = self._path
        if self._check is not None:
            self._check(path)
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                before = os.fstat(descriptor)
                if not stat.S_ISREG(before.st_mode):
                    raise SourceError(f"{path}: not a regular file, expected an image file; remove it")
                check_size(before.st_size, where=path)
                data = os.read(descriptor, before.st_size + 1)  # one more, to see that it ends there
                while 0 < len(data) < before.st_size and (more := os.read(descriptor, before.st_size - len(data))):
                    data += more
                after = os.fstat(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
        if not len(data) == before.st_size == after.st_size or before.st_mtime_ns != after.st_mtime_ns:
            raise SourceError(f"{path}: changed while it was read; convert again when nothing writes to it")
        self._mtime_ns = before.st_mtime_ns
        return data

    def stamp(self) -> int:
        """When the file was last changed, in ns since 1970: what was read, or if nothing was, what is there.

        Raises:
            SourceError: it is missing.
        """
        if self._mtime_ns is not None:
            return self._mtime_ns
        try:
            return os.stat(self._path).st_mtime_ns
        except OSError as error:
            raise SourceError(f"{self._path}: cannot be read: {error.strerror}") from error


def check_size(num_bytes: int, *, where: object) -> None:
    """Refuse an image that no record can hold, before memory is asked for it.

    Raises:
        SourceError: it is larger than ``MAX_RECORD_BYTES``.
    """
    if num_bytes > MAX_RECORD_BYTES:
        raise SourceError(f"{where}: {num_bytes:,} bytes, a record holds {MAX_RECORD_BYTES:,} at most; remove it")


def identity_of_files(path: object, files: list[tuple[Path, int, int]]) -> dict[str, Any]:
    """What must stay the same of a source made of whole files.

    Args:
        path: as the user gave it.
        files: path, size and time of last change of each, in order.
    """
    digest = hashlib.sha256()
    for file, size, mtime_ns in files:
        digest.update(os.fsencode(f"{os.path.abspath(file)}\0{size}\0{mtime_ns}\n"))
    return {
        "path": os.path.abspath(str(path)),
        "files": len(files),
        "bytes": sum(size for _, size, _ in files),
        "modified_ns": max(mtime_ns for _, _, mtime_ns in files),
        "state": digest.hexdigest()[:32],
    }
