"""Converting a source into a store of one or several files, published when all of it is done.

Killed at any instant, the same call goes on after the last commit; see ``job.py`` for the files involved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dali_lmdb.convert.job import Files, Job, Part, name_hash
from dali_lmdb.convert.journal import Journal
from dali_lmdb.convert.ranks import Ranks
from dali_lmdb.convert.settings import ConvertSettings, Progress, Summary
from dali_lmdb.convert.sources import open_source
from dali_lmdb.convert.sources.base import Source
from dali_lmdb.errors import ConversionError, DaliLmdbError
from dali_lmdb.store.layout import Change, Kind, shard_path
from dali_lmdb.store.reader import FileStore

__all__ = ["convert"]


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
        num_threads: threads that read and look at images; by default the cores this process may use, at least 4.
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
    if shards is not None and shards < 1:
        raise ValueError(f"shards is {shards}, expected at least 1")
    if shards is None and ranks.world_size > 1:
        raise ValueError(
            f"{ranks.world_size} ranks share shards, but shards is not given; give at least one a rank"
        )
    source = source if isinstance(source, Source) else open_source(source)
    _check_folder(target)
    paths = [target] if shards is None else [shard_path(target, index, shards) for index in range(shards)]
    everything = [Files(path) for path in paths]
    mine = range(ranks.rank, len(paths), ranks.world_size)
    with contextlib.ExitStack() as journals, warnings.catch_warnings():
        # Our own limit of pixels decides, not Pillow's warning.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        failure: BaseException | None = None
        try:
            parts = _parts(source, settings, target, shards)
            for index in mine:
                job = Job(
                    source,
                    parts[index],
                    settings,
                    files=everything[index],
                    journal=journals.enter_context(Journal(everything[index].journal)),
                    num_threads=num_threads or max(4, len(os.sched_getaffinity(0))),
                    progress=progress,
                )
                _run(job, restart=restart)
        except DaliLmdbError as error:
            failure = error
        ranks.agree(failure)
        if ranks.rank == 0:
            _publish(everything)
        ranks.agree(None)
        summary = _summarise(target, everything, time.perf_counter() - begin)
        for index in mine:
            everything[index].journal.unlink(missing_ok=True)
    return summary


def _check_folder(target: Path) -> None:
    folder = target.parent
    try:
        is_file_name, is_folder = bool(target.name) and not target.is_dir(), folder.is_dir()
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise ConversionError(f"{target}: cannot be written: {error.strerror}; choose another name") from error
    if not is_file_name:
        raise ConversionError(f"{target}: a folder, expected the name of the file to make, such as train.lmdb")
    if not is_folder:
        raise ConversionError(f"{target}: its folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConversionError(f"{target}: its folder {folder} is not writable; choose another or change it")


def _run(job: Job, *, restart: bool) -> None:
    """Make a file complete, unless a run of the same conversion was killed after publishing it."""
    files = job.files
    if not files.target.exists():
        job.run(restart=restart)
    elif files.partial.exists() or not job.is_same():
        if job.journal.header is None:
            files.journal.unlink()
        raise ConversionError(f"{files.target}: already exists; remove it or choose another name")


def _parts(source: Source, settings: ConvertSettings, target: Path, shards: int | None) -> list[Part]:
    """Deal the source's items to files: runs of equal length, give or take one."""
    total = source.count()
    if total == 0:
        raise ConversionError(f"{target}: nothing to convert: the source has no images")
    hashes = array("Q", (name_hash(item.name) for item in source.items()))
    if len(hashes) != total:
        raise ConversionError(
            f"{target}: the source had {total} images when it was opened, now {len(hashes)}; convert it when "
            "nothing writes to it"
        )
    if shards is None:
        return [Part(start=0, stop=total, is_last=True, name_hashes=hashes, shard=None)]
    if shards > total:
        raise ConversionError(f"{target}: {shards} shards for {total} images; use fewer shards")
    of = json.dumps([source.kind, source.identity(), settings.identity()], sort_keys=True)
    set_name = hashlib.sha256(of.encode()).hexdigest()[:32]
    bounds = [total * index // shards for index in range(shards + 1)]
    return [
        Part(
            start=bounds[index],
            stop=bounds[index + 1],
            is_last=index == shards - 1,
            name_hashes=hashes[bounds[index] : bounds[index + 1]],
            shard={"index": index, "count": shards, "set": set_name},
        )
        for index in range(shards)
    ]


def _publish(everything: Sequence[Files]) -> None:
    try:
        for files in everything:
            if files.partial.exists():
                os.rename(files.partial, files.target)
        _sync_folder(everything[0].target.parent)
    except OSError as error:
        raise ConversionError(
            f"{everything[0].target}: cannot be published: {error.strerror}; "
            "mend it, then run the same command again"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make renames in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _summarise(target: Path, everything: Sequence[Files], seconds: float) -> Summary:
    stores = [FileStore(files.target) for files in everything]
    kinds = np.concatenate([store.column("kind") for store in stores])
    changes = np.concatenate([store.column("change") for store in stores])
    gpu = int(np.isin(kinds, [kind for kind in Kind if kind.decodes_on_gpu]).sum())
    unknown = int((kinds == Kind.UNKNOWN).sum())
    return Summary(
        store=str(target),
        records=len(kinds),
        classes=len(stores[0].classes),
        bytes=sum(int(store.column("num_bytes").sum(dtype=np.int64)) for store in stores),
        seconds=seconds,
        skipped=sum(store.meta.made.get("skipped", 0) for store in stores),
        reports=[str(files.report) for files in everything if files.report.exists()],
        gpu=gpu,
        cpu=len(kinds) - gpu - unknown,
        unknown=unknown,
        transcoded=int(((changes & Change.TRANSCODED) != 0).sum()),
        resized=int(((changes & Change.RESIZED) != 0).sum()),
    )
