"""Convert a source to one store or two, of one or several files, published only once all of them are complete.

If the process is killed at any instant, the same call resumes from the last commit; ``_files.py`` lists the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dali_lmdb.convert._files import Files, check_name, check_target
from dali_lmdb.convert._job import Job, Share, Task, Written
from dali_lmdb.convert._journal import RESUME, Journal, read_header
from dali_lmdb.convert._reading import examination
from dali_lmdb.convert._split import Split, SplitSource
from dali_lmdb.convert.ranks import Ranks
from dali_lmdb.convert.settings import ConvertProgress, ConvertSettings, Summary
from dali_lmdb.convert.sources import open_source
from dali_lmdb.convert.sources.base import Source
from dali_lmdb.decoding.examiner import DESCRIPTORS, Examiner
from dali_lmdb.disk import ensure_descriptors, os_errors, sync_folder
from dali_lmdb.errors import ConversionError, DaliLmdbError
from dali_lmdb.images.kinds import DecoderCounts
from dali_lmdb.images.reencoding import Change
from dali_lmdb.store.layout import MAX_SHARDS
from dali_lmdb.store.reader import FileStore
from dali_lmdb.store.shards import shard_path
from dali_lmdb.threads import threads_to_convert

__all__ = ["convert", "convert_split"]

T = TypeVar("T")

# Open files besides the journals and each thread's file of the source: the partial file (3), archives, temporary
# files for long lists, the files of modules while they are imported.
_OTHER_DESCRIPTORS = 16
_CANNOT_ACCESS = "cannot be read or written"


def convert(
    source: str | os.PathLike[str] | Source,
    target: str | os.PathLike[str],
    *,
    settings: ConvertSettings | None = None,
    shards: int | None = None,
    ranks: Ranks | None = None,
    restart: bool = False,
    num_threads: int | None = None,
    commit_records: int = 20_000,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> Summary:
    """Convert a source of images to a store, or resume an interrupted conversion of the same source.

    Args:
        source: a path that ``open_source`` accepts, or a ``Source``.
        target: the store to make; must not exist.
        settings: how images are validated and changed; by default ``ConvertSettings()``.
        shards: number of files to write, ``NAME-00000-of-00004.lmdb`` and so on, each with consecutive records;
            by default one file, ``target`` itself.
        ranks: processes that share the shards; by default this process alone.
        restart: discard an interrupted conversion instead of resuming it.
        num_threads: threads that read and validate images; by default the cores this process may use, at least 2.
        commit_records: maximum number of images per commit; a commit also ends at 16 MB of images.
        progress: called after every commit and while verifying.

    Raises:
        SourceError: the source is missing, empty, or changes during the conversion.
        ConversionError: the target exists, its folder cannot be written, the disk is full, another converter
            is writing it, the source or settings differ from those of the interrupted conversion, or
            ``on_bad="fail"`` and there are bad images.
        ValueError: ``shards`` or ``num_threads`` is below 1, or there are several ranks and no shards.
    """
    (summary,) = _convert(
        source,
        _file_of(target),
        split=None,
        settings=settings,
        shards=shards,
        ranks=ranks,
        restart=restart,
        num_threads=num_threads,
        commit_records=commit_records,
        progress=progress,
    )
    return summary


def convert_split(
    source: str | os.PathLike[str] | Source, target: str | os.PathLike[str], *, split: Split, **options: Any
) -> tuple[Summary, Summary]:
    """Convert a source of images to two stores, ``NAME-train.lmdb`` and ``NAME-val.lmdb``, or resume doing so.

    Both have all classes of the source, and are published together once both are complete.

    Args:
        target: gives the stores' names, ``NAME.lmdb``; nothing has that name itself.
        split: which images are for validation.
        options: those of ``convert``; ``shards`` is the number of files of each store.

    Raises:
        SourceError, ConversionError, ValueError: as ``convert``; ConversionError also if no class has two images.
    """
    train, val = _convert(source, _file_of(target), split=split, **options)
    return train, val


def _file_of(target: str | os.PathLike[str]) -> Path:
    """The path of the file to make; ``Path`` would drop the slash that says folder."""
    name = os.fspath(target)
    if name.endswith("/"):
        raise ConversionError(f"{name}: a folder, expected the name of the file to make, as in {name}train.lmdb")
    if not Path(name).name:
        raise ConversionError(f"{name!r}: expected the name of the file to make, such as train.lmdb")
    return Path(name)


def _convert(
    source: str | os.PathLike[str] | Source,
    target: Path,
    *,
    split: Split | None,
    settings: ConvertSettings | None = None,
    shards: int | None = None,
    ranks: Ranks | None = None,
    restart: bool = False,
    num_threads: int | None = None,
    commit_records: int = 20_000,
    progress: Callable[[ConvertProgress], None] | None = None,
) -> list[Summary]:
    begin = time.perf_counter()
    settings, ranks = settings or ConvertSettings(), ranks or Ranks()
    if shards is not None and not 1 <= shards <= MAX_SHARDS:
        raise ValueError(f"shards is {shards}, expected 1 to {MAX_SHARDS}")
    if shards is None and ranks.world_size > 1:
        raise ValueError(
            f"{ranks.world_size} ranks share shards, but shards is not given; give at least one per rank"
        )
    with Examiner(examination(settings)) as examiner:
        if settings.decodes_all:
            examiner.start()  # while the source is listed
        source = source if isinstance(source, Source) else open_source(source)
        parts = [_Part.of(target, shards)]
        if split is not None:
            source = SplitSource(source, split)
            parts = [
                _Part.of(
                    target.with_name(f"{target.stem}-{name}{target.suffix}"), shards, split=split.identity(name)
                )
                for name in ("train", "val")
            ]
        task = _Conversion(
            source=source,
            target=target,
            settings=settings,
            examiner=examiner,
            ranks=ranks,
            parts=parts,
            is_set=shards is not None,
            restart=restart,
            num_threads=threads_to_convert(num_threads),
            commit_records=commit_records,
            progress=progress,
        )
        with os_errors(target, _CANNOT_ACCESS, ConversionError):
            return _run(task, begin)


def _run(task: _Conversion, begin: float) -> list[Summary]:
    for part in task.parts:
        check_target(part.target, part.files)
    with contextlib.ExitStack() as journals:
        jobs: list[Job] = []
        task.on_all_ranks(lambda: jobs.extend(_jobs(task, journals)))
        written = list(chain(*task.on_all_ranks(lambda: _write(task, jobs))))
        _check_bad(task, written)
        task.on_all_ranks(lambda: _finish(task, jobs, written))
        task.on_all_ranks(lambda: _publish(task))
        for job in jobs:
            job.files.journal.unlink(missing_ok=True)
        seconds = time.perf_counter() - begin
        return [_summarise(part, kind=task.source.kind, seconds=seconds) for part in task.parts]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One of the stores that a conversion makes: the only one, or one of two that a source is split into."""

    target: Path
    files: list[Files]
    """One per shard; without shards, only the target's."""
    split: dict[str, Any] | None
    """``Split.identity``; None if it is the only one."""

    @classmethod
    def of(cls, target: Path, shards: int | None, *, split: dict[str, Any] | None = None) -> _Part:
        """The part with this number of shards, or one file if that is None."""
        paths = [target] if shards is None else [shard_path(target, index, shards) for index in range(shards)]
        return cls(target=target, files=[Files(path) for path in paths], split=split)


@dataclass(frozen=True, kw_only=True)
class _Conversion(Task):
    """A ``Task`` with what its phases need beyond one file: the target, the ranks and the files of all parts."""

    target: Path
    ranks: Ranks
    parts: list[_Part]
    is_set: bool

    @property
    def all_files(self) -> list[Files]:
        """The files of all parts."""
        return [files for part in self.parts for files in part.files]

    @property
    def mine(self) -> range:
        """Indices of the files that this rank writes: consecutive, so that one pass over the source is enough."""
        count, ranks = len(self.all_files), self.ranks
        return range(count * ranks.rank // ranks.world_size, count * (ranks.rank + 1) // ranks.world_size)

    def on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Do ``work`` on every rank and return all results; if it fails on one rank, it fails on all."""
        try:
            with os_errors(self.target, _CANNOT_ACCESS, ConversionError):
                result = work()
        except DaliLmdbError as error:
            self.ranks.agree(error, None)
            raise
        return self.ranks.agree(None, result)


# Phase 1: lock every target, then write all records.


def _jobs(task: _Conversion, journals: contextlib.ExitStack) -> list[Job]:
    """One job for each of this rank's files; their journals lock out other converters until all is published."""
    shares = _shares(task)
    num_files = len(task.mine)
    per_thread = 1 + (DESCRIPTORS if task.settings.decodes_any else 0)
    lack = ensure_descriptors(num_files + task.num_threads * per_thread + _OTHER_DESCRIPTORS)
    if lack is not None:
        raise ConversionError(
            f"{task.target}: converting to {num_files} files {lack}, or use fewer --shards or --threads"
        )
    jobs = []
    for index in task.mine:
        files = task.all_files[index]
        journal = Journal(files.journal)
        journals.callback(journal.close)
        jobs.append(Job(task, shares[index], files, journal))
    for job in jobs:
        if job.files.target.exists():
            _check_published(task, job, shares)
    return jobs


def _shares(task: _Conversion) -> list[Share]:
    """Split each part's items into one run for each of its files; the lengths differ by at most one."""
    total = task.source.count()
    if total == 0:
        raise ConversionError(f"{task.target}: nothing to convert: the source has no images")
    counts = task.source.part_counts() if isinstance(task.source, SplitSource) else (total,)
    shares: list[Share] = []
    first = 0
    for part, num_items in zip(task.parts, counts, strict=True):
        count = len(part.files)
        if num_items == 0:
            raise ConversionError(f"{part.target}: nothing to split off: no class has two images")
        if count > num_items:
            raise ConversionError(f"{part.target}: {count} shards for {num_items} images; use fewer shards")
        bounds = [num_items * index // count for index in range(count + 1)]
        shares += [
            Share(
                first=first + bounds[index],
                num_items=bounds[index + 1] - bounds[index],
                is_last=first + bounds[index + 1] == total,
                shard={"index": index, "count": count} if task.is_set else None,
                split=part.split,
            )
            for index in range(count)
        ]
        first += num_items
    return shares


def _check_published(task: _Conversion, job: Job, shares: Sequence[Share]) -> None:
    """Refuse a target that exists, unless an interrupted run of this same conversion published it."""
    started = job.journal.header == task.header(job.share) or (
        # Interrupted while journals were removed, the last thing that is done: another shard's may be left.
        job.journal.header is None
        and all(files.target.exists() and not files.partial.exists() for files in task.all_files)
        and any(
            read_header(files.journal) == task.header(share)
            for files, share in zip(task.all_files, shares, strict=True)
        )
    )
    if not started or job.files.partial.exists() or not job.wrote_target():
        raise ConversionError(f"{job.files.target}: already exists; choose another name")
    if task.restart:
        raise ConversionError(
            f"{job.files.target}: already published by the interrupted conversion; remove it to start over"
        )


def _write(task: _Conversion, jobs: Sequence[Job]) -> list[Written]:
    """Write the records of this rank's files: bad images are only reported here, ``_check_bad`` refuses them."""
    if not jobs:
        return []
    items = islice(task.source.items(), jobs[0].share.first, None)
    written = [job.skip(items) if job.files.target.exists() else job.write(items) for job in jobs]
    if jobs[-1].share.is_last and next(items, None) is not None:
        raise ConversionError(
            f"{task.target}: the source changed during the conversion: images were added; use --restart when "
            "nothing writes to it"
        )
    return written


def _check_bad(task: _Conversion, written: Sequence[Written]) -> None:
    """Stop on every rank if bad images must not be skipped, or if no image of a part is good."""
    bad, records = sum(file.num_bad for file in written), sum(file.num_records for file in written)
    reports = ", ".join(file.report for file in written if file.report)
    if bad and task.settings.on_bad == "fail":
        raise ConversionError(
            f"{task.target}: {bad} of {bad + records} images are bad, see {reports}; nothing was published; fix "
            "them and use --restart, or leave them out with --on-bad skip"
        )
    for part, files in zip(task.parts, _by_part(task, written), strict=True):
        if sum(file.num_records for file in files) == 0:
            bad = sum(file.num_bad for file in files)
            raise ConversionError(f"{part.target}: all {bad} images are bad, see {reports}")


def _by_part(task: _Conversion, per_file: Sequence[T]) -> list[Sequence[T]]:
    """Divide what there is for each file of the conversion among its parts."""
    count = len(task.parts[0].files)  # the same for all
    return [per_file[start : start + count] for start in range(0, len(per_file), count)]


# Phase 2: verify and index each file.


def _finish(task: _Conversion, jobs: Sequence[Job], written: Sequence[Written]) -> None:
    """Complete this rank's partial files; the shards of one store share an identifier."""
    set_ids = []
    for files in _by_part(task, written):
        identity = [
            task.source.kind,
            task.source.identity(),
            task.settings.identity(),
            [file.fingerprint for file in files],
        ]
        set_ids += [hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]] * len(files)
    for index, job in zip(task.mine, jobs, strict=True):
        job.finish(set_ids[index])


# Phase 3: publish all files at once.


def _publish(task: _Conversion) -> None:
    if task.ranks.rank != 0:
        return
    for part in task.parts:
        check_name(part.target, part.files)  # another conversion may have published meanwhile
    with os_errors(task.all_files[0].target, "cannot be published", ConversionError, then=RESUME):
        for files in task.all_files:
            if files.partial.exists():
                os.rename(files.partial, files.target)
        sync_folder(task.target.parent)


def _summarise(part: _Part, *, kind: str, seconds: float) -> Summary:
    num_records = num_bytes = skipped = left_out = gpu = cpu = none = transcoded = resized = 0
    for files in part.files:
        store = FileStore(files.target)
        num_records += len(store)
        skipped += store.meta.made.get("skipped", 0)
        left_out += store.meta.made.get("left_out", 0)
        num_bytes += sum(int(lengths.sum(dtype=np.int64)) for lengths in store.column_parts("num_bytes"))
        for kinds in store.column_parts("kind"):
            decoders = DecoderCounts.of(kinds)
            gpu, cpu, none = gpu + decoders.gpu, cpu + decoders.cpu, none + decoders.none
        for changes in store.column_parts("change"):
            transcoded += int(((changes & Change.TRANSCODED) != 0).sum())
            resized += int(((changes & Change.RESIZED) != 0).sum())
    return Summary(
        store=str(part.target),
        source=kind,
        records=num_records,
        classes=len(store.classes),
        bytes=num_bytes,
        seconds=seconds,
        skipped=skipped,
        left_out=left_out,
        reports=[str(files.report) for files in part.files if files.report.exists()],
        gpu=gpu,
        cpu=cpu,
        none=none,
        transcoded=transcoded,
        resized=resized,
    )
