"""Parquet as Hugging Face's ``datasets`` writes it: ``image: struct<bytes, path>`` and an integer label."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dali_lmdb.convert.sources._digest import NameDigest
from dali_lmdb.convert.sources._names import (
    check_classes,
    numbered_classes,
    path_problem,
    plain_path,
    record_name,
)
from dali_lmdb.convert.sources._patterns import files_of, stems_of
from dali_lmdb.convert.sources._whole_files import FileSource, FileState
from dali_lmdb.convert.sources.base import Item
from dali_lmdb.errors import SourceError

__all__ = ["ParquetSource"]

# Limits on the images decoded at a time; on rows too, since a group with repeated images understates its size.
_BATCH_BYTES = 8 << 20
_BATCH_ROWS = 64
_ROWS = 10_000  # labels and paths read at a time


class _Columns(NamedTuple):
    """The columns to read, from a file's schema."""

    image: str
    label: str
    has_path: bool
    classes: list[str] | None


class _File(NamedTuple):
    state: FileState
    num_rows: int
    columns: _Columns

    @property
    def path(self) -> Path:
        return self.state.path


class _Group(NamedTuple):
    """A row group."""

    file: _File
    metadata: pq.FileMetaData
    """Metadata of the whole file."""
    number: int
    rows: range
    """Its rows in the file."""


class _Row(NamedTuple):
    group: _Group
    stem: str
    row: int
    """Index in the file."""
    label: int
    path: str | None


class ParquetSource(FileSource):
    """Rows of one or several Parquet files.

    The columns are those of type ``Image`` and ``ClassLabel`` in the schema's Hugging Face metadata, and the
    label's names become the classes; without such metadata, they are ``image`` and ``label``, and the classes
    are ``"0"``, ``"1"`` ... A record's name is ``class/path``, with the image's ``path``. It is ``class/file/row``
    if that path is missing, absolute or has ``..``; and for all records if any path is repeated.

    Order: files by name, rows as they lie in the file. Images are read a few megabytes at a time, whatever
    the size of the row groups; only one file's row group metadata at a time is in memory.

    Args:
        path: a file, a folder of files, or a pattern: ``data/train-*.parquet``.

    Raises:
        SourceError: a file is missing, not Parquet, or has other columns; on first use: a label is null or out
            of range; on reading: an image is null.
    """

    kind = "parquet"
    reads_in_order = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        files = files_of(path, suffix=".parquet")
        self._stems = stems_of(files)
        first = _open(files[0])
        self._tables = [first]
        for file in map(_open, files[1:]):
            if file.columns != first.columns:
                raise SourceError(
                    f"{file.path}: other columns or class names than {first.path}; convert it separately"
                )
            self._tables.append(file._replace(columns=first.columns))  # the class names are held once
        super().__init__(path, [file.state for file in self._tables])

    def items(self) -> Iterator[Item]:
        by_row = self._names.repeated is not None
        images: _Images | None = None
        for row in self._rows():
            if images is None or images.group is not row.group:
                images = _Images(row.group)
            name = _name(row, self.classes[row.label], by_row=by_row)
            yield Item(name, row.label, partial(images.read, row.row))

    def count(self) -> int:
        return sum(file.num_rows for file in self._tables)

    @cached_property
    def classes(self) -> list[str]:
        named = self._tables[0].columns.classes
        if named is None:
            return numbered_classes((row.label for row in self._rows()), where=self._path)
        for row in self._rows():
            if not 0 <= row.label < len(named):
                raise SourceError(
                    f"{row.group.file.path}: row {row.row}: label {row.label}, expected 0 to {len(named) - 1}; "
                    "-1 often means unlabelled"
                )
        return named

    @cached_property
    def _names(self) -> NameDigest:
        """Digest of the names made from paths, which are used unless they repeat."""
        return self._digest_of(lambda: (_name(row, self.classes[row.label], by_row=False) for row in self._rows()))

    def _rows(self) -> Iterator[_Row]:
        for file, stem in zip(self._tables, self._stems, strict=True):
            first, metadata = 0, _metadata(file)
            for number in range(metadata.num_row_groups):
                rows = range(first, first + metadata.row_group(number).num_rows)
                group = _Group(file, metadata, number, rows)
                # Not strict: a damaged file may have fewer rows, and the conversion then finds too few items.
                for row, (label, path) in zip(rows, _labels_and_paths(group), strict=False):
                    yield _Row(group, stem, row, label, path)
                first = rows.stop


def _name(row: _Row, class_name: str, *, by_row: bool) -> str:
    """Name of a record; the image's path is left out if it could lead out of a folder."""
    path = "" if by_row or row.path is None or path_problem(row.path) else plain_path(row.path)
    return record_name(class_name, path or f"{row.stem}/{row.row:08d}")


def _open(path: Path) -> _File:
    try:
        state = FileState.of(path)
        with pq.ParquetFile(path) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (pa.ArrowException, ValueError) as error:
        raise SourceError(f"{path}: not a readable Parquet file: {_one_line(error)}") from error
    return _File(state, metadata.num_rows, _columns(schema, path))


def _columns(schema: pa.Schema, path: Path) -> _Columns:
    features = _features(schema)
    image = _column_of(features, "Image", "image", path)
    label = _column_of(features, "ClassLabel", "label", path)
    types = {field.name: field.type for field in schema}
    image_type, label_type = types.get(image), types.get(label)
    parts: dict[str, pa.DataType] = {}
    if image_type is not None and pa.types.is_struct(image_type):
        parts = {field.name: field.type for field in image_type}
    if _is_type(image_type, "string") or parts.keys() == {"path"}:
        raise SourceError(
            f"{path}: column {image!r} is {image_type}: paths without the images' bytes; embed them with "
            "datasets.table.embed_table_storage before to_parquet, or give a CSV with path and label"
        )
    if not _is_type(parts.get("bytes"), "binary"):
        raise SourceError(
            f"{path}: column {image!r} is {image_type or 'missing'}, expected struct<bytes: binary, path: string>"
        )
    if label_type is None or not pa.types.is_integer(label_type):
        raise SourceError(f"{path}: column {label!r} is {label_type or 'missing'}, expected an integer label")
    names = features.get(label, {}).get("names")
    classes = names if isinstance(names, list) else None
    if classes is not None:
        _check_text(classes, path)
        check_classes(classes, where=path)
    return _Columns(image, label, _is_type(parts.get("path"), "string"), classes)


def _check_text(names: list[Any], path: Path) -> None:
    for number, name in enumerate(names):
        if not isinstance(name, str) or any("\ud800" <= char <= "\udfff" for char in name):
            raise SourceError(
                f"{path}: class {number} is named {name!r:.80}, expected text; fix the file's metadata"
            )


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Hugging Face's description of the columns; empty without one."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _column_of(features: dict[str, dict[str, Any]], kind: str, usual: str, path: Path) -> str:
    """Name of the only column of a kind; the usual name if there are several or none."""
    found = [name for name, feature in features.items() if feature.get("_type") == kind]
    if len(found) == 1:
        return found[0]
    if found and usual not in found:
        raise SourceError(
            f"{path}: {len(found)} columns of kind {kind}: {', '.join(found)}; expected one {usual!r}"
        )
    return usual


def _is_type(kind: pa.DataType | None, name: str) -> bool:
    """Whether an Arrow type is the named one or its large, view or dictionary variant."""
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in (name, f"large_{name}", f"{name}_view")


def _metadata(file: _File) -> pq.FileMetaData:
    try:
        file.state.check(os.stat(file.path))
        return pq.read_metadata(file.path)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{file.path}: cannot be read: {_one_line(error)}") from error


def _batches(group: _Group, columns: list[str], num_rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the given columns of a row group, ``num_rows`` rows at a time."""
    path, metadata, number = group.file.path, group.metadata, group.number
    try:
        group.file.state.check(os.stat(path))
        # By default a whole column chunk is read at once.
        with pq.ParquetFile(path, metadata=metadata, pre_buffer=False, buffer_size=1 << 20) as parquet:
            yield from parquet.iter_batches(num_rows, row_groups=[number], columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: row group {number} cannot be read: {_one_line(error)}") from error


def _labels_and_paths(group: _Group) -> Iterator[tuple[int, str | None]]:
    """Yield label and path of each row of a group."""
    path, columns, first = group.file.path, group.file.columns, group.rows.start
    wanted = [columns.label, *([f"{columns.image}.path"] if columns.has_path else [])]
    for batch in _batches(group, wanted, _ROWS):
        for name in batch.schema.names:
            if batch.column(name).null_count:
                row = first + pc.index(batch.column(name).is_null(), True).as_py()
                raise SourceError(f"{path}: row {row}: {name!r} is null; every row needs image and label")
        labels = batch.column(columns.label).to_pylist()
        paths = [None] * len(labels)
        if columns.has_path:
            raw = batch.column(columns.image).field("path").cast(pa.large_binary()).to_pylist()  # may not be UTF-8
            paths = [None if path is None else path.decode(errors="backslashreplace") for path in raw]
        yield from zip(labels, paths, strict=True)
        first += len(labels)


class _Images:
    """The images of one row group, decoded in batches; each is decoded only once if they are read in order."""

    def __init__(self, group: _Group) -> None:
        self.group = group
        mean_bytes = group.metadata.row_group(group.number).total_byte_size // len(group.rows)
        self._batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, mean_bytes)))
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rows, self._decoded = range(0), pa.nulls(0)  # rows in the file, and their images
        self._lock = threading.Lock()

    def read(self, row: int) -> bytes:
        """The bytes of one image, by its row in the file; may be called in any thread.

        Raises:
            SourceError: they are null or cannot be read.
        """
        with self._lock:
            if row not in self._rows:
                self._decode(row)
            data: bytes | None = self._decoded[row - self._rows.start].as_py()
            if row == self.group.rows[-1]:
                self._rows, self._decoded = range(0), pa.nulls(0)  # items may outlive the group
        if data is None:
            where = f"{self.group.file.path}: row {row}"
            raise SourceError(f"{where}: no image bytes, perhaps only a path; embed the images in the file")
        return data

    def _decode(self, row: int) -> None:
        """Decode on to the batch that has a row; start over if the row is before the current batch."""
        if not 0 < self._rows.stop <= row:
            columns = [f"{self.group.file.columns.image}.bytes"]
            self._batches = _batches(self.group, columns, self._batch_rows)
            self._rows = range(self.group.rows.start, self.group.rows.start)
        while row not in self._rows:
            self._decoded = pa.nulls(0)  # freed before more are decoded
            batch = next(self._batches, None)
            if batch is None:
                where = f"{self.group.file.path}: row group {self.group.number}"
                raise SourceError(f"{where} is cut off; download the file again")
            self._rows = range(self._rows.stop, self._rows.stop + batch.num_rows)
            self._decoded = batch.column(0).field("bytes")
            # Else Arrow keeps what is freed for a while: 300 MB with pages of 100 MB and 16 threads.
            pa.default_memory_pool().release_unused()
        if self._rows.stop == self.group.rows.stop:
            self._batches = iter(())  # the reader holds a page, which may be as large as the group


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
