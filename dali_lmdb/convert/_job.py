"""One file of a store: images are read in threads, written in order, verified, then indexed."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dali_lmdb.convert._files import Files
from dali_lmdb.convert._journal import INDEX_ROW_COLUMNS, RESUME, ROW_SCHEMA, Journal, batch_of
from dali_lmdb.convert._reading import ReadImage, read_images
from dali_lmdb.convert.settings import ConvertProgress, ConvertSettings
from dali_lmdb.convert.sources.base import Item, Source
from dali_lmdb.decoding.examiner import Examiner
from dali_lmdb.disk import os_errors
from dali_lmdb.errors import ConversionError, StoreError, one_line
from dali_lmdb.store.fingerprint import Fingerprint
from dali_lmdb.store.reader import FileStore
from dali_lmdb.store.regular import open_own
from dali_lmdb.store.writer import StoreWriter, check_partial

__all__ = ["Job", "Share", "Task", "Written"]

_COMMIT_BYTES = 16 << 20  # of images per commit; the last image may exceed it
_VERIFY_RECORDS = 256  # that a thread reads back per task


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to convert and how; see ``_converter.convert``."""

    source: Source
    settings: ConvertSettings
    examiner: Examiner
    restart: bool
    num_threads: int
    commit_records: int
    progress: Callable[[ConvertProgress], None] | None

    def header(self, share: Share) -> dict[str, Any]:
        """What identifies the conversion of a share, for its journal."""
        return {
            "kind": self.source.kind,
            "settings": self.settings.identity(),
            "source": self.source_identity(share),
            "shard": share.shard,
        }

    def source_identity(self, share: Share) -> dict[str, Any]:
        """What identifies the source, and which part of it the store is made of."""
        split = {} if share.split is None else {"split": share.split}
        return {**self.source.identity(), **split}


class Share(NamedTuple):
    """The run of the source's items that goes into one file."""

    first: int
    """Index of its first item in the source."""
    num_items: int
    is_last: bool
    """Whether the source ends with it."""
    shard: dict[str, Any] | None
    """``Meta.shard`` without its ``set``; None for a store of one file."""
    split: dict[str, Any] | None = None
    """``Split.identity`` of the store's part of the source; None if it holds all of it."""


class Written(NamedTuple):
    """Describes a file once all its records are written."""

    num_records: int
    num_bad: int
    """Images that were refused."""
    fingerprint: str
    """``Fingerprint`` of the records."""
    report: str | None
    """Path of the list of what is not stored, if there is one."""


@dataclass
class Job:
    """Writes one file of the store and completes it, still under its partial name."""

    task: Task
    share: Share
    files: Files
    journal: Journal
    """Open on ``files.journal``."""

    def __post_init__(self) -> None:
        self._num_rows = self._num_bad = 0  # totals over the journal, which is not read again for them
        self._fingerprint = Fingerprint()
        self._num_bytes = self._num_left_out = 0

    def write(self, items: Iterator[Item]) -> Written:
        """Write the images of the share, resuming if some are written; bad ones are only reported.

        Args:
            items: the source's items from the first one of the share on; only those of the share are consumed.

        Raises:
            SourceError, ConversionError: see ``_converter.convert``.
        """
        self._start_or_resume()
        items = self._take_share(items)
        with StoreWriter(self.files.partial) as self.writer:
            self.journal.cut_to(self.writer.num_records)
            self._replay_journal(items)
            self._write(items)
            self.writer.sync()
        self._write_report()
        return self._written(self._num_rows - self._num_bad, self._fingerprint.hexdigest())

    def skip(self, items: Iterator[Item]) -> Written:
        """Skip a file that is already published; refuse a source that has changed since.

        Args, Raises: as ``write``.
        """
        items = self._take_share(items)
        self._replay_journal(items)
        deque(items, maxlen=0)
        store = FileStore(self.files.target)
        if self.journal.header is not None and self._fingerprint.hexdigest() != store.fingerprint:
            raise ConversionError(
                f"{self.files.target}: already exists, and its journal is of other images; choose another name"
            )
        return self._written(len(store), store.fingerprint)

    def finish(self, set_id: str) -> None:
        """Turn the partial file, which has all its records, into a complete store: verify it and add the index.

        Args:
            set_id: identifies the set that a shard belongs to.

        Raises:
            ConversionError: it reads back wrong, cannot be written, or is published as part of another set.
        """
        shard = None if self.share.shard is None else {**self.share.shard, "set": set_id}
        if not self.files.target.exists():
            with StoreWriter(self.files.partial) as self.writer:
                self._finish(shard)
        elif FileStore(self.files.target).meta.shard != shard:
            raise ConversionError(f"{self.files.target}: a shard of another conversion; choose another name")

    def _written(self, num_records: int, fingerprint: str) -> Written:
        report = str(self.files.report) if self.files.report.exists() else None
        return Written(num_records, self._num_bad, fingerprint, report)

    def wrote_target(self) -> bool:
        """Whether the target's own record of how it was made says that this conversion wrote it."""
        try:
            meta = FileStore(self.files.target).meta
        except StoreError:
            return False
        now, shard = (
            self.task.header(self.share),
            meta.shard and {key: meta.shard.get(key) for key in ("index", "count")},
        )
        made = {"kind": now["kind"], **now["source"]}, now["settings"], now["shard"]
        return made == (meta.made.get("source"), meta.made.get("settings"), shard)

    def _start_or_resume(self) -> None:
        """Start the journal, or refuse to resume a different conversion."""
        now = self.task.header(self.share)
        before, fault = self.journal.header, self.journal.fault
        if self.task.restart or (before is None and fault is None):
            self.files.partial.unlink(missing_ok=True)
            self.journal.start(now)
            return
        if before is None:
            raise ConversionError(f"{self.journal.path}: {fault}; use --restart to start over")
        for name in now:
            if before.get(name) != now[name]:
                raise ConversionError(
                    f"{self.files.target}: an interrupted conversion has {name} {before.get(name)}, this one has "
                    f"{now[name]}; repeat the same command, or use --restart to start over"
                )
        if next(self.journal.rows(), None) is None:  # killed while the partial file was being made
            self.files.partial.unlink(missing_ok=True)
        check_partial(self.files.partial)

    def _take_share(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield the items of the share; refuse a source that has fewer than were counted."""
        count = 0
        for count, item in enumerate(islice(items, self.share.num_items), start=1):  # noqa: B007  used below
            yield item
        if count < self.share.num_items:
            raise ConversionError(
                f"{self.files.target}: the source changed during the conversion: images were removed; use "
                "--restart when nothing writes to it"
            )

    def _replay_journal(self, items: Iterator[Item]) -> None:
        """Check that the images in the journal are unchanged in the source: name, label, stamp; count them."""
        with ThreadPoolExecutor(self.task.num_threads) as pool:
            for batch in self.journal.rows():
                self._add_to_totals(batch)
                found = pool.map(_identity_of, list(islice(items, batch.num_rows)))
                columns = (batch.column(name).to_pylist() for name in ("name", "label", "stamp"))
                for name, label, stamp in zip(*columns, strict=True):
                    if next(found, None) != (name, label, stamp):
                        raise ConversionError(
                            f"{self.files.target}: {name} of the source changed since the interrupted "
                            "conversion; use --restart to start over"
                        )

    def _write(self, items: Iterator[Item]) -> None:
        pending: list[ReadImage] = []
        num_bytes = 0
        with ThreadPoolExecutor(1) as committer:  # so that images are read while a commit waits for the disk
            last: Future[None] | None = None
            try:
                for image in read_images(
                    items,
                    self.task.settings,
                    self.task.examiner,
                    num_threads=self.task.num_threads,
                    in_order=self.task.source.reads_in_order,
                ):
                    pending.append(image)
                    num_bytes += len(image.data)
                    if num_bytes >= _COMMIT_BYTES or len(pending) >= self.task.commit_records:
                        if last is not None:
                            last.result()
                        # In this order: an interrupt in between may lose images, but not commit them twice.
                        full, pending, num_bytes = pending, [], 0
                        last = committer.submit(self._commit, full)
            finally:
                # On an error or an interrupt too: what was read need not be read again.
                if last is not None:
                    last.result()
                if pending:
                    committer.submit(self._commit, pending).result()

    def _commit(self, images: Sequence[ReadImage]) -> None:
        batch = batch_of([image.row for image in images])
        values = [image.data for image in images if image.row.reason is None]
        self.journal.append(batch)
        self.writer.commit(values)
        self._add_to_totals(batch)
        self._num_bytes += sum(map(len, values))
        self._report_progress("writing", self._num_rows)

    def _add_to_totals(self, batch: pa.RecordBatch) -> None:
        stored = _stored(batch)
        self._fingerprint.add(stored.column("label").to_numpy(), stored.column("crc32").to_numpy())
        self._num_rows += batch.num_rows
        self._num_bad += batch.num_rows - stored.num_rows

    def _write_report(self) -> None:
        """List what is not in the store, as lines of ``name TAB reason``; no file if the list is empty."""
        path, rows = self.files.report, self._not_stored()
        first = next(rows, None)
        with os_errors(path, "cannot be written", ConversionError, then=RESUME):
            path.unlink(missing_ok=True)
            if first is None:
                return
            try:
                descriptor = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, error=ConversionError)
                with open(descriptor, "w", encoding="utf-8") as file:
                    for row in chain([("name", "reason"), first], rows):
                        file.write("\t".join(map(one_line, row)) + "\n")
            except BaseException:
                path.unlink(missing_ok=True)  # half a list would look complete
                raise

    def _not_stored(self) -> Iterator[tuple[str, str]]:
        """Yield (name, reason) of bad images, then of the files that were left out."""
        for batch in self.journal.rows() if self._num_bad else ():
            bad = batch.filter(batch.column("reason").is_valid())
            yield from zip(bad.column("name").to_pylist(), bad.column("reason").to_pylist(), strict=True)
        for name, reason in self.task.source.left_out() if self.share.is_last else ():
            self._num_left_out += 1
            yield name, f"left out: {reason}"

    def _finish(self, shard: dict[str, Any] | None) -> None:
        pieces = self.writer.pieces()
        tables = _regroup(map(_stored, self.journal.rows()), list(map(len, pieces)))
        for piece, table in zip(pieces, tables, strict=True):
            columns = {name: table.column(name).to_numpy() for name in INDEX_ROW_COLUMNS}
            columns["file_offset"], lengths = self.writer.record_extents(piece.start, piece.stop)
            self._verify(piece, columns, lengths)
            self.writer.add_index(columns, table.column("name").combine_chunks())
        made = {
            "by": f"dali_lmdb {version('dali-lmdb')}",
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "source": {"kind": self.task.source.kind, **self.task.source_identity(self.share)},
            "settings": self.task.settings.identity(),
            "skipped": self._num_bad,
            "left_out": self._num_left_out,
        }
        self.writer.finish(classes=self.task.source.classes, made=made, shard=shard)

    def _verify(self, piece: range, columns: dict[str, npt.NDArray[Any]], lengths: npt.NDArray[np.uint32]) -> None:
        """Read records back and compare them with the checksums taken from the source's bytes."""
        if (lengths != columns["num_bytes"]).any():
            raise ConversionError(f"{self.files.partial}: reads back with wrong lengths; use --restart")
        runs = [range(start, min(start + _VERIFY_RECORDS, piece.stop)) for start in piece[::_VERIFY_RECORDS]]
        with ThreadPoolExecutor(self.task.num_threads) as pool:
            futures = [pool.submit(self.writer.checksums, run.start, run.stop) for run in runs]
            for run, future in zip(runs, futures, strict=True):
                expected = columns["crc32"][run.start - piece.start : run.stop - piece.start]
                wrong = np.flatnonzero(future.result() != expected)
                if len(wrong):
                    pool.shutdown(cancel_futures=True)
                    raise ConversionError(
                        f"{self.files.partial}: record {run.start + wrong[0]} reads back with a wrong checksum; "
                        "check the disk, then use --restart"
                    )
                self._report_progress("verifying", run.stop)

    def _report_progress(self, phase: Literal["writing", "verifying"], done: int) -> None:
        if self.task.progress is not None:
            target = str(self.files.target)
            self.task.progress(ConvertProgress(target, phase, done, self.share.num_items, self._num_bytes))


def _stored(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of stored images, usually all of them."""
    reason = batch.column("reason")
    if reason.null_count == batch.num_rows:  # filtering imports pyarrow.compute: 0.1 s of a short conversion
        return batch
    return batch.filter(reason.is_null())


def _regroup(batches: Iterator[pa.RecordBatch], lengths: Sequence[int]) -> Iterator[pa.Table]:
    """Regroup the rows of batches into tables of the given lengths, in order."""
    waiting = ROW_SCHEMA.empty_table()
    for length in lengths:
        while waiting.num_rows < length:
            waiting = pa.concat_tables([waiting, pa.Table.from_batches([next(batches)])])
        yield waiting[:length]
        waiting = waiting[length:]


def _identity_of(item: Item) -> tuple[str, int, int]:
    return item.name, item.label, item.stamp()
