"""Converting a source into a store: read and audited by threads, written in order, verified, published.

Files, for a target ``NAME.lmdb`` (all beside it, so that publishing is one rename):

* ``NAME.lmdb.partial``: the LMDB file while it grows;
* ``NAME.lmdb.partial-journal``: what was done so far, see ``journal.py``;
* ``NAME.lmdb.bad.tsv``: the images that were refused, with reasons.

Killed at any instant, the same call goes on after the last commit.
"""

from __future__ import annotations

import os
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

import dali_lmdb
from dali_lmdb.convert.audit import MAX_PIXELS, BadImageError, read_header
from dali_lmdb.convert.journal import INDEX_ROW_COLUMNS, ROW_SCHEMA, Journal
from dali_lmdb.convert.sources import open_source
from dali_lmdb.convert.sources.base import Item, Source
from dali_lmdb.errors import ConversionError
from dali_lmdb.store.layout import Change, Kind
from dali_lmdb.store.writer import StoreWriter

__all__ = ["ConvertSettings", "Progress", "Summary", "convert"]

# One commit: enough that fsync is rare, little enough that LMDB's dirty pages, this much in memory, stay small;
# LMDB allows 131,071 dirty pages in a transaction (MDB_IDL_UM_MAX), and a large value counts as one.
_COMMIT_BYTES = 64 << 20
_COMMIT_RECORDS = 20_000
_AHEAD_BYTES = 64 << 20  # images read ahead of the writer, at most
_AHEAD_ITEMS = 2_000
_VERIFY_RECORDS = 256  # records one thread checks at a time when reading back


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """How images are looked at and what becomes of bad ones.

    Raises:
        ValueError: a setting is out of range.
    """

    check: Literal["header", "none"] = "header"
    """``"header"``: parse each file's header; ``"none"``: store sizes and kinds as unknown (0)."""
    on_bad: Literal["fail", "skip"] = "fail"
    """``"fail"``: look at everything, report, publish nothing; ``"skip"``: publish without the bad ones."""
    max_pixels: int = MAX_PIXELS
    """Images of more pixels are bad."""

    def __post_init__(self) -> None:
        if self.check not in ("header", "none"):
            raise ValueError(f"check is {self.check!r}, expected 'header' or 'none'")
        if self.on_bad not in ("fail", "skip"):
            raise ValueError(f"on_bad is {self.on_bad!r}, expected 'fail' or 'skip'")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels is {self.max_pixels}, expected at least 1")

    def identity(self) -> dict[str, Any]:
        """What must be the same when a conversion is resumed."""
        return {"check": self.check, "max_pixels": self.max_pixels}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a conversion did."""

    store: str
    records: int
    classes: int
    bytes: int
    """Of the images in the store."""
    seconds: float
    skipped: int
    """Bad images that are not in the store."""
    report: str | None = None
    """Path of the list of bad images, if there are any."""

    @property
    def images_per_s(self) -> float:
        return self.records / max(self.seconds, 1e-9)

    @property
    def megabytes_per_s(self) -> float:
        """10^6 bytes a second."""
        return self.bytes / 1e6 / max(self.seconds, 1e-9)


class Progress(NamedTuple):
    """How far a conversion is, given to the ``progress`` callback after every commit."""

    phase: Literal["writing", "verifying"]
    done: int
    """Images."""
    total: int
    num_bytes: int
    """Of the images done in this run."""


def convert(
    source: str | os.PathLike[str] | Source,
    target: str | os.PathLike[str],
    *,
    settings: ConvertSettings | None = None,
    restart: bool = False,
    num_threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Make a store from a source of images, or go on with an interrupted conversion of the same.

    Args:
        source: an image folder with one folder for each class, or a ``Source``.
        target: the store to make; must not exist.
        settings: how images are looked at; by default ``ConvertSettings()``.
        restart: forget an interrupted conversion instead of going on with it.
        num_threads: threads that read and look at images; by default the cores this process may use, at least 4.
        progress: called from time to time.

    Raises:
        SourceError: the source is missing, empty, or changes during the conversion.
        ConversionError: the target exists, its folder cannot be written, the disk is full, another converter
            works on it, the source or settings differ from those of the interrupted conversion, or
            ``on_bad="fail"`` and there are bad images.
    """
    begin = time.perf_counter()
    settings = settings or ConvertSettings()
    source = source if isinstance(source, Source) else open_source(source)
    target = Path(target)
    _check_target(target)
    files = _Files(target)
    if target.exists() and not (files.journal.exists() and not files.partial.exists()):
        raise ConversionError(f"{target}: already exists; remove it or choose another name")
    total = source.count()
    if total == 0:
        raise ConversionError(f"{target}: nothing to convert: the source has no images")
    threads = num_threads or max(4, len(os.sched_getaffinity(0)))
    with Journal(files.journal) as journal, warnings.catch_warnings():
        # Our own limit of pixels decides, not Pillow's warning.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        if not target.exists():
            job = _Job(source, files, settings, journal, threads, total, progress)
            job.open(restart=restart)
            job.run()
        summary = _summarise(target, files, journal, source, time.perf_counter() - begin)
        files.journal.unlink()
    return summary


class _Files:
    """The paths beside a target."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        self.journal = target.with_name(target.name + ".partial-journal")
        self.report = target.with_name(target.name + ".bad.tsv")


class _Looked(NamedTuple):
    """One image after it was read and looked at, in a thread."""

    data: bytes
    row: tuple[Any, ...]


@dataclass
class _Pending:
    """Images looked at but not yet committed."""

    values: list[bytes] = field(default_factory=list)
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, looked: _Looked) -> None:
        self.rows.append(looked.row)
        if looked.row[-1] is None:
            self.values.append(looked.data)
            self.num_bytes += len(looked.data)

    def full(self) -> bool:
        return self.num_bytes >= _COMMIT_BYTES or len(self.rows) >= _COMMIT_RECORDS


class _Job:
    """One run of a conversion."""

    def __init__(
        self,
        source: Source,
        files: _Files,
        settings: ConvertSettings,
        journal: Journal,
        threads: int,
        total: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.source, self.files, self.settings, self.journal = source, files, settings, journal
        self.threads, self.total, self.progress = threads, total, progress
        self.done = 0
        self.num_bytes = 0

    def open(self, *, restart: bool) -> None:
        """Go on with what is there, or begin."""
        header: dict[str, Any] = {
            "kind": self.source.kind,
            "settings": self.settings.identity(),
            "source": self.source.identity(),
        }
        if restart or self.journal.header is None:
            self.files.partial.unlink(missing_ok=True)
            self.journal.start(header)
        else:
            self._check_same(self.journal.header, header)
        self.writer = StoreWriter(self.files.partial)
        if not self.writer.finished:
            self.done = self.journal.cut_to(self.writer.num_records)
            self._check_unchanged()

    def run(self) -> None:
        """Write what is missing, verify, publish."""
        with self.writer:
            if not self.writer.finished:
                self._write()
                self._refuse_bad()
                self._finish()
        os.rename(self.files.partial, self.files.target)
        _sync_folder(self.files.target.parent)

    def _check_same(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for part in ("kind", "settings", "source"):
            if before.get(part) != now[part]:
                raise ConversionError(
                    f"{self.files.target}: an interrupted conversion is there with {part} {before.get(part)}, "
                    f"now {now[part]}; give the same again, or --restart to start over"
                )

    def _check_unchanged(self) -> None:
        """Compare the images that are already written with the source, without reading them."""
        items = self.source.items()
        with ThreadPoolExecutor(self.threads) as pool:
            for batch in self.journal.rows():
                names, stamps = batch.column("name").to_pylist(), batch.column("stamp").to_pylist()
                found = [item for item, _ in zip(items, names, strict=False)]
                now = list(pool.map(lambda item: item.stamp(), found))
                for name, stamp, item, stamp_now in zip(names, stamps, found, now, strict=False):
                    if (name, stamp) != (item.name, stamp_now):
                        raise ConversionError(
                            f"{self.files.target}: {name} of the source changed since the interrupted conversion; "
                            "use --restart to start over"
                        )

    def _write(self) -> None:
        items = self.source.items()
        for _ in zip(range(self.done), items, strict=False):
            pass
        pending = _Pending()
        with ThreadPoolExecutor(1) as committer:
            last: Future[None] | None = None
            try:
                for looked in self._looked(items):
                    pending.add(looked)
                    if pending.full():
                        if last is not None:
                            last.result()
                        last = committer.submit(self._commit, pending)
                        pending = _Pending()
            finally:
                # On an error or an interrupt too: what was looked at need not be looked at again.
                if last is not None:
                    last.result()
                if pending.rows:
                    committer.submit(self._commit, pending).result()

    def _looked(self, items: Iterable[Item]) -> Iterator[_Looked]:
        """Images in order, read and looked at by threads a bounded way ahead."""
        queue: deque[Future[_Looked]] = deque()
        ahead_bytes = 0
        mean_bytes = 1 << 20  # assumed of the images in the queue; then the running mean
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for item in items:
                    queue.append(pool.submit(_look, item, self.settings))
                    while len(queue) >= min(_AHEAD_ITEMS, max(2 * self.threads, _AHEAD_BYTES // mean_bytes)):
                        looked = queue.popleft().result()
                        ahead_bytes = len(looked.data)
                        mean_bytes = max(1, (15 * mean_bytes + ahead_bytes) // 16)
                        yield looked
                while queue:
                    yield queue.popleft().result()
            finally:
                for future in queue:
                    future.cancel()

    def _commit(self, pending: _Pending) -> None:
        columns = list(zip(*pending.rows, strict=True))
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, ROW_SCHEMA, strict=True)]
        self.journal.append(pa.RecordBatch.from_arrays(arrays, schema=ROW_SCHEMA))
        self.writer.commit(pending.values)
        self.done += len(pending.rows)
        self.num_bytes += pending.num_bytes
        self._report_progress("writing", self.done)

    def _refuse_bad(self) -> None:
        """Write the report of bad images; raise if they are not to be skipped."""
        bad = _write_report(self.journal, self.files.report)
        if self.writer.num_records == 0:
            raise ConversionError(f"{self.files.target}: all {bad} images are bad, see {self.files.report}")
        if bad and self.settings.on_bad == "fail":
            raise ConversionError(
                f"{self.files.target}: {bad} of {self.done} images are bad, see {self.files.report}; nothing was "
                "published; mend them and use --restart, or leave them out with --on-bad skip"
            )

    def _finish(self) -> None:
        columns, names = _index_of(self.journal)
        offsets, lengths = self.writer.record_extents()
        columns["file_offset"] = offsets
        self._verify(columns, lengths)
        made = {
            "by": f"dali_lmdb {dali_lmdb.__version__}",
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "source": {"kind": self.source.kind, **self.source.identity()},
            "settings": self.settings.identity(),
            "skipped": self.done - self.writer.num_records,
        }
        self.writer.finish(columns, names, classes=self.source.classes, made=made)

    def _verify(self, columns: dict[str, npt.NDArray[Any]], lengths: npt.NDArray[np.uint32]) -> None:
        """Read every record back and compare it with the checksum taken from the source's bytes."""
        if (lengths != columns["num_bytes"]).any():
            raise ConversionError(f"{self.files.partial}: read back with wrong lengths; use --restart")
        starts = range(0, len(lengths), _VERIFY_RECORDS)
        with ThreadPoolExecutor(self.threads) as pool:
            futures = [pool.submit(self.writer.checksums, at, at + _VERIFY_RECORDS) for at in starts]
            for at, future in zip(starts, futures, strict=True):
                found = future.result()
                wrong = np.flatnonzero(found != columns["crc32"][at : at + len(found)])
                if len(wrong):
                    pool.shutdown(cancel_futures=True)
                    raise ConversionError(
                        f"{self.files.partial}: record {at + wrong[0]} reads back with a wrong checksum; "
                        "check the disk, then use --restart"
                    )
                self._report_progress("verifying", at + len(found))

    def _report_progress(self, phase: Literal["writing", "verifying"], done: int) -> None:
        if self.progress is not None:
            self.progress(Progress(phase, done, self.total, self.num_bytes))


def _look(item: Item, settings: ConvertSettings) -> _Looked:
    """Read one image and look at it; runs in a thread."""
    data = item.read()
    kind, height, width, reason = Kind.UNKNOWN, 0, 0, None
    if settings.check != "none":
        try:
            kind, height, width = read_header(data, max_pixels=settings.max_pixels)
        except BadImageError as error:
            reason = str(error)
    index_row = {
        "label": item.label,
        "height": height,
        "width": width,
        "num_bytes": len(data),
        "crc32": zlib.crc32(data),
        "kind": int(kind),
        "change": int(Change.NONE),
    }
    values = [index_row[name] for name in INDEX_ROW_COLUMNS]
    return _Looked(data, (item.name, *values, item.stamp(), reason))


def _index_of(journal: Journal) -> tuple[dict[str, npt.NDArray[Any]], pa.Array]:
    """Index columns (without file offsets) and names of the records, from the journal."""
    batches = [batch.filter(batch.column("reason").is_null()) for batch in journal.rows()]
    table = pa.Table.from_batches(batches, schema=ROW_SCHEMA)
    columns = {name: table.column(name).to_numpy() for name in INDEX_ROW_COLUMNS}
    return columns, table.column("name").combine_chunks()


def _write_report(journal: Journal, path: Path) -> int:
    """List the bad images, ``name TAB reason`` a line; no file if there are none. Returns their number."""
    bad = 0
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as report:
        report.write("name\treason\n")
        for batch in journal.rows():
            for row in batch.filter(batch.column("reason").is_valid()).to_pylist():
                bad += 1
                report.write("\t".join(" ".join(row[key].split()) for key in ("name", "reason")) + "\n")
    if not bad:
        path.unlink()
    return bad


def _summarise(target: Path, files: _Files, journal: Journal, source: Source, seconds: float) -> Summary:
    rows = records = num_bytes = 0
    for batch in journal.rows():
        good = batch.filter(batch.column("reason").is_null())
        rows, records = rows + batch.num_rows, records + good.num_rows
        num_bytes += int(good.column("num_bytes").to_numpy().sum(dtype=np.int64))
    return Summary(
        store=str(target),
        records=records,
        classes=len(source.classes),
        bytes=num_bytes,
        seconds=seconds,
        skipped=rows - records,
        report=str(files.report) if rows > records else None,
    )


def _check_target(target: Path) -> None:
    folder = target.parent
    if not folder.is_dir():
        raise ConversionError(f"{target}: its folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConversionError(f"{target}: its folder {folder} is not writable; choose another or change it")


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
