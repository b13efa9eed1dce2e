"""Image files in a folder: listed in ``ImageFolder``'s order, read whole, confined to the folder."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dali_lmdb.disk import describe_os_error
from dali_lmdb.errors import SourceError
from dali_lmdb.images.names import is_image_name
from dali_lmdb.images.opening import START_BYTES, BadImageError, check_start
from dali_lmdb.store.layout import MAX_RECORD_BYTES
from dali_lmdb.store.regular import check_regular
from dali_lmdb.store.values import read_at

__all__ = [
    "FolderListing",
    "ImageFile",
    "RefusedImageError",
    "check_inside",
    "is_as_listed",
    "is_file",
    "is_folder",
    "lines_of",
    "list_folder",
    "list_images",
    "read_image",
    "reading",
]

_LARGE_BYTES = 16 << 20
_COARSEST_TIME_NS = 2_000_000_000  # FAT's; NFS, ext4 and others have finer ones


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Convert an ``OSError`` to ``WHERE: cannot be read: CAUSE; ADVICE``.

    Raises:
        SourceError: in place of it.
    """
    try:
        yield
    except OSError as error:
        raise SourceError(describe_os_error(str(where), "cannot be read", error)) from error


def list_folder(path: str) -> list[os.DirEntry[str]]:
    """List a folder, sorted by name.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise SourceError(describe_os_error(path, "cannot be read", error)) from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """``entry.is_dir()``, but False for a link that cannot be followed, such as one that points to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    """``entry.is_file()``, but False for a link that cannot be followed."""
    try:
        return entry.is_file()
    except OSError:
        return False


class FolderListing(NamedTuple):
    """What lies under a folder, at any depth."""

    images: list[str]
    """In the order of ``torchvision.datasets.folder.make_dataset``: by folder as ``sorted(os.walk(top))`` gives
    them, then by file name, as strings."""
    others: list[str]
    """Files that are not named like images."""
    folders: dict[str, int]
    """Time of last change of every folder, in ns since 1970, see ``is_as_listed``."""


def list_images(top: str, *, below: str, root: str, follow_links: bool) -> FolderListing:
    """Find the image files under a folder.

    Args:
        top: the folder.
        below: ``top`` or a folder above it; the paths of images and others are relative to it.
        root: a real path; symbolic links may lead anywhere inside it.
        follow_links: allow links that lead out of it too.

    Raises:
        SourceError: a folder cannot be read, a link leads out of ``root`` or into a folder above itself, or
            an image name belongs to something that is not a file.
    """
    prefix = len(os.path.join(below, ""))
    found, others, folders, pending = [], [], {}, [top]
    while pending:
        folder = pending.pop()
        folders[folder] = _changed_ns(folder)
        files = []
        for entry in list_folder(folder):
            if not is_folder(entry) and not is_image_name(entry.name):
                others.append(entry.path[prefix:])
                continue
            _check_entry(entry, folder, root=root, follow_links=follow_links)
            if is_folder(entry):
                pending.append(entry.path)
            else:
                files.append(entry.name)
        found.append((folder, files))
    images = [os.path.join(folder, file)[prefix:] for folder, files in sorted(found) for file in files]
    return FolderListing(images, others, folders)


def _check_entry(entry: os.DirEntry[str], folder: str, *, root: str, follow_links: bool) -> None:
    """Refuse links out of ``root``, endless loops, and images that are not files."""
    if entry.is_symlink():
        check_inside(entry.path, root=root, follow_links=follow_links)
        real = os.path.realpath(entry.path)
        if is_folder(entry) and (os.path.realpath(folder) + os.sep).startswith(real + os.sep):
            raise SourceError(f"{entry.path}: a link to a folder above itself, an endless loop; remove it")
    if not is_folder(entry) and not is_file(entry):
        found = "a dangling link" if entry.is_symlink() else "not a regular file"
        raise SourceError(f"{entry.path}: {found}, expected an image file; remove it")


def is_as_listed(folder: str, changed_ns: int) -> bool:
    """Whether a folder's listing still holds: no file was added or removed; False if that is unknown.

    Args:
        changed_ns: from ``FolderListing.folders``.
    """
    return 0 != changed_ns == _changed_ns(folder)


def _changed_ns(folder: str) -> int:
    """A folder's time of last change; 0 if it is missing, or so recent that another change may get the same."""
    try:
        changed_ns = os.stat(folder).st_mtime_ns
    except OSError:  # listing it reports why
        return 0
    return changed_ns if changed_ns < time.time_ns() - _COARSEST_TIME_NS else 0


def check_inside(path: str, *, root: str, follow_links: bool) -> None:
    """Refuse a path whose symbolic links lead out of a folder.

    Args:
        root: the folder, a real path.

    Raises:
        SourceError: a link leads out, and ``follow_links`` is false.
    """
    real = os.path.realpath(path)
    if not follow_links and os.path.commonpath((real, root)) != root:
        raise SourceError(
            f"{path}: a link that leads out of {root}, to {real}; remove it, or allow it with --follow-links "
            "(follow_links=True)"
        )


def lines_of(path: Path, *, what: str) -> list[str]:
    """Read the lines of a text file that are not blank, without line ends.

    Args:
        what: what the lines hold, for messages.

    Raises:
        SourceError: it cannot be read, is not UTF-8, or has no such line.
    """
    try:
        with reading(path):
            check_regular(path, error=SourceError)
            text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise SourceError(f"{path}: no {what} in it; expected one on each line")
    return lines


class ImageFile:
    """An image file: provides ``read`` and ``stamp`` of its ``Item``."""

    __slots__ = ("_mtime_ns", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self._mtime_ns: int | None = None

    def read(self) -> bytes:
        """The bytes.

        Raises:
            RefusedImageError: see ``read_image``.
            SourceError: the file is missing, cannot be read, is no regular file, or changes meanwhile.
        """
        path = self.path
        # Kept lean, without ``reading`` and with few system calls: threads queue for the GIL at each.
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                before = os.fstat(descriptor)
                if not stat.S_ISREG(before.st_mode):
                    raise SourceError(f"{path}: not a regular file, expected an image file; remove it")
                self._mtime_ns = before.st_mtime_ns
                data = read_image(descriptor, before.st_size, where=path)
                after = os.fstat(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise SourceError(describe_os_error(path, "cannot be read", error)) from error
        if not len(data) == before.st_size == after.st_size or before.st_mtime_ns != after.st_mtime_ns:
            raise SourceError(f"{path}: changed while it was read; convert again when nothing writes to it")
        return data

    def stamp(self) -> int:
        """Time of last change in ns since 1970: of the file as it was read, else as it is now.

        Raises:
            SourceError: it is missing.
        """
        if self._mtime_ns is not None:
            return self._mtime_ns
        with reading(self.path):
            return os.stat(self.path).st_mtime_ns


class RefusedImageError(SourceError, BadImageError):
    """An image that is not read, since it cannot be stored or is none."""


def read_image(descriptor: int, num_bytes: int, offset: int = 0, *, where: object) -> bytes:
    """Read an image from an open file; fewer bytes if the file ends there.

    A large file that does not begin like an image is refused unread: all of it would be in memory.

    Raises:
        RefusedImageError: too large for a record, or large and not an image.
        OSError: it cannot be read.
    """
    found = f"{where}: {num_bytes:,} bytes"
    if num_bytes > MAX_RECORD_BYTES:
        raise RefusedImageError(f"{found}, a record holds {MAX_RECORD_BYTES:,} at most; remove it")
    if num_bytes > _LARGE_BYTES:
        try:
            check_start(read_at(descriptor, START_BYTES, offset))
        except BadImageError as error:
            raise RefusedImageError(f"{found}, {error}; remove it") from error
    return read_at(descriptor, num_bytes, offset)
