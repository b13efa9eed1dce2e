"""One store file's conversion: read and audited by threads, written in order, verified, left complete.

Files, for a target ``NAME.lmdb`` (all beside it, so that publishing is one rename):

* ``NAME.lmdb.partial``: the LMDB file while it grows;
* ``NAME.lmdb.partial-journal``: what was done so far, see ``journal.py``;
* ``NAME.lmdb.bad.tsv``: the images that were refused and the files that were left out, with reasons.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dali_lmdb.convert.journal import INDEX_ROW_COLUMNS, ROW_SCHEMA, Journal
from dali_lmdb.convert.reading import Looked, look_at
from dali_lmdb.convert.settings import ConvertSettings, Progress
from dali_lmdb.convert.sources.base import Item, Source
from dali_lmdb.disk import os_errors
from dali_lmdb.errors import ConversionError, one_line
from dali_lmdb.store.layout import fingerprint
from dali_lmdb.store.reader import FileStore
from dali_lmdb.store.writer import StoreWriter

__all__ = ["Files", "Job", "NameBlocks", "Part"]

# Images that are journalled together, then written.
_COMMIT_BYTES = 16 << 20
_COMMIT_RECORDS = 20_000
_VERIFY_RECORDS = 256  # records one thread checks at a time when reading back


class Files:
    """The paths beside a target."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        self.journal = target.with_name(target.name + ".partial-journal")
        self.report = target.with_name(target.name + ".bad.tsv")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which of the source's items go into one file."""

    num_items: int
    names: list[bytes]
    """``NameBlocks`` of the items, to notice that the source changed since it was counted."""
    is_last: bool
    """Whether the source ends with it."""
    shard: dict[str, Any] | None
    """What ``layout.Meta.shard`` says, but for the set; None for a store of one file."""


class NameBlocks:
    """A hash of each block of names in order; two sequences of names are equal if these are."""

    _BLOCK_NAMES = 1024

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._hash = hashlib.blake2b(digest_size=8)
        self._in_block = 0

    def add(self, name: str) -> None:
        """Take one more name."""
        self._hash.update(name.encode(errors="surrogateescape") + b"\0")
        self._in_block += 1
        if self._in_block == self._BLOCK_NAMES:
            self._close_block()

    def begins(self, blocks: list[bytes]) -> bool:
        """Whether what was taken so far, as far as blocks are full, is how ``blocks`` begin."""
        done = len(self._blocks)
        return self._blocks[-1:] == blocks[max(0, done - 1) : done]

    def end(self) -> list[bytes]:
        """The blocks, the last one as full as it is."""
        if self._in_block:
            self._close_block()
        return self._blocks

    def _close_block(self) -> None:
        self._blocks.append(self._hash.digest())
        self._hash, self._in_block = hashlib.blake2b(digest_size=8), 0


@dataclass
class _Pending:
    """Images looked at but not yet committed."""

    values: list[bytes] = field(default_factory=list)
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, looked: Looked) -> None:
        self.rows.append(looked.row)
        if looked.row[-1] is None:
            self.values.append(looked.data)
            self.num_bytes += len(looked.data)

    def full(self) -> bool:
        return self.num_bytes >= _COMMIT_BYTES or len(self.rows) >= _COMMIT_RECORDS


class Job:
    """Makes one file complete under its partial name.

    Args:
        source, part, settings: what to convert and how.
        files: where.
        journal: open on ``files.journal``.
        num_threads: threads that read and look at images.
        progress: called from time to time.
    """

    def __init__(
        self,
        source: Source,
        part: Part,
        settings: ConvertSettings,
        *,
        files: Files,
        journal: Journal,
        num_threads: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.source, self.part, self.settings, self.files = source, part, settings, files
        self.journal = journal
        self.num_threads, self.progress = num_threads, progress
        self.done = 0
        self.num_bytes = 0

    def write(self, items: Iterator[Item], *, restart: bool) -> tuple[int, int]:
        """Go on with what is there, or begin, until every image of the part is written or reported.

        Args:
            items: the source's, from the part's first on; exactly the part's are taken.
            restart: forget what is there.

        Returns:
            The number of records and of bad images.

        Raises:
            SourceError, ConversionError: see ``converter.convert``.
        """
        self._claim(restart=restart)
        items = self._as_counted(islice(items, self.part.num_items))
        with StoreWriter(self.files.partial) as self.writer:
            if self.writer.finished:
                deque(items, maxlen=0)
            else:
                self.done = self.journal.cut_to(self.writer.num_records)
                self._check_unchanged(items)
                self._write(items)
                self.writer.sync()
        _write_report(self._not_stored(), self.files.report)
        bad = self.journal.num_bad()
        return self.part.num_items - bad, bad

    def skip(self, items: Iterator[Item]) -> tuple[int, int]:
        """Leave a file alone that was published already, if the source is still what it was made from.

        Args, Returns, Raises: as ``write``.
        """
        items = self._as_counted(islice(items, self.part.num_items))
        self._check_unchanged(items)
        deque(items, maxlen=0)
        return len(FileStore(self.files.target)), self.journal.num_bad()

    def fingerprint(self) -> str:
        """``layout.fingerprint`` of the file's records, which are all written."""
        if self.files.target.exists():
            return FileStore(self.files.target).fingerprint
        records = _records(self.journal)
        return fingerprint((one.column("label").to_numpy(), one.column("crc32").to_numpy()) for one in records)

    def finish(self, set_name: str) -> None:
        """Make the partial file, with all records in it, a whole store: verify it and add the index.

        Args:
            set_name: what a shard says of the set that it belongs to.

        Raises:
            ConversionError: it reads back wrong, or the disk refuses; or it was finished as part of another set.
        """
        shard = None if self.part.shard is None else {**self.part.shard, "set": set_name}
        if not self.files.target.exists():
            with StoreWriter(self.files.partial) as self.writer:
                if not self.writer.finished:
                    self._finish(shard)
        finished = next(path for path in (self.files.target, self.files.partial) if path.exists())
        if FileStore(finished).meta.shard != shard:
            advice = "choose another name" if finished == self.files.target else "use --restart"
            raise ConversionError(f"{finished}: a shard of another conversion; {advice}")

    def is_same(self) -> bool:
        """Whether the journal is of this conversion."""
        return self.journal.header == self._header()

    def _left_out(self) -> Iterator[tuple[str, str]]:
        return self.source.left_out() if self.part.is_last else iter(())

    def _not_stored(self) -> Iterator[tuple[str, str]]:
        """(name, reason) of bad images, then of files that are none."""
        for batch in self.journal.rows():
            for row in batch.filter(batch.column("reason").is_valid()).to_pylist():
                yield row["name"], row["reason"]
        for name, reason in self._left_out():
            yield name, f"left out: {reason}"

    def _header(self) -> dict[str, Any]:
        return {
            "kind": self.source.kind,
            "settings": self.settings.identity(),
            "source": self.source.identity(),
            "shard": self.part.shard,
        }

    def _claim(self, *, restart: bool) -> None:
        now = self._header()
        before = self.journal.header
        if restart or before is None:
            self.files.partial.unlink(missing_ok=True)
            self.journal.start(now)
            return
        if self.journal.empty():  # killed while the partial file was being made
            self.files.partial.unlink(missing_ok=True)
        for name in now:
            if before.get(name) != now[name]:
                raise ConversionError(
                    f"{self.files.target}: an interrupted conversion is there with {name} {before.get(name)}, "
                    f"now {now[name]}; give the same again, or --restart to start over"
                )

    def _as_counted(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items, as long as they are those that were counted."""
        names = NameBlocks()
        for item in items:
            names.add(item.name)
            if not names.begins(self.part.names):
                raise self._changed(f"not the images that were there, up to {item.name}")
            yield item
        if names.end() != self.part.names:
            raise self._changed("images were added, removed or renamed")

    def _changed(self, what: str) -> ConversionError:
        return ConversionError(
            f"{self.files.target}: the source changed during the conversion: {what}; use --restart when nothing "
            "writes to it"
        )

    def _check_unchanged(self, items: Iterator[Item]) -> None:
        """Compare the images that are already written with the source, without reading them."""
        with ThreadPoolExecutor(self.num_threads) as pool:
            for batch in self.journal.rows():
                names, stamps = batch.column("name").to_pylist(), batch.column("stamp").to_pylist()
                found = list(islice(items, len(names)))
                now = list(pool.map(lambda item: (item.name, item.stamp()), found))
                for name, stamp, place in zip(names, stamps, range(len(names)), strict=True):
                    if place >= len(now) or now[place] != (name, stamp):
                        raise ConversionError(
                            f"{self.files.target}: {name} of the source changed since the interrupted "
                            "conversion; use --restart to start over"
                        )

    def _write(self, items: Iterator[Item]) -> None:
        pending = _Pending()
        with ThreadPoolExecutor(1) as committer:  # so that images are read while a commit waits for the disk
            last: Future[None] | None = None
            try:
                for looked in look_at(items, self.settings, num_threads=self.num_threads):
                    pending.add(looked)
                    if pending.full():
                        if last is not None:
                            last.result()
                        # In this order: an interrupt in between may lose images, but not commit them twice.
                        full, pending = pending, _Pending()
                        last = committer.submit(self._commit, full)
            finally:
                # On an error or an interrupt too: what was looked at need not be looked at again.
                if last is not None:
                    last.result()
                if pending.rows:
                    committer.submit(self._commit, pending).result()

    def _commit(self, pending: _Pending) -> None:
        columns = zip(*pending.rows, strict=True)
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, ROW_SCHEMA, strict=True)]
        self.journal.append(pa.RecordBatch.from_arrays(arrays, schema=ROW_SCHEMA))
        self.writer.commit(pending.values)
        self.done += len(pending.rows)
        self.num_bytes += pending.num_bytes
        self._report_progress("writing", self.done)

    def _finish(self, shard: dict[str, Any] | None) -> None:
        rows = _Rows(_records(self.journal))
        for piece in self.writer.pieces():
            table = rows.take(len(piece))
            columns = {name: table.column(name).to_numpy() for name in INDEX_ROW_COLUMNS}
            columns["file_offset"], lengths = self.writer.record_extents(piece.start, piece.stop)
            self._verify(piece, columns, lengths)
            self.writer.add_index(columns, table.column("name").combine_chunks())
        made = {
            "by": f"dali_lmdb {version('dali-lmdb')}",
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "source": {"kind": self.source.kind, **self.source.identity()},
            "settings": self.settings.identity(),
            "skipped": self.journal.num_bad(),
            "left_out": sum(1 for _ in self._left_out()),
        }
        self.writer.finish(classes=self.source.classes, made=made, shard=shard)

    def _verify(self, piece: range, columns: dict[str, npt.NDArray[Any]], lengths: npt.NDArray[np.uint32]) -> None:
        """Read records back and compare them with the checksums taken from the source's bytes."""
        if (lengths != columns["num_bytes"]).any():
            raise ConversionError(f"{self.files.partial}: reads back with wrong lengths; use --restart")
        runs = [range(start, min(start + _VERIFY_RECORDS, piece.stop)) for start in piece[::_VERIFY_RECORDS]]
        with ThreadPoolExecutor(self.num_threads) as pool:
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
        if self.progress is not None:
            self.progress(Progress(str(self.files.target), phase, done, self.part.num_items, self.num_bytes))


def _records(journal: Journal) -> Iterator[pa.RecordBatch]:
    """The journal's rows of what is stored."""
    for batch in journal.rows():
        yield batch.filter(batch.column("reason").is_null())


class _Rows:
    """Rows that come in batches, taken as many at a time as is wanted."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0

    def take(self, count: int) -> pa.Table:
        """The next rows."""
        while self._num_waiting < count:
            self._waiting.append(next(self._batches))
            self._num_waiting += self._waiting[-1].num_rows
        table = pa.Table.from_batches(self._waiting, ROW_SCHEMA)
        self._waiting, self._num_waiting = table[count:].to_batches(), table.num_rows - count
        return table[:count]


def _write_report(rows: Iterator[tuple[str, str]], path: Path) -> None:
    """List what is not stored, ``name TAB reason`` a line; no file if that is nothing."""
    first = next(rows, None)
    with os_errors(path, "cannot be written", ConversionError, then="then run the same command again to go on"):
        if first is None:
            path.unlink(missing_ok=True)
            return
        try:
            with open(path, "w", encoding="utf-8") as file:
                for row in chain([("name", "reason"), first], rows):
                    file.write("\t".join(map(one_line, row)) + "\n")
        except BaseException:
            path.unlink(missing_ok=True)  # half a list would look like a whole one
            raise
