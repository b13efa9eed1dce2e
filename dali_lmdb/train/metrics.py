"""Measurements of a run, and the log they are written to."""

from __future__ import annotations

import io
import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dali_lmdb.disk import describe_os_error, os_errors
from dali_lmdb.errors import StateError
from dali_lmdb.loaders.lines import open_lines, write_line

__all__ = ["EvaluationSums", "JsonLog", "StepMeter", "find_end", "loss_text"]


def loss_text(loss: float) -> str:
    """A loss in few characters, whatever its size."""
    return f"{loss:.4f}" if abs(loss) < 1e4 else f"{loss:.3e}"


def find_end(path: str | os.PathLike[str], *, output: str, epoch: int, step: int) -> int:
    """Find where a log, written by :class:`JsonLog`, goes past a checkpoint.

    Args:
        output: the folder of the run whose log it should be.
        epoch, step: of the checkpoint; ``step`` is 0 at the beginning of an epoch.

    Returns:
        The length in bytes of the part up to the checkpoint, 0 for an empty file.

    Raises:
        StateError: it cannot be read, or is not a log of this run.
    """
    with os_errors(path, "cannot be read", StateError), open(path, "rb") as file:
        lines = file.readlines()
    end = 0
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break  # half written by a killed run
        try:
            values = json.loads(line)
            if number == 1:
                other = os.path.abspath(values["settings"]["output"])
                if other != os.path.abspath(output):
                    raise StateError(f"{path}: the log of the run in {other}; choose another --log-json")
            place = (values.get("epoch", 0), values.get("step", math.inf if "epoch" in values else 0))
            if place > (epoch, step):
                break
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            then = "remove it or choose another --log-json"
            raise StateError(f"{path}: line {number} is not of a log of this trainer; {then}") from error
        end += len(line)
    return end


class StepMeter:
    """Loss, speed and time spent waiting for data since the last report, over all ranks.

    :meth:`add` never waits for the device; :meth:`report` does, so that only finished work is timed. The
    very first batch, in which libraries start, is not timed if others follow before the report.
    """

    def __init__(self, *, device: torch.device) -> None:
        self._device = device
        self._is_starting = True
        self.reset()

    def reset(self) -> None:
        """Start a new interval now."""
        self.steps = 0
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._start_clock()

    def _start_clock(self) -> None:
        self._num_images = 0
        self._waited_s = 0.0
        self._started = time.perf_counter()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def wait_for(self, action: Callable[[], Any]) -> Any:
        """Call ``action``, count its time as waiting for data, and return what it returns."""
        if self._is_starting and self.steps:
            self._is_starting = False
            self._synchronize()
            self._start_clock()
        started = time.perf_counter()
        result = action()
        self._waited_s += time.perf_counter() - started
        return result

    def add(self, *, loss: Tensor, num_images: int) -> None:
        """Count one step of this rank; ``loss`` is its mean, a scalar on the device."""
        self.steps += 1
        self._num_images += num_images
        self._loss += loss.detach()

    def report(self, *, all_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Reduce over all ranks, and start a new interval. A collective: all ranks call it at the same step.

        Returns:
            ``loss``: mean over steps and ranks; ``images_per_s``: sum over all ranks; ``data_wait_fraction``:
            fraction of the time, 0 to 1, that a rank waited for its next batch.
        """
        self._is_starting = False
        self._synchronize()
        elapsed_s = time.perf_counter() - self._started
        own = [float(self._loss) / self.steps, self._num_images / elapsed_s, self._waited_s / elapsed_s, 1.0]
        sums = all_sum(torch.tensor(own, dtype=torch.float64, device=self._device))
        loss, images_per_s, wait, num_ranks = sums.tolist()
        self.reset()
        return {
            "loss": loss / num_ranks,
            "images_per_s": images_per_s,
            "data_wait_fraction": wait / num_ranks,
        }


class EvaluationSums:
    """Sums over the records that a rank has evaluated; reduced over ranks only at the end.

    Ranks may evaluate different numbers of batches, even none, so nothing here may be a collective
    before :meth:`report`.
    """

    def __init__(self, *, num_classes: int, device: torch.device) -> None:
        self._k = min(5, num_classes)
        self._num_records = 0
        # top-1, top-5, loss; float64 counts exactly up to 2**53
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: float logits of shape (batch, classes), int64 labels of shape (batch,)."""
        logits = logits.float()
        hits = logits.topk(self._k, dim=1).indices == labels[:, None]
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        self._sums += torch.stack([hits[:, 0].sum().double(), hits.sum().double(), loss.double()])
        self._num_records += len(labels)

    def report(self, *, num_records: int, all_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Reduce over all ranks; a collective.

        Returns:
            ``val_top1``, ``val_top5``: percentages, 0 to 100, as in torchvision's references (with fewer
            than 5 classes, ``val_top5`` is always 100); ``val_loss``: mean cross entropy; ``val_records``:
            number of records.

        Raises:
            RuntimeError: the ranks together did not count ``num_records`` records.
        """
        own = torch.cat([self._sums, self._sums.new_tensor([self._num_records])])
        top1, top5, loss, counted = all_sum(own).tolist()
        if counted != num_records:
            raise RuntimeError(
                f"evaluation counted {counted:.0f} records, expected each of {num_records} once; "
                "the ranks do not read the same data set"
            )
        return {
            "val_top1": 100 * top1 / counted,
            "val_top5": 100 * top5 / counted,
            "val_loss": loss / counted,
            "val_records": int(counted),
        }


class JsonLog:
    """A file with one JSON object per line, each visible to other processes as soon as it is written.

    Args:
        path: the file, or None to write nothing.
        append: keep existing lines.

    Raises:
        StateError: it cannot be written; earlier lines are intact.
    """

    def __init__(self, path: str | Path | None, *, append: bool) -> None:
        self._path = path
        self._file: io.FileIO | None = None
        if path is not None:
            with self._errors():
                self._file = open_lines(path, append=append)

    @property
    def is_empty(self) -> bool:
        """Whether it is a file without a line; not so for devices and pipes."""
        if self._file is None:
            return False
        status = os.fstat(self._file.fileno())
        return stat.S_ISREG(status.st_mode) and status.st_size == 0

    def cut(self, *, output: str, epoch: int, step: int) -> None:
        """Remove the lines after a checkpoint, see :func:`find_end`; a device or a pipe keeps them."""
        if self._file is None or self._path is None:
            return
        if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            end = find_end(self._path, output=output, epoch=epoch, step=step)
            with self._errors():
                self._file.truncate(end)

    def write(self, **values: Any) -> None:
        """Add one object, and to it ``time``, in seconds since 1970."""
        if self._file is not None:
            with self._errors():
                write_line(self._file, {**values, "time": round(time.time(), 3)})

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Not os_errors: it leaves a broken pipe to the command, which would take it for its standard output.
            then = "or choose another --log-json"
            raise StateError(describe_os_error(str(self._path), "cannot be written", error, then=then)) from error

    def __enter__(self) -> JsonLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with self._errors():  # network file systems may report a full disk only now
                self._file.close()
