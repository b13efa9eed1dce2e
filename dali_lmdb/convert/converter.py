"""Converting a source into a store of one or several files, published when all of it is done.

Killed at any instant, the same call goes on after the last commit; see ``job.py`` for the files involved.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from dali_lmdb.convert.job import Files, Job, NameBlocks, Part
from dali_lmdb.convert.journal import Journal
from dali_lmdb.convert.ranks import Ranks
from dali_lmdb.convert.settings import ConvertSettings, Progress, Summary
from dali_lmdb.convert.sources import open_source
from dali_lmdb.convert.sources.base import Item, Source
from dali_lmdb.disk import lack_of_descriptors, os_errors, refusal, sync_folder
from dali_lmdb.errors import ConversionError, DaliLmdbError
from dali_lmdb.store.layout import MAX_SHARDS, Change, Decoders, shard_path
from dali_lmdb.store.reader import FileStore
from dali_lmdb.store.shards import BESIDE, set_files, shard_name

__all__ = ["convert"]

T = TypeVar("T")

# Open at once besides the journals, and a file of the source in each thread: the partial file (3), archives, lists
# that are kept in temporary files, modules that are imported late.
_OTHER_DESCRIPTORS = 16
_ANY_FAILURE = "cannot be read or written"
MAX_NAME_BYTES = 255  # of a file in most file systems of Linux (NAME_MAX)


def convert(
    source: str | os.PathLike[str] | Source,
    target: str | os.PathLike[str],
    *,
    settings: ConvertSettings | None = None,
    shards: int | None = None,
    ranks: Ranks | None = None,
    restart: bool = False,
    num_threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Make a store from a source of images, or go on with an interrupted conversion of the same.

    Args:
        source: what ``open_source`` takes, or a ``Source``.
        target: the store to make; must not exist.
        settings: how images are looked at; by default ``ConvertSettings()``.
        shards: write so many files, ``NAME-00000-of-00004.lmdb`` and so on, each with a run of the records;
            by default one file, ``target`` itself.
        ranks: processes that share the work, shards in turn; by default this one alone.
        restart: forget an interrupted conversion instead of going on with it.
        num_threads: threads that read and look at images; by default the cores this process may use, at least 2.
        progress: called from time to time.

    Raises:
        SourceError: the source is missing, empty, or changes during the conversion.
        ConversionError: the target exists, its folder cannot be written, the disk is full, another converter
            works on it, the source or settings differ from those of the interrupted conversion, or
            ``on_bad="fail"`` and there are bad images.
        ValueError: ``shards`` is below 1, or there are several ranks and no shards.
    """
    begin = time.perf_counter()
    settings, ranks, target = settings or ConvertSettings(), ranks or Ranks(), Path(target)
    if shards is not None and not 1 <= shards <= MAX_SHARDS:
        raise ValueError(f"shards is {shards}, expected 1 to {MAX_SHARDS}")
    if shards is None and ranks.world_size > 1:
        raise ValueError(
            f"{ranks.world_size} ranks share shards, but shards is not given; give one a rank or more"
        )
    source = source if isinstance(source, Source) else open_source(source)
    if not target.name:
        raise ConversionError(f"{os.fspath(target)!r}: expected the name of the file to make, such as train.lmdb")
    paths = [target] if shards is None else [shard_path(target, index, shards) for index in range(shards)]
    everything = [Files(path) for path in paths]
    num_threads = num_threads or max(2, len(os.sched_getaffinity(0)))
    with os_errors(target, _ANY_FAILURE, ConversionError):
        _check_target(target, everything)
    # Runs of shards, so that each rank goes through the source's list once.
    bounds = [len(paths) * rank // ranks.world_size for rank in range(ranks.world_size + 1)]
    mine = range(bounds[ranks.rank], bounds[ranks.rank + 1])
    with os_errors(target, _ANY_FAILURE, ConversionError), contextlib.ExitStack() as stack:
        jobs: list[Job] = []

        def write() -> _Written:
            parts = _parts(source, settings, target, shards)
            published = _all_published(everything)
            _check_descriptors(target, num_journals=len(mine), num_threads=num_threads)
            journals = _open_journals(stack, [everything[index] for index in mine])
            for index, journal in zip(mine, journals, strict=True):
                job = Job(
                    source,
                    parts[index],
                    settings,
                    files=everything[index],
                    journal=journal,
                    num_threads=num_threads,
                    progress=progress,
                )
                jobs.append(job)
            items = islice(source.items(), sum(part.num_items for part in parts[: mine.start]), None)
            return _write(jobs, items, target=target, restart=restart, published=published)

        def finish() -> None:
            set_name = _set_name(source, settings, all_written)
            for job in jobs:
                job.finish(set_name)

        def publish() -> None:
            if ranks.rank == 0:
                _check_name(target, everything)  # another conversion may have published meanwhile
                _publish(everything)

        all_written = _together(ranks, write, target)
        _check_bad(all_written, settings, target)
        _together(ranks, finish, target)
        _together(ranks, publish, target)
        for index in mine:
            everything[index].journal.unlink(missing_ok=True)
        return _summarise(target, everything, time.perf_counter() - begin)


def _together(ranks: Ranks, work: Callable[[], T], target: Path) -> list[T]:
    """What ``work`` returns on each rank, when all have done it; if it fails on one, it fails on all."""
    try:
        with os_errors(target, _ANY_FAILURE, ConversionError):
            result = work()
    except DaliLmdbError as error:
        ranks.agree(error, None)
        raise
    return ranks.agree(None, result)


@dataclass
class _Written:
    """What one rank has written, before it is published."""

    records: int = 0
    bad: int = 0
    reports: list[str] = field(default_factory=list)
    fingerprints: list[str] = field(default_factory=list)
    """Of each of its shards."""


def _check_descriptors(target: Path, *, num_journals: int, num_threads: int) -> None:
    lack = lack_of_descriptors(num_journals + num_threads + _OTHER_DESCRIPTORS)
    if lack is not None:
        raise ConversionError(f"{target}: converting to {num_journals} files {lack}, or use fewer --shards")


def _open_journals(stack: contextlib.ExitStack, files: Sequence[Files]) -> list[Journal]:
    """Take hold of all of a rank's targets until everything is published, so that no other gets in between."""
    journals = []
    for one in files:
        journals.append(stack.enter_context(Journal(one.journal)))
        stack.callback(journals[-1].remove_if_new)
    return journals


def _all_published(everything: Sequence[Files]) -> bool:
    """Whether all that an interrupted conversion left to do is removing journals, of which some may be gone."""
    return all(files.target.exists() and not files.partial.exists() for files in everything) and any(
        files.journal.exists() for files in everything
    )


def _write(
    jobs: Sequence[Job], items: Iterator[Item], *, target: Path, restart: bool, published: bool
) -> _Written:
    """Write the records of all jobs' files: all images are looked at before bad ones stop anything."""
    written = _Written()
    for job in jobs:
        files = job.files
        if files.target.exists():
            _check_published(job, restart=restart, published=published)
            num_records, num_bad = job.skip(items)
        else:
            num_records, num_bad = job.write(items, restart=restart)
        written.records += num_records
        written.bad += num_bad
        written.reports += [str(files.report)] if files.report.exists() else []
        written.fingerprints.append(job.fingerprint())
    if next(items, None) is not None and jobs and jobs[-1].part.is_last:
        raise ConversionError(
            f"{target}: the source changed during the conversion: images were added; use --restart when nothing "
            "writes to it"
        )
    return written


def _check_published(job: Job, *, restart: bool, published: bool) -> None:
    """Refuse a target that exists, unless this very conversion was killed while it published."""
    is_ours = job.is_same() or (published and job.journal.header is None)
    if job.files.partial.exists() or not is_ours:
        raise ConversionError(f"{job.files.target}: already exists; choose another name")
    if restart:
        raise ConversionError(
            f"{job.files.target}: already published by the interrupted conversion; remove it to start over"
        )


def _check_bad(all_written: Sequence[_Written], settings: ConvertSettings, target: Path) -> None:
    """Refuse to publish bad images, or nothing at all; the same on every rank."""
    bad, records = (sum(getattr(one, name) for one in all_written) for name in ("bad", "records"))
    reports = ", ".join(report for one in all_written for report in one.reports)
    if bad and settings.on_bad == "fail":
        raise ConversionError(
            f"{target}: {bad} of {bad + records} images are bad, see {reports}; nothing was published; fix them "
            "and use --restart, or leave them out with --on-bad skip"
        )
    if records == 0:
        raise ConversionError(f"{target}: all {bad} images are bad, see {reports}")


def _set_name(source: Source, settings: ConvertSettings, all_written: Sequence[_Written]) -> str:
    """What the shards of one conversion have in common and those of others have not."""
    fingerprints = [one.fingerprints for one in all_written]
    parts = [source.kind, source.identity(), settings.identity(), [each for one in fingerprints for each in one]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _check_target(target: Path, everything: Sequence[Files]) -> None:
    """Refuse a target that cannot be written, or that would not be what its name then opens."""
    folder = target.parent
    if target.is_dir():
        raise ConversionError(f"{target}: a folder, expected the name of the file to make, such as train.lmdb")
    if target.is_symlink() and not target.exists():
        raise ConversionError(f"{target}: a link to nothing, which would be replaced; name {os.readlink(target)}")
    if not folder.is_dir():
        raise ConversionError(f"{target}: its folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        raise ConversionError(refusal(folder, "not writable", OSError(code, os.strerror(code))))
    longest = max(len(os.fsencode(files.journal.name)) for files in everything)
    if longest > MAX_NAME_BYTES:
        raise ConversionError(
            f"{target}: its name is too long by {longest - MAX_NAME_BYTES} bytes, with what is added to it during "
            "the conversion; choose a shorter one"
        )
    _check_name(target, everything)


def _check_name(target: Path, everything: Sequence[Files]) -> None:
    """Refuse a name that stands for something else already, or for what is kept beside another store."""
    ending = next((ending for ending in BESIDE if target.name.endswith(ending)), None)
    if ending is not None:
        raise ConversionError(f"{target}: names that end in {ending} are for files beside a store; choose another")
    mine = {files.target for files in everything}
    there = [file for file in set_files(target) if file not in mine]
    if target not in mine:
        there += [target] if os.path.lexists(target) else []
    elif (shard := shard_name(target)) is not None:  # a store of its own, which the shards' name would open, too
        there += [f for f in set_files(target.with_name(shard.set_name)) if not f.match(shard.pattern())]
    if there:
        raise ConversionError(
            f"{target}: {there[0].name} is there, which opens by the same name; choose another name"
        )


def _parts(source: Source, settings: ConvertSettings, target: Path, shards: int | None) -> list[Part]:
    """Deal the source's items to files: runs of equal length, give or take one."""
    total = source.count()
    if total == 0:
        raise ConversionError(f"{target}: nothing to convert: the source has no images")
    count = 1 if shards is None else shards
    if count > total:
        raise ConversionError(f"{target}: {shards} shards for {total} images; use fewer shards")
    items = source.items()
    parts = []
    for index in range(count):
        names = NameBlocks()
        num_items = total * (index + 1) // count - total * index // count
        for item in islice(items, num_items):
            names.add(item.name)
        shard = None if shards is None else {"index": index, "count": shards}
        parts.append(Part(num_items=num_items, names=names.end(), is_last=index == count - 1, shard=shard))
    return parts


def _publish(everything: Sequence[Files]) -> None:
    then = "then run the same command again to go on"
    with os_errors(everything[0].target, "cannot be published", ConversionError, then=then):
        for files in everything:
            if files.partial.exists():
                os.rename(files.partial, files.target)
        sync_folder(everything[0].target.parent)


def _summarise(target: Path, everything: Sequence[Files], seconds: float) -> Summary:
    num_records = num_bytes = skipped = left_out = gpu = cpu = none = transcoded = resized = 0
    for files in everything:
        store = FileStore(files.target)
        num_records += len(store)
        skipped += store.meta.made.get("skipped", 0)
        left_out += store.meta.made.get("left_out", 0)
        num_bytes += sum(int(lengths.sum(dtype=np.int64)) for lengths in store.column_parts("num_bytes"))
        for kinds in store.column_parts("kind"):
            decoders = Decoders.of(kinds)
            gpu, cpu, none = gpu + decoders.gpu, cpu + decoders.cpu, none + decoders.none
        for changes in store.column_parts("change"):
            transcoded += int(((changes & Change.TRANSCODED) != 0).sum())
            resized += int(((changes & Change.RESIZED) != 0).sum())
    return Summary(
        store=str(target),
        records=num_records,
        classes=len(store.classes),
        bytes=num_bytes,
        seconds=seconds,
        skipped=skipped,
        left_out=left_out,
        reports=[str(files.report) for files in everything if files.report.exists()],
        gpu=gpu,
        cpu=cpu,
        none=none,
        transcoded=transcoded,
        resized=resized,
    )
