"""The command ``dali-lmdb convert``, also ``python scripts/convert.py``."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import asdict, fields
from types import FrameType
from typing import Any

import click
from tqdm import tqdm

from dali_lmdb.cli import Command
from dali_lmdb.convert import ConvertSettings, Progress, Summary, convert

__all__ = ["main"]

_DEFAULTS = {field.name: field.default for field in fields(ConvertSettings)}
_LINE_EVERY_S = 10  # between lines of progress where there is no terminal


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source", metavar="SOURCE")
@click.argument("store", metavar="STORE")
@click.option(
    "--check",
    type=click.Choice(["header", "none"]),
    default=_DEFAULTS["check"],
    show_default=True,
    help="How each image is looked at.",
)
@click.option(
    "--on-bad",
    type=click.Choice(["fail", "skip"]),
    default=_DEFAULTS["on_bad"],
    show_default=True,
    help="Publish nothing if there are bad images, or publish without them. Either way STORE.bad.tsv lists them.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=_DEFAULTS["max_pixels"],
    show_default=True,
    help="Images of more pixels are bad.",
)
@click.option("--restart", is_flag=True, help="Start over instead of going on with an interrupted conversion.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads that read images.  [default: the cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def main(source: str, store: str, *, restart: bool, threads: int | None, as_json: bool, **settings: Any) -> None:
    """Turn SOURCE, a folder with one folder of images for each class, into the LMDB file STORE.

    Interrupted, by Ctrl-C, a kill or a full disk, the same command goes on where it stopped.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    with _ProgressBar(quiet=as_json) as bar:
        try:
            summary = convert(
                source,
                store,
                settings=ConvertSettings(**settings),
                restart=restart,
                num_threads=threads,
                progress=bar.show,
            )
        except KeyboardInterrupt:
            bar.close()
            click.echo("Stopped. Run the same command again to go on where it stopped.", err=True)
            sys.exit(130)
    click.echo(json.dumps(asdict(summary)) if as_json else _sentence(summary))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _sentence(summary: Summary) -> str:
    text = (
        f"{summary.store}: {summary.records:,} records, {summary.classes:,} classes, {summary.bytes:,} bytes, "
        f"{summary.seconds:.1f} s, {summary.images_per_s:,.0f} images/s, {summary.megabytes_per_s:,.0f} MB/s"
    )
    if summary.skipped:
        text += f"\n{summary.skipped:,} bad images left out, listed in {summary.report}"
    return text


class _ProgressBar:
    """Rate and time left: a bar on a terminal, else a plain line now and then; on stderr."""

    def __init__(self, *, quiet: bool) -> None:
        self._bar: tqdm[Any] | None = None
        self._phase = ""
        self._quiet = quiet and not sys.stderr.isatty()
        self._begin = self._last = time.monotonic()

    def show(self, progress: Progress) -> None:
        """Called by the converter, from its threads, one call at a time."""
        if self._quiet:
            return
        if not sys.stderr.isatty():
            self._line(progress)
            return
        if progress.phase != self._phase:
            self.close()
            self._phase = progress.phase
            self._bar = tqdm(total=progress.total, desc=progress.phase, unit=" images", unit_scale=True)
        assert self._bar is not None
        self._bar.update(progress.done - self._bar.n)

    def _line(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last < _LINE_EVERY_S:
            return
        self._last = now
        rate = progress.num_bytes / 1e6 / (now - self._begin)
        click.echo(f"{progress.phase}: {progress.done:,} of {progress.total:,} images, {rate:,.0f} MB/s", err=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if __name__ == "__main__":
    main(prog_name="python -m dali_lmdb.convert")
