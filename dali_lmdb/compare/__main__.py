"""The command ``dali-lmdb compare``, also ``python -m dali_lmdb.compare``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Literal

import click

from dali_lmdb.cli import LINE_INTERVAL_S, Command, FiniteRange, option_of, print_progress, print_result
from dali_lmdb.compare.plot import plot
from dali_lmdb.compare.settings import CompareSettings
from dali_lmdb.compare.table import markdown, speed, table
from dali_lmdb.compare.throughput import BACKENDS, Round, Turn, compare_throughput
from dali_lmdb.figures import check_figure
from dali_lmdb.loaders.settings import Decode, DecodeDevice
from dali_lmdb.train.progress import TerminalLine, duration, is_terminal

__all__ = ["main"]

_option = option_of(CompareSettings)
_AT_LEAST_1 = click.IntRange(min=1)


@click.command(
    cls=Command,
    epilog="\b\nWhat is measured:\n" + "\n".join(f"  {name}: {what}" for name, what in BACKENDS.items()),
)
@click.argument("store", metavar="STORE")
@_option(
    "--task", type=click.Choice(["train", "eval"]), help="train: random crops and flips; eval: central crops."
)
@click.option("--images", metavar="DIR", help="The image folder that STORE was made from, to measure it too.")
@_option(
    "--batch-size",
    type=_AT_LEAST_1,
    help="Images per step, at most the record count.  [default: 256 on a GPU; else 64, and 8 to train]",
)
@_option("--rounds", type=_AT_LEAST_1, help="Number of measured rounds.")
@_option("--seconds", type=FiniteRange(min=0, min_open=True), help="Length of each measurement, in seconds.")
@_option("--workers", type=_AT_LEAST_1, help="DataLoader workers, and DALI threads.  [default: all cores]")
@_option("--size", type=_AT_LEAST_1, help="Height and width of the images, in pixels.")
@_option("--device", help="auto uses the GPU if there is one.")
@_option("--decode", help="DALI decodes whole images or crop windows only; auto suits the device.")
@_option("--decode-device", help="Where DALI decodes.  [default: with a GPU both are measured]")
@_option(
    "--hw-decoder-load",
    type=FiniteRange(min=0, max=1),
    help="Fraction of a batch offered to the GPU's hardware JPEG engine.",
)
@_option(
    "--arch",
    metavar="NAME",
    help="torchvision model to train too, on one batch and on what is loaded; none: only load; auto: resnet18, "
    "but none with --task eval.",
)
@click.option("--only", metavar="NAME,...", help="Measure only these of the names below.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--plot", "plot_file", metavar="FILE", help="Also draw bars, as PNG or SVG; needs matplotlib.")
def main(
    store: str,
    *,
    task: Literal["train", "eval"],
    images: str | None,
    batch_size: int | None,
    rounds: int,
    seconds: float,
    workers: int | None,
    size: int,
    device: Literal["auto", "cuda", "cpu"],
    decode: Decode,
    decode_device: DecodeDevice | None,
    hw_decoder_load: float,
    arch: str,
    only: str | None,
    as_json: bool,
    as_markdown: bool,
    plot_file: str | None,
) -> None:
    """Measure the images per second of each way of loading STORE.

    All do the same work; they take turns, and ratios are those of the same round. A difference is claimed if it is
    one with 99 % confidence.
    """
    if as_json and as_markdown:
        raise click.UsageError("--json and --markdown exclude each other")
    if plot_file is not None:
        check_figure(Path(plot_file))
    settings = CompareSettings(
        task=task,
        batch_size=batch_size,
        rounds=rounds,
        seconds=seconds,
        workers=workers,
        size=size,
        device=device,
        decode=decode,
        decode_device=decode_device,
        hw_decoder_load=hw_decoder_load,
        arch=None if arch == "none" else arch,
        only=() if only is None else tuple(name.strip() for name in only.split(",")),
    )
    with _Progress() as progress:
        found = compare_throughput(
            store, images=images, settings=settings, progress=progress.round_done, on_window=progress.begin_window
        )
    if plot_file is not None:
        plot(found, Path(plot_file))
    show = (lambda result: json.dumps(result.to_dict())) if as_json else markdown if as_markdown else table
    print_result(show(found))


class _Progress:
    """A line for each round on stderr, and what is being measured.

    On a terminal that is one line, rewritten for each window; elsewhere a line every 10 seconds at most.
    """

    def __init__(self) -> None:
        self._line = TerminalLine(sys.stderr) if is_terminal(sys.stderr) else None
        self._said_s = self._round_began_s = time.monotonic()
        self._round_s: float | None = None

    def begin_window(self, turn: Turn) -> None:
        text = f"{_name(turn.number, turn.rounds)}: {turn.place} of {turn.num_backends}, {turn.backend}"
        now = time.monotonic()
        if self._round_s is not None:
            left_s = self._round_s * (turn.rounds + 1 - turn.number) - (now - self._round_began_s)
            text += f"  ETA {duration(max(0.0, left_s))}"
        if self._line is not None:
            self._line.show(text)
        elif now - self._said_s >= LINE_INTERVAL_S:
            self._said_s = now
            print_progress(text)

    def round_done(self, done: Round) -> None:
        now = time.monotonic()
        if done.number:  # the warm-up is shorter
            self._round_s = now - self._round_began_s
        self._said_s = self._round_began_s = now
        if self._line is not None:
            self._line.erase()
        speeds = [f"{name} {speed(done.images_per_s[name])}" for name in BACKENDS if name in done.images_per_s]
        print_progress(f"{_name(done.number)}: {'  '.join(speeds)} images/s")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._line.erase()


def _name(number: int, rounds: int | None = None) -> str:
    """Of a round."""
    if number == 0:
        return "warm-up"
    return f"round {number}" if rounds is None else f"round {number}/{rounds}"


if __name__ == "__main__":
    main(prog_name="python -m dali_lmdb.compare")
