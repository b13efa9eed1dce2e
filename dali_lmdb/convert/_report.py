"""The list of what is not in a store, ``NAME.lmdb.bad.tsv``: bad images and files that were left out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from dali_lmdb.disk import os_errors
from dali_lmdb.errors import ConversionError, one_line

__all__ = ["write_report"]


def write_report(rows: Iterator[tuple[str, str]], path: Path) -> None:
    """Write ``name TAB reason`` lines; no file if there are none."""
    first = next(rows, None)
    with os_errors(path, "cannot be written", ConversionError, then="then run the same command again to resume"):
        if first is None:
            path.unlink(missing_ok=True)
            return
        try:
            with open(path, "w", encoding="utf-8") as file:
                for row in chain([("name", "reason"), first], rows):
                    file.write("\t".join(map(one_line, row)) + "\n")
        except BaseException:
            path.unlink(missing_ok=True)  # half a list would look complete
            raise
