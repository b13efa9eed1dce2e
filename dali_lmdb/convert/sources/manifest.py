"""A CSV or TSV file that names image files and their labels: columns ``path`` and ``label``."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from dali_lmdb.convert.sources._digest import NameDigest
from dali_lmdb.convert.sources._files import ImageFile, check_inside, reading
from dali_lmdb.convert.sources._names import classes_of, printable, record_name
from dali_lmdb.convert.sources._whole_files import FileSource, FileState
from dali_lmdb.convert.sources.base import Item
from dali_lmdb.errors import SourceError

__all__ = ["ManifestSource"]


class _Row(NamedTuple):
    path: str
    """Relative to the manifest's folder."""
    label: str


class ManifestSource(FileSource):
    """Image files listed in a table whose header line has ``path`` and ``label``; other columns are ignored.

    Paths are relative to the manifest's folder and stay inside it. If all labels are integers, they are used as
    they are, and the classes are ``"0"``, ``"1"`` ... up to the largest; otherwise the classes are the distinct
    labels, sorted.

    Order: as in the table. The table is read again on every pass and never held in memory.

    Args:
        path: the table; separated by tabs if its name ends in ``.tsv`` or its header has one, else by commas.
            UTF-8.
        follow_links: follow symbolic links that lead out of the manifest's folder.

    Raises:
        SourceError: the table is missing or lacks a column; on first use: a line lacks a value, or a path leaves
            the folder or is repeated.
    """

    kind = "manifest"

    def __init__(self, path: str | os.PathLike[str], *, follow_links: bool = False) -> None:
        super().__init__(path, [FileState.of(path)])
        self.path = Path(path)
        self._follow_links = follow_links
        self._folder = os.path.dirname(os.path.abspath(path))
        self._root = os.path.realpath(self._folder)
        next(self._rows(), None)

    def items(self) -> Iterator[Item]:
        labels = {name: label for label, name in enumerate(self.classes)}
        for row in self._rows():
            file = ImageFile(os.path.join(self._folder, row.path))
            yield Item(record_name(row.label, row.path), labels[row.label], partial(self._read, file), file.stamp)

    @cached_property
    def classes(self) -> list[str]:
        return classes_of({row.label for row in self._rows()}, where=self.path)

    @cached_property
    def _names(self) -> NameDigest:
        # A path must not be listed twice, even under two labels, which make two different names.
        self._digest_of_distinct(lambda: (printable(row.path) for row in self._rows()))
        return super()._names

    def _read(self, file: ImageFile) -> bytes:
        check_inside(file.path, root=self._root, follow_links=self._follow_links)
        return file.read()

    def _rows(self) -> Iterator[_Row]:
        try:
            with reading(self.path), open(self.path, encoding="utf-8-sig", newline="") as stream:
                self._files[0].check(os.fstat(stream.fileno()))
                header = stream.readline()
                stream.seek(0)
                separator = "\t" if self.path.suffix.lower() == ".tsv" or "\t" in header else ","
                table = csv.reader(stream, delimiter=separator, strict=True)
                try:
                    columns = next(table, [])
                    if (columns.count("path"), columns.count("label")) != (1, 1):
                        raise SourceError(
                            f"{self.path}: the first line is {header.strip()[:80]!r}, expected the column "
                            f"names path and label, separated by {'a tab' if separator == chr(9) else 'a comma'}, "
                            "once each"
                        )
                    path_at, label_at = columns.index("path"), columns.index("label")
                    for values in table:
                        if values:
                            yield self._row(table.line_num, values, path_at, label_at)
                except csv.Error as error:
                    raise SourceError(f"{self.path}: line {table.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.path}: not UTF-8 text: {error.reason} at byte {error.start}") from error

    def _row(self, line: int, values: list[str], path_at: int, label_at: int) -> _Row:
        where = f"{self.path}: line {line}"
        if len(values) <= max(path_at, label_at) or not values[path_at] or not values[label_at]:
            raise SourceError(f"{where}: no path or no label; fix or remove the line")
        path = os.path.normpath(os.path.join(self._folder, values[path_at]))
        inside = os.path.join(self._folder, "")
        if "\0" in path or not path.startswith(inside):
            raise SourceError(
                f"{where}: {values[path_at]!r} leaves the manifest's folder {self._folder}; "
                "put the manifest into a folder above all images"
            )
        return _Row(path[len(inside) :], values[label_at])
