"""Export a store's image files, byte for byte: to class folders, or to WebDataset tar shards."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from dali_lmdb.disk import sync_folder
from dali_lmdb.errors import ConversionError, RecordError
from dali_lmdb.images.names import is_image_name
from dali_lmdb.inspect.paths import extension_of, record_paths, tells_case_apart
from dali_lmdb.inspect.records import (
    Part,
    Progress,
    in_order,
    names_of,
    parts_of,
    runs,
    values_of,
)
from dali_lmdb.store import Store, open_store
from dali_lmdb.store.checksum import crc32
from dali_lmdb.threads import threads_to_read

__all__ = ["SHARD_SIZE_BYTES", "ExportSummary", "export"]

SHARD_SIZE_BYTES = 1_000_000_000
"""Default size of a tar shard: WebDataset's documentation recommends 1 GB or more."""

_EXTENSION = re.compile(r"\.[a-z0-9]{1,8}")
_TAR_BLOCK_BYTES = 512
_CLASSES_FILE = "classes.txt"

_Show = Callable[[Progress], None]


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """The result of an export."""

    folder: str
    records: int
    num_bytes: int
    """Size of all records."""
    classes: int
    tars: int
    """Tar shards written; 0 for class folders."""


def export(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    tar: bool = False,
    shard_size_bytes: int | None = None,
    per_shard: int | None = None,
    num_threads: int | None = None,
    progress: _Show | None = None,
) -> ExportSummary:
    """Write a store's images as files named like its records, each in its class's folder.

    A name that does not end as an image's gets the extension of the image's kind: the folder can be converted.
    Names are checked before anything is written. Files are written to ``FOLDER.partial``, which is renamed to
    ``FOLDER`` at the end, or removed on an error or an interrupt.

    Args:
        path: a store.
        folder: must not exist or be empty.
        tar: write WebDataset shards instead, ``FOLDER/FOLDER-000000.tar`` and so on, of ``000000041.jpg`` and
            ``000000041.cls`` (the label) for record 41, and ``classes.txt``. Equal stores give equal shards.
        shard_size_bytes: start a new shard before one gets larger; by default ``SHARD_SIZE_BYTES``.
        per_shard: start a new shard after this many records; by default there is no such limit.
        num_threads: number of threads that write files; by default the cores this process may use, at least 4.
        progress: called from time to time.

    Raises:
        StoreError: the store cannot be used.
        RecordError: a record's checksum is wrong, or its name cannot be a file's name inside ``folder``.
        ConversionError: ``folder`` cannot be written.
        ValueError: limits of tar shards without ``tar``, or below 1.
    """
    if not tar and (shard_size_bytes is not None or per_shard is not None):
        raise ValueError("limits of tar shards were given without tar")
    for name, limit in (("shard_size_bytes", shard_size_bytes), ("per_shard", per_shard)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is {limit}, expected at least 1")
    target = Path(os.path.realpath(folder))
    with open_store(path) as store:
        _check_labels(store)
        if tar:
            _check_class_lines(store)
        with _publishing(target) as partial:
            if tar:
                writer: _FolderWriter | _TarWriter = _TarWriter(
                    store,
                    partial,
                    name=target.name,
                    shard_size_bytes=shard_size_bytes or SHARD_SIZE_BYTES,
                    per_shard=per_shard,
                )
            else:
                writer = _FolderWriter(store, partial, num_threads=num_threads or threads_to_read())
            writer.run(progress)
            return ExportSummary(
                folder=str(folder),
                records=len(store),
                num_bytes=writer.num_bytes,
                classes=len(store.classes),
                tars=writer.tars,
            )


@contextlib.contextmanager
def _publishing(target: Path) -> Iterator[Path]:
    """Yield a new folder beside ``target``; rename it to ``target`` on success, remove it on failure."""
    _check_target(target)
    partial = target.with_name(target.name + ".partial")
    try:
        partial.mkdir()
    except FileExistsError:
        raise ConversionError(
            f"{partial}: already exists; remove it if no other export to {target} is running"
        ) from None
    except OSError as error:
        raise ConversionError(f"{partial}: cannot be created: {error.strerror}; check its folder") from error
    try:
        yield partial
        _sync_file_system(partial)
        os.rename(partial, target)
        sync_folder(target.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConversionError(f"{target}: cannot be written: {error.strerror}; nothing was left there") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_target(target: Path) -> None:
    if not target.parent.is_dir():
        raise ConversionError(f"{target}: its folder {target.parent} does not exist; create it first")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ConversionError(f"{target}: exists and is not a folder; choose another name")
    if os.path.ismount(target):
        raise ConversionError(f"{target}: a mount point cannot be replaced; name a folder inside it")
    try:
        with os.scandir(target) as entries:
            empty = next(entries, None) is None
    except OSError as error:
        raise ConversionError(f"{target}: cannot be read: {error.strerror}; choose another") from error
    if not empty:
        raise ConversionError(f"{target}: exists and is not empty; choose another name")


def _sync_file_system(folder: Path) -> None:
    """Flush all files to disk with one syncfs(2); a million calls of fsync would take minutes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)


class _FolderWriter:
    """Writes each record to ``class/file``."""

    tars = 0

    def __init__(self, store: Store, folder: Path, *, num_threads: int) -> None:
        self.store, self.folder, self.num_threads = store, folder, num_threads
        self.num_bytes = 0

    def run(self, progress: _Show | None) -> None:
        """Create all folders, then write all files in threads."""
        self.paths = record_paths(
            self.store,
            fold_case=not tells_case_apart(self.folder),
            max_name_bytes=os.pathconf(self.folder, "PC_NAME_MAX"),
        )
        folders = set(self.store.classes)  # even without records, so that labels stay the same
        for chunk in self.paths.chunks:
            folders |= {path.rpartition("/")[0] for path in chunk.to_pylist()}
        for folder in sorted(folders):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        done, total = 0, len(self.store)
        tasks = ((part, run) for part in parts_of(self.store) for run in runs(len(part.store)))
        for records, num_bytes in in_order(self._write_run, tasks, num_threads=self.num_threads):
            done, self.num_bytes = done + records, self.num_bytes + num_bytes
            if progress is not None:
                progress(Progress("writing files", done, total, self.num_bytes))

    def _write_run(self, task: tuple[Part, range]) -> tuple[int, int]:
        part, run = task
        num_bytes = 0
        for record, data in _values(part, run):
            num_bytes += len(data)
            # "x" neither overwrites a file nor follows a link.
            with open(self.folder / self.paths[part.first + record].as_py(), "xb") as file:
                file.write(data)
        return len(run), num_bytes


class _TarWriter:
    """Writes records in order to consecutive tars."""

    def __init__(
        self, store: Store, folder: Path, *, name: str, shard_size_bytes: int, per_shard: int | None
    ) -> None:
        self.store, self.folder, self.name = store, folder, name
        self.shard_size_bytes, self.per_shard = shard_size_bytes, per_shard
        self.num_bytes = self.tars = 0
        self._tar: tarfile.TarFile | None = None
        self._in_tar = 0

    def run(self, progress: _Show | None) -> None:
        """Write classes.txt and the shards."""
        names, kinds = names_of(self.store), self.store.column("kind")
        lines = "".join(f"{name}\n" for name in self.store.classes)
        (self.folder / _CLASSES_FILE).write_text(lines, encoding="utf-8", newline="")
        done, total = 0, len(self.store)
        try:
            for part in parts_of(self.store):
                for run in runs(len(part.store)):
                    for record, data in _values(part, run):
                        index = part.first + record
                        extension = _extension(names[index].as_py(), int(kinds[index]))
                        self._add(f"{index:09d}", extension, data, int(part.store.labels[record]))
                        self.num_bytes += len(data)
                    done += len(run)
                    if progress is not None:
                        progress(Progress("writing tars", done, total, self.num_bytes))
        finally:
            if self._tar is not None:
                self._tar.close()

    def _add(self, key: str, extension: str, data: bytes, label: int) -> None:
        members = [(key + extension, data), (key + ".cls", str(label).encode())]
        need = sum(
            _TAR_BLOCK_BYTES + -(-len(value) // _TAR_BLOCK_BYTES) * _TAR_BLOCK_BYTES for _, value in members
        )
        tar = self._tar
        if tar is None or self._in_tar == self.per_shard or _tar_bytes(tar.offset + need) > self.shard_size_bytes:
            if tar is not None:
                tar.close()
            # USTAR: no field that depends on time or machine. A record is at most 4 GiB, which it supports.
            tar = tarfile.open(  # noqa: SIM115  closed by run()
                self.folder / f"{self.name}-{self.tars:06d}.tar", "x", format=tarfile.USTAR_FORMAT
            )
            self._tar, self._in_tar, self.tars = tar, 0, self.tars + 1
        for name, value in members:
            member = tarfile.TarInfo(name)  # mode 644, owner root, time 0
            member.size = len(value)
            tar.addfile(member, io.BytesIO(value))
        tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps all of them
        self._in_tar += 1


def _tar_bytes(content_bytes: int) -> int:
    """Size of a tar with its end: two empty blocks, then padding to whole records."""
    return -(-(content_bytes + 2 * _TAR_BLOCK_BYTES) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _values(part: Part, run: range) -> Iterator[tuple[int, bytes]]:
    """Yield (record, value) of consecutive records of one file, after validating their checksums.

    Raises:
        RecordError: a record's checksum is wrong or it cannot be read.
    """
    store = part.store
    checksums = store.gather("crc32", np.arange(run.start, run.stop)).tolist()
    try:
        for record, checksum, data in zip(run, checksums, values_of(store, run), strict=True):
            if crc32(data) != checksum:
                raise RecordError(
                    f"{store.where(record)}: wrong checksum; see what else is damaged with: "
                    f"dali-lmdb verify {store.path}"
                )
            yield record, data
    except OSError as error:
        raise RecordError(f"{store.path}: cannot be read: {error.strerror}; check the disk") from error


def _check_labels(store: Store) -> None:
    labels = store.labels
    for record in np.flatnonzero((labels < 0) | (labels >= len(store.classes))):
        raise RecordError(
            f"{store.where(int(record))}: label {labels[record]}, expected 0 to {len(store.classes) - 1}; "
            f"see what else is damaged with: dali-lmdb verify {store.path}"
        )


def _check_class_lines(store: Store) -> None:
    for name in store.classes:
        if name.splitlines() != [name] or not name.isprintable():
            raise ConversionError(
                f"{store.path}: class {name!r} cannot be a line of {_CLASSES_FILE}; export it without --tar"
            )


def _extension(name: str, kind: int) -> str:
    """Extension of a tar member: the name's, in lower case, or the kind's if tar readers could not use that."""
    extension, usual = PurePosixPath(name).suffix.lower(), extension_of(kind)
    if is_image_name(extension) or (not usual and _EXTENSION.fullmatch(extension) and extension != ".cls"):
        return extension
    return usual or ".jpg"
