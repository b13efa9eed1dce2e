"""Tars of class folders, and ImageNet's tar, which holds a tar for each class."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import NamedTuple

from dali_lmdb.convert.sources._archive import Archive, Member
from dali_lmdb.convert.sources._names import check_classes, printable
from dali_lmdb.convert.sources._patterns import files_of
from dali_lmdb.convert.sources._scratch import MemberTable, Spool
from dali_lmdb.convert.sources._whole_files import FileSource
from dali_lmdb.convert.sources.base import Item
from dali_lmdb.errors import SourceError
from dali_lmdb.images.names import is_image_name

__all__ = ["ImageNetTarSource", "TarSource", "class_of_tar", "common_top", "is_tar_name"]

_log = logging.getLogger(__name__)


class _Folder(NamedTuple):
    """The images that lie directly in one folder of an archive."""

    path: str
    """Below the class folders' parent, so it begins with the class: ``n01440764/extra``."""
    archive: Archive
    images: MemberTable
    """Their names without the folder."""


class _ClassFolders(FileSource):
    """The class folders that archives unpack to, in ``ImageFolder``'s order.

    Only one folder's file names at a time are held in memory.
    """

    def __init__(self, path: str | os.PathLike[str], archives: list[Archive]) -> None:
        super().__init__(path, [archive.state for archive in archives])
        self._archives = archives

    @abstractmethod
    def _find(self) -> dict[str, list[_Folder]]:
        """The folders of each class."""

    @cached_property
    def _folders(self) -> dict[str, list[_Folder]]:
        """Folders of each class, classes and folders sorted."""
        _log.info("%s: listing the archive", self._path)
        found = sorted(self._find().items())
        if not found:
            raise SourceError(f"{self._path}: no class folders in it; expected CLASS/IMAGE members")
        check_classes([class_name for class_name, _ in found], where=self._path, are_folders=True)
        for class_name, folders in found:
            if not any(len(folder.images) for folder in folders):
                raise SourceError(
                    f"{self._path}: {printable(class_name)}: no image in this class; pack the tar without it"
                )
        return {name: sorted(folders, key=lambda folder: folder.path) for name, folders in found}

    @property
    def classes(self) -> list[str]:
        return [printable(name) for name in self._folders]

    def items(self) -> Iterator[Item]:
        for label, folders in enumerate(self._folders.values()):
            for path, archive, images in folders:
                for file, offset, size, _ in sorted(images.rows()):
                    name = printable(f"{path}/{file}")
                    yield Item(name, label, partial(archive.read, name, offset, size))


class TarSource(_ClassFolders):
    """A tar of class folders; gives the same records in the same order as ``FolderSource`` on the unpacked tar.

    Folders that hold everything else and no image themselves, such as ``train/``, are stripped from the names.

    Args:
        path: the tar file.

    Raises:
        SourceError: it cannot be read or is compressed; on first use: it is damaged or cut off, or has members
            that are refused (see ``_archive.py``).
    """

    kind = "tar"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, [Archive(path)])
        self._loose = MemberTable(Spool(self.kept_bytes))

    def left_out(self) -> Iterator[tuple[str, str]]:
        if self._folders:  # lists the archive
            for name, *_ in self._loose.rows():
                yield printable(name), "in no class folder"

    def _find(self) -> dict[str, list[_Folder]]:
        (archive,) = self._archives
        spool = Spool(self.kept_bytes)
        tables = defaultdict[str, MemberTable](lambda: MemberTable(spool))
        for member in archive.members(is_image_name):
            folder, _, name = member.path.rpartition("/")
            if member.is_folder:
                if "/." not in f"/{member.path}":  # a hidden folder is a class only if it has images
                    _ = tables[member.path]  # created, so that an empty class is noticed
            else:
                tables[folder].add(name, member.offset, member.size)
        self._loose = tables.pop("", MemberTable(spool))
        if len(self._loose) and not any(map(len, tables.values())):
            raise SourceError(
                f"{archive.path}: {len(self._loose)} images outside class folders; give their labels with "
                "--val-labels FILE"
            )
        top = common_top({path: len(table) for path, table in tables.items()})
        classes: dict[str, list[_Folder]] = {}
        for path, table in tables.items():
            if path.startswith(top):
                path = path[len(top) :]
                classes.setdefault(path.partition("/")[0], []).append(_Folder(path, archive, table))
        return classes


def common_top(folders: Mapping[str, int]) -> str:
    """The deepest ``folder/`` that contains all others and no images of its own; "" if there is none.

    Args:
        folders: number of images directly in each.
    """
    top = ""
    while True:
        inside = [path[len(top) :].partition("/")[0] for path in folders if path.startswith(top)]
        child = top + inside[0] if len(set(inside)) == 1 else ""
        if not child or folders.get(child) or not any(path.startswith(child + "/") for path in folders):
            return top
        top = child + "/"


class ImageNetTarSource(_ClassFolders):
    """``ILSVRC2012_img_train.tar``: a tar that holds a tar of images for each class, ``n01440764.tar``.

    Records and order are those of ``FolderSource`` on ``n01440764/n01440764_18.JPEG`` ...

    Args:
        path: the tar file; or the class tars that it unpacks to: their folder, or a pattern.

    Raises:
        SourceError: as for ``TarSource``.
    """

    kind = "imagenet-tar"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        files = files_of(path, suffix=".tar")
        self._unpacked = os.path.isdir(path) or len(files) > 1
        super().__init__(path, [Archive(file) for file in files])

    def _find(self) -> dict[str, list[_Folder]]:
        classes: dict[str, list[_Folder]] = {}
        spool = Spool(self.kept_bytes)
        for archive, inner in self._class_tars():
            class_name = class_of_tar(str(archive.path) if inner is None else inner.path)
            if class_name in classes:
                found = f"a second tar of class {printable(class_name)!r}; leave one of them out"
                if inner is not None:
                    found = f"{printable(class_name)}.tar is in it twice; pack it again with one"
                raise SourceError(f"{archive.path}: {found}")
            # ``CLASS.tar`` may hold ``x.jpg`` or ``CLASS/x.jpg``: both are in the class's folder.
            tables = defaultdict[str, MemberTable](lambda: MemberTable(spool))
            _ = tables[class_name]  # created, so that an empty class is noticed
            for member in archive.members(is_image_name, inner=inner):
                if not member.is_folder:
                    path = f"{class_name}/{member.path.removeprefix(f'{class_name}/')}"
                    folder, _, file = path.rpartition("/")
                    tables[folder].add(file, member.offset, member.size)
            classes[class_name] = [_Folder(path, archive, table) for path, table in tables.items()]
        return classes

    def _class_tars(self) -> Iterator[tuple[Archive, Member | None]]:
        """Yield (archive, tar inside it) for each class; (archive, None) if the archives are the class tars."""
        for archive in self._archives:
            if self._unpacked:
                yield archive, None
            else:
                yield from ((archive, member) for member in archive.members(is_tar_name) if not member.is_folder)


def is_tar_name(name: str) -> bool:
    """Whether a file is named like a tar."""
    return name.lower().endswith(".tar")


def class_of_tar(path: str) -> str:
    """The class whose images a tar holds: its name without ``.tar``."""
    name = path.rpartition("/")[2]
    return name[: -len(".tar")] if is_tar_name(name) else name
