"""End-to-end checks of one file of a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dali_lmdb.decoding.examiner import Examiner
from dali_lmdb.errors import DaliLmdbError, StoreDamagedError
from dali_lmdb.images.header import Header, read_header
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.opening import BadImageError, pixel_limit
from dali_lmdb.inspect.records import Progress, ProgressCallback, duplicates, in_order, runs
from dali_lmdb.store import FileStore, Store, layout
from dali_lmdb.store.checksum import crc32
from dali_lmdb.store.fingerprint import fingerprint
from dali_lmdb.store.index import Index, Names
from dali_lmdb.store.meta import Meta
from dali_lmdb.store.pages import Extent, PageFile
from dali_lmdb.store.structure import check_structure
from dali_lmdb.store.values import read_values

__all__ = ["MAX_LISTED", "FileCheck", "Findings", "PayloadCheck"]

MAX_LISTED = 10_000
"""Number of damage lines that are listed; further ones are only counted."""

# Limits of what is decoded at a time, per thread.
_BLOCK_IMAGES = 31
_BLOCK_BYTES = 4 << 20

_UNINSPECTED = {"kind": Kind.UNKNOWN, "height": 0, "width": 0}
"""What the index holds for images stored with ``--check none``."""


@dataclass
class Findings:
    """Damage and notes found so far, and how much was read."""

    damage: list[str] = field(default_factory=list)
    num_damage: int = 0
    notes: list[str] = field(default_factory=list)
    records: int = 0
    num_bytes: int = 0

    def add(self, *lines: str) -> None:
        """Add damage."""
        self.num_damage += len(lines)
        self.damage += lines[: MAX_LISTED - len(self.damage)]


class _Check:
    """Base class of the checks: reads all records in threads and reports progress."""

    def __init__(
        self,
        path: Path,
        findings: Findings,
        *,
        examiner: Examiner | None,
        threads: int,
        progress: ProgressCallback | None,
    ) -> None:
        self.path, self.findings = path, findings
        self.examiner, self.threads, self.progress = examiner, threads, progress

    def _check_records(self, check_run: Callable[[range], Findings], total: int) -> None:
        """Check all records, some at a time, in threads."""
        stop = self.examiner.close if self.examiner is not None else None
        found_in = in_order(check_run, runs(total), num_threads=self.threads, stop=stop)
        for run, found in zip(runs(total), found_in, strict=True):
            self.findings.add(*found.damage)
            self.findings.records += found.records
            self.findings.num_bytes += found.num_bytes
            self._report_progress("reading", run.stop, total)

    def _report_progress(self, phase: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(Progress(f"{phase} of {self.path.name}", done, total, self.findings.num_bytes))

    def _problems_of(self, images: Iterable[tuple[int, bytes, Header]]) -> dict[int, str]:
        """The problems of records that cannot be decoded; none if that was not requested."""
        problems: dict[int, str] = {}
        images = iter(images)
        while block := _block(images):
            if self.examiner is not None:
                verdicts = self.examiner.examine([(data, header) for _, data, header in block])
                reasons = zip((record for record, _, _ in block), verdicts, strict=True)
                problems |= {record: verdict.reason for record, verdict in reasons if verdict.reason is not None}
        return problems


def _block(images: Iterator[tuple[int, bytes, Header]]) -> list[tuple[int, bytes, Header]]:
    """The next images, up to the limits of a block."""
    block: list[tuple[int, bytes, Header]] = []
    num_bytes = 0
    for image in images:
        block.append(image)
        num_bytes += len(image[1])
        if len(block) == _BLOCK_IMAGES or num_bytes >= _BLOCK_BYTES:
            break
    return block


class FileCheck(_Check):
    """Checks one store file."""

    names: pa.ChunkedArray | None = None

    def run(self) -> None:
        """Check everything that can be checked; without metadata and index, that is only the structure."""
        num_before = self.findings.num_damage
        self._report_progress("checking the structure", 0, 0)
        self.findings.add(*(f"{self.path}: {problem}" for problem in check_structure(self.path)))
        try:
            self._open()
        except StoreDamagedError as error:
            self.findings.add(str(error))
            return
        self._check_meta()
        self._check_names()
        self.offsets = self._find_records()
        # If damage has been found already, it is the reason why readers cannot find records.
        self._check_offsets(report=self.findings.num_damage == num_before)
        self._check_labels()
        self._check_records(self._check_run, self.meta.num_records)
        uninspected = np.all([self.columns[name] == value for name, value in _UNINSPECTED.items()], axis=0)
        if uninspected.any():
            self.findings.notes.append(
                f"{self.path}: {uninspected.sum():,} records were stored uninspected; "
                "their kind and size are unknown"
            )

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
            self.findings.add(f"{self.path}: fingerprint {meta.fingerprint}, the index has {found}")
        if len(set(meta.classes)) < len(meta.classes):
            self.findings.add(f"{self.path}: duplicate class names")
        expected = meta.num_records + 2 * len(meta.pieces()) + 1  # index, names and meta
        if self.pages.entries != expected:
            self.findings.add(f"{self.path}: {self.pages.entries} keys, expected {expected}")

    def _check_names(self) -> None:
        try:
            self.names = Names(self.pages, self.meta).all()
        except StoreDamagedError as error:
            self.findings.add(str(error))
            return
        for record, earlier in duplicates(self.names):
            self.findings.add(self._line(record, f"the same name as record {earlier}"))

    def _find_records(self) -> npt.NDArray[np.uint64]:
        """Check keys and lengths; return each value's offset, or 0 if it cannot be read."""
        num_records = self.meta.num_records
        try:
            offsets, lengths = self.pages.record_extents(0, num_records)
        except StoreDamagedError as error:
            self.findings.add(str(error))
            offsets, lengths = self._find_one_by_one()
        differing = np.flatnonzero((offsets != 0) & (lengths != self.columns["num_bytes"]))
        for record in differing.tolist():
            expected = self.columns["num_bytes"][record]
            self.findings.add(self._line(record, f"{lengths[record]:,} bytes, the index says {expected:,}"))
        offsets[differing] = 0
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
                self.findings.add(self._line(record, what))
            else:
                offsets[record], lengths[record] = extent
        return offsets, lengths

    def _check_offsets(self, *, report: bool) -> None:
        """Check that readers find the records; stale offsets in the index are harmless if readers detect them."""
        try:
            used, _ = FileStore(self.path).extents(np.arange(self.meta.num_records))
        except StoreDamagedError as error:
            if report:
                self.findings.add(str(error))
            return
        found = self.offsets
        for record in np.flatnonzero((found != 0) & (used != found)).tolist():
            self.findings.add(
                self._line(record, f"is at offset {found[record]}, readers use offset {used[record]}")
            )
        written = self.columns["file_offset"]
        num_stale = np.count_nonzero((written != 0) & (written != used))
        if num_stale:
            self.findings.notes.append(
                f"{self.path}: {num_stale:,} file offsets are stale, as in a compacted copy; readers look them up"
            )

    def _check_labels(self) -> None:
        labels = self.columns["label"]
        for record in np.flatnonzero((labels < 0) | (labels >= len(self.meta.classes))).tolist():
            self.findings.add(
                self._line(record, f"label {labels[record]}, expected 0 to {len(self.meta.classes) - 1}")
            )

    def _check_run(self, run: range) -> Findings:
        """Read consecutive records that were found and compare them with the index; called in a thread."""
        found = Findings()
        records = run.start + np.flatnonzero(self.offsets[run.start : run.stop])
        values = read_values(self.path, self.offsets[records], self.columns["num_bytes"][records])
        problems: dict[int, str] = {}

        def sound() -> Iterator[tuple[int, bytes, Header]]:
            for record, data in zip(records.tolist(), values, strict=True):
                if isinstance(data, OSError):
                    problems[record] = f"cannot be read: {data.strerror}"
                    continue
                found.records += 1
                found.num_bytes += len(data)
                result = self._compare(record, data)
                if isinstance(result, str):
                    problems[record] = result
                else:
                    yield record, data, result

        undecodable = self._problems_of(sound())
        problems |= undecodable
        found.add(*(self._line(record, problems[record]) for record in sorted(problems)))
        return found

    def _compare(self, record: int, data: bytes) -> Header | str:
        """A record's header, or the problem with the record."""
        columns = self.columns
        if len(data) != columns["num_bytes"][record]:
            return f"only {len(data):,} bytes could be read"
        if crc32(data) != columns["crc32"][record]:
            return "wrong checksum"
        expected = tuple(int(columns[name][record]) for name in _UNINSPECTED)
        is_inspected = expected != tuple(_UNINSPECTED.values())
        if not is_inspected and self.examiner is None:
            return Header(Kind.UNKNOWN, 0, 0)
        try:
            header = read_header(data, max_pixels=pixel_limit(*expected[1:]))
        except BadImageError as error:
            return f"{error}, the index says {_describe(*expected)}" if is_inspected else str(error)
        if is_inspected and header != expected:
            return f"{_describe(*header)}, the index says {_describe(*expected)}"
        return header

    def _line(self, record: int, what: str) -> str:
        name = f" ({self.names[record].as_py()})" if self.names is not None else ""
        return f"{self.path}: record {record}{name}: {what}"


class PayloadCheck(_Check):
    """Checks that each record can be read, for a store without checksums."""

    def __init__(self, store: Store, findings: Findings, **options: Any) -> None:
        super().__init__(store.path, findings, **options)
        self.store = store

    def run(self) -> None:
        """Read every record, and decode it if requested."""
        self.findings.notes.append(f"{self.path}: no checksums; only checked that each record can be read")
        self._check_records(self._check_run, len(self.store))

    def _check_run(self, run: range) -> Findings:
        """Check consecutive records; called in a thread."""
        found = Findings()
        damage: dict[int, str] = {}

        def readable() -> Iterator[tuple[int, bytes, Header]]:
            for record in run:
                try:
                    data = self.store.copy(record)
                    header = read_header(data, max_pixels=pixel_limit(0, 0)) if self.examiner is not None else None
                except DaliLmdbError as error:
                    damage[record] = str(error)
                    continue
                except BadImageError as error:
                    damage[record] = f"{self.store.where(record)}: {error}"
                    header = None
                found.records += 1
                found.num_bytes += len(data)
                if header is not None:
                    yield record, data, header

        for record, problem in self._problems_of(readable()).items():
            damage[record] = f"{self.store.where(record)}: {problem}"
        found.add(*(damage[record] for record in sorted(damage)))
        return found


def _describe(kind: int, height: int, width: int) -> str:
    known = {kind.value: kind.name for kind in Kind}
    return f"{known.get(kind, f'kind {kind}')}, {width} x {height} pixels"
