"""Verify that a store is what its converter wrote: every checksum, key and column."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dali_lmdb.decoding.examiner import Examination, Examiner
from dali_lmdb.errors import StoreDamagedError, one_line
from dali_lmdb.inspect.checks import FileCheck, Findings, PayloadCheck
from dali_lmdb.inspect.records import ProgressCallback
from dali_lmdb.store import layout, open_store
from dali_lmdb.store.classic import database_file
from dali_lmdb.store.pages import PageFile
from dali_lmdb.store.shards import shard_files
from dali_lmdb.threads import threads_to_convert, threads_to_read

__all__ = ["Verification", "verify"]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of ``verify``."""

    store: str
    records: int
    """Number of records whose bytes were read."""
    num_bytes: int
    """Size of these records."""
    seconds: float
    decoded: bool
    """True if each record was also decoded."""
    damage: tuple[str, ...]
    """A line for each problem, ``STORE: record 41 (name): what``; at most ``checks.MAX_LISTED``."""
    num_damage: int
    """Number of problems, including those not listed."""
    notes: tuple[str, ...]
    """A line for each finding that is not damage."""

    @property
    def clean(self) -> bool:
        return self.num_damage == 0


def verify(
    path: str | os.PathLike[str],
    *,
    decode: bool = False,
    num_threads: int | None = None,
    progress: ProgressCallback | None = None,
) -> Verification:
    """Check a store from end to end; damage is listed, not raised.

    This checks the B-tree, the checksums (of metadata, index, names and records), the keys, labels, names and
    fingerprint, and whether the lengths, sizes and kinds in the index match the records. A classic database has no
    checksums: this only checks that each of its records can be read.

    Args:
        path: a store.
        decode: decode each record too, strictly and as the loaders will.
        num_threads: number of threads, and of processes that decode; by default the cores this process may use, at
            least 4, or 2 with ``decode``.
        progress: called from time to time.

    Raises:
        StoreNotFoundError, StoreFormatError: there is no store to check.
        ValueError: ``num_threads`` is below 1.
    """
    begin = time.perf_counter()
    findings = Findings()
    threads = threads_to_convert(num_threads) if decode else threads_to_read(num_threads)
    with warnings.catch_warnings(), Examiner(Examination()) as examiner:
        # Pillow warns about damaged metadata in images, which is not damage to the store.
        warnings.simplefilter("ignore", UserWarning)
        options = {"examiner": examiner if decode else None, "threads": threads, "progress": progress}
        for check in _checks(Path(path), findings, **options):
            check.run()
    return Verification(
        store=str(path),
        records=findings.records,
        num_bytes=findings.num_bytes,
        seconds=time.perf_counter() - begin,
        decoded=decode,
        damage=tuple(map(one_line, findings.damage)),
        num_damage=findings.num_damage,
        notes=tuple(map(one_line, findings.notes)),
    )


def _checks(path: Path, findings: Findings, **options: Any) -> Iterator[FileCheck | PayloadCheck]:
    """Yield a check for each file; files are not opened as a store first, since damage may prevent that."""
    files = shard_files(path)
    if files:
        # Raises for an incomplete set, which cannot be checked; damage is reported by the checks.
        with contextlib.suppress(StoreDamagedError):
            open_store(path)
    elif (file := database_file(path)).is_file() and _has_meta(file):
        files = [file]
    if files:
        yield from (FileCheck(file, findings, **options) for file in files)
        return
    try:
        yield PayloadCheck(open_store(path), findings, **options)
    except StoreDamagedError as error:
        findings.add(str(error))


def _has_meta(path: Path) -> bool:
    """Return whether a file is a store; True if damage prevents finding out."""
    try:
        return PageFile(path).find(layout.META_KEY) is not None
    except StoreDamagedError:
        return True
