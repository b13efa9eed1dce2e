"""End-to-end checks of one file of a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dali_lmdb.errors import DaliLmdbError, StoreDamagedError
from dali_lmdb.images.checking import check_decodes
from dali_lmdb.images.header import read_header
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.opening import BadImageError, pixel_limit
from dali_lmdb.inspect.records import Progress, Values, in_order, repeated, runs
from dali_lmdb.store import FileStore, Store, layout
from dali_lmdb.store.checksum import crc32
from dali_lmdb.store.fingerprint import fingerprint
from dali_lmdb.store.index import Index, Names
from dali_lmdb.store.meta import Meta
from dali_lmdb.store.pages import Extent, PageFile
from dali_lmdb.store.structure import check_structure

__all__ = ["MAX_LISTED", "FileCheck", "Findings", "PayloadCheck", "Show"]

MAX_LISTED = 10_000
"""Number of damage lines that are listed; further ones are only counted."""

Show = Callable[[Progress], None]


class Findings:
    """Damage and notes found so far."""

    def __init__(self) -> None:
        self.damage: list[str] = []
        self.num_damage = 0
        self.notes: list[str] = []
        self.records = 0
        self.num_bytes = 0

    def add(self, line: str) -> None:
        self.num_damage += 1
        if len(self.damage) < MAX_LISTED:
            self.damage.append(line)


class FileCheck:
    """Checks one store file."""

    def __init__(self, path: Path, findings: Findings, *, decode: bool, threads: int, show: Show | None) -> None:
        self.path, self.findings, self.decode, self.threads, self.show = path, findings, decode, threads, show
        self.names: pa.ChunkedArray | None = None
        self.num_before = findings.num_damage

    def run(self) -> None:
        """Check everything that can be checked; without metadata and index, that is only the structure."""
        self._report_progress("checking the structure", 0, 0)
        problems = check_structure(self.path)
        if problems is None:
            self.findings.notes.append(f"{self.path}: structure not checked; that needs py-lmdb 3 or newer")
        for problem in problems or ():
            self.findings.add(f"{self.path}: {problem}")
        try:
            self._open()
        except StoreDamagedError as error:
            self.findings.add(str(error))
            return
        self._check_meta()
        self._check_names()
        self._check_records(self._find_records())

    def _open(self) -> None:
        self.pages = PageFile(self.path)
        extent = self.pages.find(layout.META_KEY)
        if extent is None:
            raise StoreDamagedError(f"{self.path}: damaged: no __meta__; convert it again")
        self.meta = Meta.from_bytes(bytes(self.pages.view(extent)), path=self.path)
        index = Index(self.pages, self.meta, check=True)
        self.columns = {name: index.column(name) for name in layout.INDEX_SCHEMA.names}

    def _check_meta(self) -> None:
        labels, meta = self.columns["label"], self.meta
        found = fingerprint([(labels, self.columns["crc32"])])
        if found != meta.fingerprint:
            self._damaged(f"fingerprint {meta.fingerprint}, that of the index is {found}")
        if len(set(meta.classes)) < len(meta.classes):
            self._damaged("duplicate class names")
        expected = meta.num_records + 2 * len(meta.pieces()) + 1  # index, names and meta
        if self.pages.entries != expected:
            self._damaged(f"{self.pages.entries} keys, expected {expected}")

    def _check_names(self) -> None:
        try:
            self.names = Names(self.pages, self.meta).all()
        except StoreDamagedError as error:
            self.findings.add(str(error))
            return
        for record, earlier in repeated(self.names):
            self._record_damaged(record, f"the same name as record {earlier}")

    def _find_records(self) -> npt.NDArray[np.uint64]:
        """Check keys, lengths, offsets, labels; return each value's offset, 0 if there is none to read."""
        num_records = self.meta.num_records
        try:
            offsets, lengths = self.pages.record_extents(0, num_records)
        except StoreDamagedError as error:
            self.findings.add(str(error))
            offsets, lengths = self._find_one_by_one()
        differing = np.flatnonzero((offsets != 0) & (lengths != self.columns["num_bytes"]))
        for record in differing.tolist():
            expected = self.columns["num_bytes"][record]
            self._record_damaged(record, f"{lengths[record]:,} bytes, the index says {expected:,}")
        offsets[differing] = 0
        self._check_offsets(offsets)
        labels = self.columns["label"]
        for record in np.flatnonzero((labels < 0) | (labels >= len(self.meta.classes))).tolist():
            self._record_damaged(record, f"label {labels[record]}, expected 0 to {len(self.meta.classes) - 1}")
        return offsets

    def _find_one_by_one(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        """Find the records that can still be found if a page is damaged."""
        offsets = np.zeros(self.meta.num_records, dtype=np.uint64)
        lengths = np.zeros(self.meta.num_records, dtype=np.uint32)
        for record in range(self.meta.num_records):
            extent: Extent | None = None
            try:
                extent = self.pages.find(layout.record_key(record))
                what = "missing"
            except StoreDamagedError as error:
                what = f"cannot be found: {error}"
            if extent is None:
                self._record_damaged(record, what)
            else:
                offsets[record], lengths[record] = extent
        return offsets, lengths

    def _check_offsets(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Check that readers find the records; offsets in the index may be stale if readers detect that."""
        try:
            taken, _ = FileStore(self.path).extents(np.arange(self.meta.num_records))
        except StoreDamagedError as error:
            if self.findings.num_damage == self.num_before:  # otherwise it follows from damage already listed
                self.findings.add(str(error))
            return
        for record in np.flatnonzero((offsets != 0) & (taken != offsets)).tolist():
            self._record_damaged(record, f"is at offset {offsets[record]}, readers use offset {taken[record]}")
        written = self.columns["file_offset"]
        num_stale = np.count_nonzero((written != 0) & (written != taken))
        if num_stale:
            self.findings.notes.append(
                f"{self.path}: {num_stale:,} file offsets are stale, as in a compacted copy; readers look them up"
            )

    def _check_records(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Read all records that were found and compare them with the index."""
        total = self.meta.num_records
        unseen = 0

        def check(run: range) -> _Run:
            return self._check_run(run, offsets)

        for run in in_order(check, runs(total), num_threads=self.threads):
            for record, what in run.damage:
                self._record_damaged(record, what)
            self.findings.records += run.records
            self.findings.num_bytes += run.num_bytes
            unseen += run.unseen
            self._report_progress("reading", run.stop, total)
        if unseen:
            self.findings.notes.append(
                f"{self.path}: {unseen:,} records were stored uninspected; their kind and size are unknown"
            )

    def _check_run(self, run: range, offsets: npt.NDArray[np.uint64]) -> _Run:
        """Check consecutive records; called in a thread."""
        records = run.start + np.flatnonzero(offsets[run.start : run.stop])
        lengths = self.columns["num_bytes"][records]
        result = _Run(run.stop)
        try:
            with Values(self.path, offsets[records], lengths) as values:
                for position, record in enumerate(records.tolist()):
                    try:
                        data = values.read(position)
                    except OSError as error:
                        result.damage.append((record, f"cannot be read: {error.strerror}"))
                        continue
                    result.records += 1
                    result.num_bytes += len(data)
                    what = self._look(record, data, result)
                    if what is not None:
                        result.damage.append((record, what))
        except OSError as error:
            result.damage.append((run.start, f"and those after it cannot be read: {error.strerror}"))
        return result

    def _look(self, record: int, data: bytes, result: _Run) -> str | None:
        """The problem with a record, or None."""
        columns = self.columns
        if len(data) != columns["num_bytes"][record]:
            return f"only {len(data):,} bytes could be read"
        if crc32(data) != columns["crc32"][record]:
            return "wrong checksum"
        expected = tuple(int(columns[name][record]) for name in ("kind", "height", "width"))
        max_pixels = pixel_limit(*expected[1:])
        if expected == (Kind.UNKNOWN, 0, 0):
            result.unseen += 1
        else:
            try:
                found = read_header(data, max_pixels=max_pixels)
            except BadImageError as error:
                return f"{error}, the index says {_describe(*expected)}"
            if found != expected:
                return f"{_describe(*found)}, the index says {_describe(*expected)}"
        return _decoding_problem(data, max_pixels) if self.decode else None

    def _damaged(self, what: str) -> None:
        self.findings.add(f"{self.path}: {what}")

    def _record_damaged(self, record: int, what: str) -> None:
        name = f" ({self.names[record].as_py()})" if self.names is not None else ""
        self.findings.add(f"{self.path}: record {record}{name}: {what}")

    def _report_progress(self, phase: str, done: int, total: int) -> None:
        if self.show is not None:
            self.show(Progress(f"{phase} of {self.path.name}", done, total, self.findings.num_bytes))


class _Run:
    """The result for consecutive records."""

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self.damage: list[tuple[int, str]] = []
        self.records = 0
        self.num_bytes = 0
        self.unseen = 0


class PayloadCheck:
    """Checks that each record can be read, for a store without checksums."""

    def __init__(self, store: Store, findings: Findings, *, decode: bool, threads: int, show: Show | None) -> None:
        self.store, self.findings, self.decode, self.threads, self.show = store, findings, decode, threads, show

    def run(self) -> None:
        """Read every record, and decode it if requested."""
        self.findings.notes.append(f"{self.store.path}: no checksums; only checked that each record can be read")
        total = len(self.store)
        for run in in_order(self._check_run, runs(total), num_threads=self.threads):
            for _, line in run.damage:
                self.findings.add(line)
            self.findings.records += run.records
            self.findings.num_bytes += run.num_bytes
            if self.show is not None:
                phase = f"reading of {self.store.path.name}"
                self.show(Progress(phase, run.stop, total, self.findings.num_bytes))

    def _check_run(self, run: range) -> _Run:
        """Check consecutive records; called in a thread."""
        result = _Run(run.stop)
        for record in run:
            try:
                data = self.store.copy(record)
            except DaliLmdbError as error:
                result.damage.append((record, str(error)))
                continue
            result.records += 1
            result.num_bytes += len(data)
            what = _decoding_problem(data, pixel_limit(0, 0)) if self.decode else None
            if what is not None:
                result.damage.append((record, f"{self.store.where(record)}: {what}"))
        return result


def _decoding_problem(data: bytes, max_pixels: int | None) -> str | None:
    try:
        check_decodes(data, max_pixels=max_pixels)
    except BadImageError as error:
        return str(error)
    return None


def _describe(kind: int, height: int, width: int) -> str:
    known = {kind.value: kind.name for kind in Kind}
    return f"{known.get(kind, f'kind {kind}')}, {width} x {height} pixels"
