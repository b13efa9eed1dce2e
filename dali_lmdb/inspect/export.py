"""Export a store's image files, byte for byte: to class folders, or to WebDataset tar shards."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from dali_lmdb.errors import ConversionError, RecordError
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.names import is_image_name
from dali_lmdb.inspect.paths import extension_of, is_case_sensitive, record_paths
from dali_lmdb.inspect.publishing import publishing
from dali_lmdb.inspect.records import Progress, ProgressCallback, in_order, runs
from dali_lmdb.store import Store, open_store
from dali_lmdb.threads import threads_to_read

__all__ = ["SHARD_SIZE_BYTES", "ExportSummary", "export"]

SHARD_SIZE_BYTES = 1_000_000_000
"""Default size of a tar shard: WebDataset's documentation recommends 1 GB or more."""

_JPEG = frozenset(kind for kind in Kind if kind.is_jpeg)
_TAR_END_BYTES = 2 * tarfile.BLOCKSIZE  # two empty blocks
_CLASSES_FILE = "classes.txt"

_Written = Generator[tuple[int, int], None, None]
"""(records, bytes) of each run of records that is written."""


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
    progress: ProgressCallback | None = None,
) -> ExportSummary:
    """Write a store's images as files named like its records, each in its class's folder.

    A name without an image's extension gets that of the image's kind, so that the folder can be converted again.
    Names are checked before anything is written. Files are written to ``FOLDER.partial``, which is renamed to
    ``FOLDER`` at the end, or removed on an error or an interrupt; see ``publishing.py``.

    Args:
        path: a store.
        folder: where to; it must be empty or not exist yet.
        tar: write WebDataset shards instead, ``FOLDER/FOLDER-000000.tar`` and so on, with ``000000041.jpg``,
            ``000000041.cls`` (the label) and ``000000041.json`` (``{"name": …}``) for record 41, and
            ``classes.txt``. Every JPEG is a ``.jpg``. Equal stores give identical shards.
        shard_size_bytes: start a new shard before the current one exceeds this; by default ``SHARD_SIZE_BYTES``.
        per_shard: start a new shard after this many records; by default there is no such limit.
        num_threads: number of threads that write files; by default the cores this process may use, at least 4.
        progress: called from time to time.

    Raises:
        StoreError: the store cannot be used.
        RecordError: a record's checksum is wrong, or its name cannot be a file's name inside ``folder``.
        ConversionError: ``folder`` cannot be written.
        ValueError: limits of tar shards without ``tar``, or a number below 1.
    """
    if not tar and (shard_size_bytes is not None or per_shard is not None):
        raise ValueError("limits of tar shards were given without tar")
    for name, limit in (("shard_size_bytes", shard_size_bytes), ("per_shard", per_shard)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is {limit}, expected at least 1")
    num_threads, target = threads_to_read(num_threads), Path(os.path.realpath(folder))
    with open_store(path) as store:
        _check_labels(store)
        if tar:
            _check_class_lines(store)
        with publishing(target) as partial:
            if tar:
                runs_written = _write_tars(
                    store,
                    partial,
                    name=target.name,
                    shard_size_bytes=shard_size_bytes or SHARD_SIZE_BYTES,
                    per_shard=per_shard,
                )
            else:
                runs_written = _write_files(store, partial, num_threads=num_threads)
            done = num_bytes = 0
            with contextlib.closing(runs_written):  # threads end before an error removes the folder
                for run_records, run_bytes in runs_written:
                    done, num_bytes = done + run_records, num_bytes + run_bytes
                    if progress is not None:
                        progress(Progress(f"writing {'tars' if tar else 'files'}", done, len(store), num_bytes))
            num_tars = len(list(partial.glob("*.tar"))) if tar else 0
        return ExportSummary(
            folder=str(folder), records=done, num_bytes=num_bytes, classes=len(store.classes), tars=num_tars
        )


def _write_files(store: Store, folder: Path, *, num_threads: int) -> _Written:
    """Write each record to ``class/file`` in threads."""
    paths = record_paths(
        store, fold_case=not is_case_sensitive(folder), max_name_bytes=os.pathconf(folder, "PC_NAME_MAX")
    )
    folders = set(store.classes)  # even without records, so that labels stay the same
    for chunk in paths.chunks:
        folders |= {path.rpartition("/")[0] for path in chunk.to_pylist()}
    for name in sorted(folders):
        (folder / name).mkdir(parents=True, exist_ok=True)

    def write(run: range) -> tuple[int, int]:
        num_bytes = 0
        for record, data in zip(run, store.checked_copies(run), strict=True):
            num_bytes += len(data)
            # "x" neither overwrites a file nor follows a link.
            with open(folder / paths[record].as_py(), "xb") as file:
                file.write(data)
        return len(run), num_bytes

    yield from in_order(write, runs(len(store)), num_threads=num_threads)


def _write_tars(
    store: Store, folder: Path, *, name: str, shard_size_bytes: int, per_shard: int | None
) -> _Written:
    """Write classes.txt, then the records in order to consecutive tars."""
    names, kinds, labels = store.names(), store.column("kind"), store.labels
    lines = "".join(f"{name}\n" for name in store.classes)
    (folder / _CLASSES_FILE).write_text(lines, encoding="utf-8", newline="")
    tar: tarfile.TarFile | None = None
    num_tars = in_tar = 0
    with contextlib.ExitStack() as opened:
        for run in runs(len(store)):
            num_bytes = 0
            for record, data in zip(run, store.checked_copies(run), strict=True):
                key, extension = f"{record:09d}", _extension(names[record].as_py(), int(kinds[record]))
                about = json.dumps({"name": names[record].as_py()}).encode()
                label = str(labels[record]).encode()
                members = [(key + extension, data), (key + ".cls", label), (key + ".json", about)]
                need = sum(tarfile.BLOCKSIZE + _padded(len(value), tarfile.BLOCKSIZE) for _, value in members)
                if (
                    tar is None
                    or in_tar == per_shard
                    or _padded(tar.offset + need + _TAR_END_BYTES, tarfile.RECORDSIZE) > shard_size_bytes
                ):
                    opened.close()
                    # USTAR: no field depends on time or machine. A record is at most 4 GiB, which it supports.
                    path = folder / f"{name}-{num_tars:06d}.tar"
                    tar = opened.enter_context(tarfile.open(path, "x", format=tarfile.USTAR_FORMAT))
                    num_tars, in_tar = num_tars + 1, 0
                for member_name, value in members:
                    member = tarfile.TarInfo(member_name)  # mode 644, owner root, time 0
                    member.size = len(value)
                    tar.addfile(member, io.BytesIO(value))
                tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps all of them
                in_tar, num_bytes = in_tar + 1, num_bytes + len(data)
            yield len(run), num_bytes


def _padded(num_bytes: int, block_bytes: int) -> int:
    return -(-num_bytes // block_bytes) * block_bytes


def _check_labels(store: Store) -> None:
    labels = store.labels
    wrong = np.flatnonzero((labels < 0) | (labels >= len(store.classes)))
    if len(wrong):
        raise RecordError(
            f"{store.where(int(wrong[0]))}: label {labels[wrong[0]]}, expected 0 to {len(store.classes) - 1}; "
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
    if kind in _JPEG or extension == ".jpeg":
        return ".jpg"  # what readers ask for, as in to_tuple("jpg", "cls")
    if is_image_name(extension) or (not usual and extension == ".gif"):
        return extension
    return usual or ".jpg"
