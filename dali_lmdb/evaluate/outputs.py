"""The files of an evaluation, each whole or not there."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dali_lmdb.disk import os_errors, sync_folder
from dali_lmdb.errors import StateError, one_line
from dali_lmdb.evaluate.results import Predictions
from dali_lmdb.evaluate.settings import EvaluateSettings, partial_of
from dali_lmdb.images.grid import draw_grid
from dali_lmdb.store import Store

__all__ = ["write_outputs"]

_NUM_WORST = 25


def write_outputs(
    settings: EvaluateSettings, predictions: Predictions, *, classes: Sequence[str], store: Store
) -> None:
    """Write the files that the settings ask for.

    Raises:
        StateError: one cannot be written; nothing of it is left.
    """
    if settings.per_class is not None:
        table = _per_class(predictions, classes)
        _write(settings.per_class, lambda partial: partial.write_text(table, encoding="utf-8"))
    if settings.predictions is not None:
        rows = _rows(predictions, classes, store)
        _write(settings.predictions, lambda partial: pq.write_table(rows, partial))
    if settings.worst is not None:
        picture = _worst(predictions, classes, store)
        _write(settings.worst, lambda partial: partial.write_bytes(picture))


def _per_class(predictions: Predictions, classes: Sequence[str]) -> str:
    """A line for each class with records: its name, their number, and top-1 and top-5 in percent."""
    text = io.StringIO()
    table = csv.writer(text, dialect="excel-tab", lineterminator="\n")
    table.writerow(("class", "records", "top1", "top5"))
    for name, count, top1, top5 in zip(classes, *predictions.per_class(len(classes)), strict=True):
        if count:
            table.writerow((name, count, f"{100 * top1 / count:.2f}", f"{100 * top5 / count:.2f}"))
    return text.getvalue()


def _rows(predictions: Predictions, classes: Sequence[str], store: Store) -> pa.Table:
    """A row for each record: its number, name and label, and the most probable labels with their probabilities."""
    names = pa.array(classes, pa.large_string())
    num_rows, num_best = predictions.top.shape
    starts = pa.array(range(0, (num_rows + 1) * num_best, num_best), pa.int32())
    return pa.table(
        {
            "record": predictions.records,
            "name": store.names().take(predictions.records),
            "label": names.take(predictions.labels),
            "predicted": pa.ListArray.from_arrays(starts, names.take(predictions.top.ravel())),
            "probabilities": pa.ListArray.from_arrays(starts, predictions.probabilities.ravel()),
        }
    )


def _worst(predictions: Predictions, classes: Sequence[str], store: Store) -> bytes:
    """The most confident mistakes, as a PNG."""
    cells = []
    for row in predictions.worst(limit=_NUM_WORST).tolist():
        record = int(predictions.records[row])
        label, predicted = classes[predictions.labels[row]], classes[predictions.top[row, 0]]
        share = 100 * predictions.probabilities[row, 0]
        lines = (store.name(record), f"is: {label}", f"said: {predicted}, {share:.1f} %")
        cells.append((store.arrays(np.array([record]))[0].tobytes(), [one_line(line) for line in lines]))
    return draw_grid(cells)


def _write(path: str, write: Callable[[Path], object]) -> None:
    partial = Path(partial_of(path))
    with os_errors(path, "cannot be written", StateError):
        try:
            write(partial)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        sync_folder(Path(path).absolute().parent)
