"""What people watch while a run goes on: one line on a terminal, plain lines elsewhere, and the log."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, TextIO

import torch

from dali_lmdb.torchrun import RankEnvironment
from dali_lmdb.train.curves import History
from dali_lmdb.train.metrics import JsonLog, loss_text
from dali_lmdb.train.scalars import Scalars
from dali_lmdb.train.settings import TrainSettings

__all__ = [
    "ERASE",
    "STEPS",
    "RunProgress",
    "TerminalLine",
    "describe",
    "duration",
    "is_terminal",
    "no_line_left",
    "what_to_try",
]

STEPS = "dali_lmdb.train.steps"
"""The logger of the reports of steps, which the progress line replaces on a terminal."""

_log = logging.getLogger(__name__)
_steps_log = logging.getLogger(STEPS)

ERASE = "\r\x1b[K"
"""Erases the line that the cursor is in, and puts the cursor at its beginning."""

_INTERVAL_S = 0.1  # between two drawings of the line; a terminal over a network need not show more
_MOST_WAITING = 0.1  # fraction of the time; loaders that keep up stay well below
_LATE_BYTES = 1 << 20  # of some ten photos; a page here and there is always missing


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a line there can be rewritten."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def no_line_left() -> Iterator[None]:
    """At the end, erase what a process that was killed has left of its line on stderr."""
    try:
        yield
    finally:
        if is_terminal(sys.stderr):
            with suppress(OSError):
                print(ERASE, end="", file=sys.stderr, flush=True)


class TerminalLine:
    """The last line of a terminal, rewritten in place and cut to its width.

    Whoever else prints there erases it first with ``ERASE``; it comes back with the next step.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream
        self._drawn_s = 0.0

    def show(self, text: str) -> None:
        """Replace the line, unless that was done a moment ago."""
        now = time.monotonic()
        if self._stream is None or now - self._drawn_s < _INTERVAL_S:
            return
        self._drawn_s = now
        try:
            # One less than its width: some terminals wrap when the last column is written.
            columns = os.get_terminal_size(self._stream.fileno()).columns or 80
            self._stream.write(f"\r{text[: columns - 1]}\x1b[K")
            self._stream.flush()
        except OSError:  # the terminal is gone
            self._stream = None

    def erase(self) -> None:
        """Leave the line empty; the next ``show`` draws it again."""
        if self._stream is not None and self._drawn_s:
            self._drawn_s = 0.0
            try:
                self._stream.write(ERASE)
                self._stream.flush()
            except OSError:
                self._stream = None

    def __enter__(self) -> TerminalLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.erase()


class RunProgress:
    """Tells how a run goes on, on rank 0.

    Args:
        num_records: number of training records.
        log: written on any rank, so open on rank 0 only.
        line: shows the progress line; None to show none.
    """

    def __init__(
        self,
        settings: TrainSettings,
        *,
        num_records: int,
        ranks: RankEnvironment,
        device: torch.device,
        log: JsonLog,
        line: TerminalLine | None,
    ) -> None:
        self._settings, self._num_records, self._device = settings, num_records, device
        self._batch_records = settings.batch_size * ranks.world_size
        self._log, self._line, self._speaks = log, line, ranks.rank == 0
        self._report: dict[str, float] = {}
        self._memory: list[str] = []
        self._history = History()
        self._scalars = Scalars(None, images=0)
        self._started = time.monotonic()
        self._num_images, self._trained_s = 0, 0.0
        self._evaluation_s = 0.0
        self._has_advised = False
        self._late_bytes = 0.0
        self.begin_epoch()

    @property
    def history(self) -> History:
        """The whole run's, up to now."""
        now = self._history.elapsed_s + time.monotonic() - self._started
        return replace(self._history, elapsed_s=now)

    def restore(self, history: dict[str, Any]) -> None:
        """Go on with the history of an earlier start, ``asdict`` of it."""
        self._history = History(**history)

    def begin(self, *, epoch: int, records_done: int) -> None:
        """Begin to write for TensorBoard, on rank 0."""
        if self._speaks:
            self._scalars = Scalars(self._settings.tensorboard, images=epoch * self._num_records + records_done)

    def close(self) -> None:
        """Close TensorBoard's files."""
        self._scalars.close()

    @property
    def images_per_s(self) -> float:
        """Mean speed of training since the start."""
        return self._num_images / self._trained_s if self._trained_s else 0.0

    def begin_epoch(self, *, records_done: int = 0) -> None:
        """Start the clock of an epoch, or of the rest of one after ``records_done`` records."""
        self._records_done = records_done
        self._epoch_started = time.monotonic()
        self._evaluation_started: float | None = None
        self._is_first_report = True

    def step(self, *, epoch: int, step: int, records_done: int) -> None:
        """Show that a step is done."""
        if self._line is None:
            return
        left = max(0, self._num_records - records_done)
        steps = step + math.ceil(left // self._batch_records / self._settings.accumulate)
        records_left = (self._settings.epochs - 1 - epoch) * self._num_records + left
        self._show(f"epoch {epoch}/{self._settings.epochs}  step {step}/{steps}", epoch, records_left)

    def evaluating(self, *, epoch: int, step: int, steps: int) -> None:
        """Show that a step of the evaluation is done."""
        if self._evaluation_started is None:
            self._evaluation_started = time.monotonic()
        if self._line is not None:
            records_left = (self._settings.epochs - 1 - epoch) * self._num_records
            self._show(f"epoch {epoch}/{self._settings.epochs}  evaluation {step}/{steps}", epoch, records_left)

    def _show(self, place: str, epoch: int, records_left: int) -> None:
        assert self._line is not None
        parts = [place]
        if report := self._report:
            left_s = records_left / report["images_per_s"] + (self._settings.epochs - epoch) * self._evaluation_s
            parts += [
                f"ETA {duration(left_s)}",
                f"{report['images_per_s']:.0f} images/s",
                f"loss {loss_text(report['loss'])}",
                f"lr {report['lr']:.3g}",
            ]
        if results := self._history.results:
            parts.append(f"top-1 {results[-1]['val_top1']:.2f} %")
        if report:
            parts.append(f"waiting {100 * report['data_wait_fraction']:.0f} %")
        self._line.show("  ".join(parts + self._memory))

    def report(
        self, report: dict[str, float], *, epoch: int, step: int, records_done: int, late_bytes: float
    ) -> None:
        """Log the steps since the last report.

        Args:
            report: ``StepMeter.report``'s values and ``lr``, the last step's learning rate.
            late_bytes: of the training loader's ``stats``.
        """
        self._report = report
        if self._line is not None and self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            self._memory = [f"GPU memory {(total - free) / 1e9:.1f} of {total / 1e9:.0f} GB"]
        epochs_done = epoch + records_done / self._num_records
        self._history.add_steps(epochs_done, loss=report["loss"], lr=report["lr"])
        num_images, self._records_done = records_done - self._records_done, records_done
        self._num_images += num_images
        self._trained_s += num_images / report["images_per_s"]
        self._log.write(epoch=epoch, step=step, **report)
        self._scalars.write(report, images=epoch * self._num_records + records_done)
        if not self._speaks:
            return
        _steps_log.info(
            "epoch %d  step %d  loss %s  lr %.3g  %.0f images/s  %.0f %% of the time waiting for data",
            epoch,
            step,
            loss_text(report["loss"]),
            report["lr"],
            report["images_per_s"],
            100 * report["data_wait_fraction"],
        )
        late, self._late_bytes = late_bytes - self._late_bytes, late_bytes
        # At the beginning of an epoch the loader has no batch ready.
        is_slow = report["data_wait_fraction"] > _MOST_WAITING and not self._is_first_report
        self._is_first_report = False
        if is_slow and not self._has_advised:
            self._has_advised = True
            _log.warning(
                "%.0f %% of the time since the last report was spent waiting for data; %s",
                100 * report["data_wait_fraction"],
                what_to_try(
                    self._settings,
                    on_gpu=self._device.type == "cuda",
                    is_late=late > _LATE_BYTES,
                    is_first_epoch=epoch == 0,
                ),
            )

    def result(self, result: dict[str, Any]) -> None:
        """Log an evaluation."""
        now = time.monotonic()
        self._history.results.append(result)
        self._evaluation_s = now - (self._evaluation_started or now)
        self._log.write(**result, epoch_s=round(now - self._epoch_started, 3))
        values = {name: value for name, value in result.items() if name not in ("epoch", "val_records")}
        self._scalars.write(values, images=(result["epoch"] + 1) * self._num_records)
        if self._speaks:
            _log.info("%s  %d records", describe(result), result["val_records"])


def what_to_try(settings: TrainSettings, *, on_gpu: bool, is_late: bool, is_first_epoch: bool) -> str:
    """Say what may shorten the waiting for data: the rows of README's table of symptoms that can apply.

    Args:
        on_gpu: whether training is on GPUs.
        is_late: whether storage was waited for.
        is_first_epoch: whether the data may not have been read before.
    """
    if is_late and is_first_epoch:
        return "the store is not in the page cache yet: try local NVMe or a larger --readahead-bytes"
    if is_late:
        block = "--shuffle block" if settings.shuffle != "block" else "local NVMe"
        return f"the disk is busy: try {block}"
    if settings.backend == "torch":
        return "try more --workers where CPU cores are idle, --backend dali where they are busy"
    if on_gpu and settings.decode_device != "cpu":
        idle = "more --workers or --decode-device cpu"
        busy = "convert --transcode or convert --resize 512"
    else:
        idle, busy = "more --workers", "convert --resize 512"
    return f"try {idle} where CPU cores are idle, {busy} where they are busy"


def describe(result: dict[str, Any]) -> str:
    """An evaluation's results on one line, those of the averaged weights included."""
    text = f"epoch {result['epoch']}  validation: {_figures(result)}"
    return f"{text}  averaged weights: {_figures(result, 'ema_')}" if "ema_val_top1" in result else text


def _figures(result: dict[str, Any], prefix: str = "") -> str:
    top1, top5, loss = (result[f"{prefix}{name}"] for name in ("val_top1", "val_top5", "val_loss"))
    return f"top-1 {top1:.2f} %  top-5 {top5:.2f} %  loss {loss_text(loss)}"


def duration(seconds: float) -> str:
    """A time in hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
