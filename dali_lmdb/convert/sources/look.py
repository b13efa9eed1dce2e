"""Telling by looking what kind of source a path is."""

from __future__ import annotations

import os
import tarfile
from itertools import islice
from pathlib import Path

from dali_lmdb.convert.sources.archive import COMPRESSED, Archive
from dali_lmdb.convert.sources.base import is_image_name
from dali_lmdb.convert.sources.files import list_folder
from dali_lmdb.convert.sources.patterns import files_of, is_pattern
from dali_lmdb.errors import SourceError
from dali_lmdb.store.shards import shard_files

__all__ = ["kind_of"]

_MEMBERS = 1000  # looked at, at most, to tell what a tar holds
_LMDB_MAGIC = b"\xde\xc0\xef\xbe"  # MDB_MAGIC of lmdb's mdb.c, little-endian, after a page header of 16 bytes
_EXPECTED = (
    "expected a folder of class folders, a tar or WebDataset shards, Parquet files, a CSV or TSV with path "
    "and label, or an LMDB file"
)


def kind_of(path: str) -> str:
    """What is at a path: a ``kind`` of ``open_source``, or ``"lmdb"`` for a classic database or a store.

    Raises:
        SourceError: nothing is there, or nothing that can be converted.
    """
    if os.path.isdir(path):
        return _kind_of_folder(path)
    if is_pattern(path) and not os.path.lexists(path):
        return _kind_of_pattern(path)
    try:
        os.lstat(path)
    except FileNotFoundError:
        if shard_files(path):  # the name that a set of shards was converted to
            return "lmdb"
        raise SourceError(f"{path}: no such file or folder; {_EXPECTED}") from None
    except (OSError, ValueError) as error:  # too long, a file for a folder, a NUL
        raise SourceError(f"{path!r}: cannot be a path: {error}") from error
    return _kind_of_file(path)


def _kind_of_pattern(pattern: str) -> str:
    files = files_of(pattern, suffix=Path(pattern).suffix)
    kind = _kind_of_file(str(files[0]))
    if len(files) > 1 and kind not in ("webdataset", "parquet", "lmdb"):
        raise SourceError(
            f"{pattern}: {len(files)} files, the first of kind {kind!r}; several can be WebDataset shards, "
            "Parquet files or the shards of a store"
        )
    return kind


def _kind_of_folder(folder: str) -> str:
    entries = [entry for entry in list_folder(folder) if not entry.name.startswith(".")]
    names = [entry.name for entry in entries if entry.is_file()]
    if "data.mdb" in names or shard_files(folder):
        return "lmdb"
    if any(entry.is_dir() for entry in entries):
        return "folder"
    suffixes = {os.path.splitext(name)[1] for name in names}
    if ".parquet" in suffixes:
        return "parquet"
    if ".lmdb" in suffixes:
        return "lmdb"
    if ".tar" in suffixes:
        first = next(name for name in names if name.endswith(".tar"))
        kind = _kind_of_tar(os.path.join(folder, first))
        return "webdataset" if kind == "webdataset" else "imagenet-tar"
    if any(map(is_image_name, names)):
        raise SourceError(
            f"{folder}: images, but no class folders; give their labels with --val-labels FILE, or a CSV "
            "with path and label in place of the folder"
        )
    return "folder"


def _kind_of_file(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            head = stream.read(tarfile.BLOCKSIZE)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    if head[16:20] == _LMDB_MAGIC:
        return "lmdb"
    if head.startswith(b"PAR1"):
        return "parquet"
    if _is_tar_header(head) or head.startswith(tuple(COMPRESSED)) or path.endswith(".tar"):
        return _kind_of_tar(path)
    if path.lower().endswith((".csv", ".tsv", ".txt")):
        return "manifest"
    raise SourceError(f"{path}: not a source of images; {_EXPECTED}")


def _is_tar_header(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _kind_of_tar(path: str) -> str:
    """By the first members: labels mean WebDataset, tars ImageNet's nested tar, images class folders."""
    members = Archive(path).members(lambda name: is_image_name(name) or name.endswith((".cls", ".tar")))
    first = [member.path for member in islice(members, _MEMBERS) if not member.is_folder]
    suffixes = {os.path.splitext(name)[1] for name in first}
    if ".cls" in suffixes:
        return "webdataset"
    return "imagenet-tar" if suffixes == {".tar"} else "tar"
