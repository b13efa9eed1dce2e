"""WebDataset shards: tar files in which the members of one record share their name up to the first dot."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from dali_lmdb.convert.sources._archive import Archive, Member
from dali_lmdb.convert.sources._names import (
    check_classes,
    numbered_classes,
    printable,
    record_name,
)
from dali_lmdb.convert.sources._patterns import files_of, stems_of
from dali_lmdb.convert.sources._scratch import MemberTable, Spool
from dali_lmdb.convert.sources._whole_files import FileSource
from dali_lmdb.convert.sources.base import Item
from dali_lmdb.errors import SourceError
from dali_lmdb.images.names import IMAGE_EXTENSIONS
from dali_lmdb.store.regular import check_regular

__all__ = ["LABEL_EXTENSION", "WebDatasetSource", "key_and_extension"]

_log = logging.getLogger(__name__)
_CLASSES_FILE = "classes.txt"
LABEL_EXTENSION = ".cls"
_LABEL_BYTES = 32  # a decimal integer, perhaps with a line end


class _Shard(NamedTuple):
    archive: Archive
    images: MemberTable
    max_label: int


class WebDatasetSource(FileSource):
    """Records of an image (``.jpg``, ``.png`` ...) and a ``.cls``, a decimal label; other members are ignored.

    Extensions are case-insensitive.

    Order: shards by name, records as they lie in the shard. Class names come from a file ``classes.txt``
    beside the shards, one per line, or are ``"0"``, ``"1"`` ... A record's name is ``class/member``; where
    shards repeat names, ``class/shard/member``. Image and label need not be adjacent, as ``webdataset`` itself
    requires: until its other half is found, a record's position or label is held in memory.

    Args:
        path: a shard, a folder of shards, or a pattern: ``shards/train-*.tar``,
            ``shards/train-{000..146}.tar``.

    Raises:
        SourceError: as for ``TarSource``; on first use also: a record lacks its image or label.
    """

    kind = "webdataset"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._archives = [Archive(file) for file in files_of(path, suffix=".tar")]
        super().__init__(path, [archive.state for archive in self._archives])
        self._stems = stems_of([archive.path for archive in self._archives])

    def items(self) -> Iterator[Item]:
        for shard, stem in zip(self._shards, self._stems, strict=True):
            prefix = f"{stem}/" if self._repeats else ""
            for file, offset, size, label in shard.images.rows():
                name = record_name(self.classes[label], prefix + file)
                yield Item(name, label, partial(shard.archive.read, name, offset, size))

    @cached_property
    def _shards(self) -> list[_Shard]:
        shards, spool = [], Spool(self.kept_bytes)
        for archive in self._archives:
            _log.info("%s: listing the archive", archive.path)
            shards.append(_read_shard(archive, spool))
        return shards

    @cached_property
    def classes(self) -> list[str]:
        file = self._archives[0].path.with_name(_CLASSES_FILE)
        numbered = numbered_classes([shard.max_label for shard in self._shards], where=self._path)
        try:
            check_regular(file, error=SourceError)
            named = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except FileNotFoundError:
            return numbered
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{file}: cannot be read as a list of class names: {error}") from error
        check_classes(named, where=file)
        if len(named) < len(numbered):
            raise SourceError(
                f"{file}: {len(named)} class names, but the labels need {len(numbered)}, one per line; fix or "
                "remove it"
            )
        return named

    @cached_property
    def _repeats(self) -> bool:
        """Whether shards have members of the same name."""
        names = self._digest_of(lambda: (name for shard in self._shards for name, *_ in shard.images.rows()))
        return names.repeated is not None


def _read_shard(archive: Archive, spool: Spool) -> _Shard:
    """List one shard; labels are read, images are not."""
    images, max_label = MemberTable(spool), 0
    waiting: dict[str, Member | int] = {}  # image or label of records whose other half has not come yet
    wanted = (*IMAGE_EXTENSIONS, LABEL_EXTENSION)
    for member in archive.members(lambda name: key_and_extension(name)[1] in wanted):
        if member.is_folder:
            continue
        key, extension = key_and_extension(member.path)
        if not key or key.endswith("/"):
            raise SourceError(f"{archive.path}: {printable(member.path)!r}: nothing before the dot; rename it")
        half: Member | int = _label(archive, member) if extension == LABEL_EXTENSION else member
        other = waiting.pop(key, None)
        if other is None:
            waiting[key] = half
        elif isinstance(half, Member) and isinstance(other, int):
            images.add(*half, label=other)
            max_label = max(max_label, other)
        elif isinstance(half, int) and isinstance(other, Member):
            images.add(*other, label=half)
            max_label = max(max_label, half)
        else:
            found = "labels" if isinstance(half, int) else "images"
            raise SourceError(f"{archive.path}: record {printable(key)!r}: two {found}, expected one")
    if waiting:
        key, half = next(iter(waiting.items()))
        missing = "image" if isinstance(half, int) else f"label (a {LABEL_EXTENSION} member)"
        raise SourceError(f"{archive.path}: record {printable(key)!r} has no {missing}; pack it again with one")
    if len(images) == 0:
        raise SourceError(f"{archive.path}: no records in it; expected members KEY.jpg and KEY{LABEL_EXTENSION}")
    return _Shard(archive, images, max_label)


def key_and_extension(path: str) -> tuple[str, str]:
    """Split a member's path into its record's key and its extension, in lower case.

    The key ends at the first dot of a path's last part. This is webdataset's rule: ``base_plus_ext`` and
    ``group_by_keys`` of its tariterators.py.
    """
    folder, slash, name = path.rpartition("/")
    base, dot, extension = name.partition(".")
    return folder + slash + base, (dot + extension).lower()


def _label(archive: Archive, member: Member) -> int:
    size = min(member.size, _LABEL_BYTES + 1)
    text = archive.read(printable(member.path), member.offset, size).strip()
    if len(text) > _LABEL_BYTES or not text.isdigit() or int(text) > np.iinfo(np.int32).max:
        found = text.decode("ascii", "backslashreplace")[:_LABEL_BYTES]
        raise SourceError(
            f"{archive.path}: {printable(member.path)!r}: label {found!r}, expected an integer of at least 0"
        )
    return int(text)
