"""The command ``dali-lmdb compare``, also ``python -m dali_lmdb.compare``."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from dali_lmdb.cli import Command
from dali_lmdb.compare.throughput import BACKENDS, CompareSettings, Comparison, Round, compare_throughput

__all__ = ["main"]

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(CompareSettings)}
_AT_LEAST_1 = click.IntRange(min=1)


def _option(name: str, *, help: str, **options: Any) -> Any:
    """Make an option whose default is the library's."""
    default = _DEFAULTS[name.removeprefix("--").replace("-", "_")]
    return click.option(name, default=default, show_default=default is not None, help=help, **options)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("store", metavar="STORE")
@click.option("--images", metavar="DIR", help="The image folder that STORE was made from, to measure it too.")
@_option("--batch-size", type=_AT_LEAST_1, help="Images of a step; no more than STORE has records.")
@_option("--rounds", type=_AT_LEAST_1, help="Rounds that count, after one that does not.")
@_option("--seconds", type=click.FloatRange(min=0, min_open=True), help="Time for each backend in each round.")
@_option("--workers", type=_AT_LEAST_1, help="DataLoader workers, and DALI threads.  [default: the cores]")
@_option("--size", type=_AT_LEAST_1, help="Height and width of the images, in pixels.")
@_option("--device", type=click.Choice(["auto", "cuda", "cpu"]), help="auto takes the GPU if there is one.")
@_option("--task", type=click.Choice(["train", "eval"]), help="Random crops and flips, or central crops.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def main(store: str, *, images: str | None, as_json: bool, **settings: Any) -> None:
    """Measure how many images a second each way of loading STORE gives.

    files: an image folder, Pillow in DataLoader workers (with --images). torch: STORE, likewise, the classic
    path. dali: STORE through DALI. All do the same work; they take turns, and the ratio to torch is the median
    of the rounds' ratios.
    """
    options = CompareSettings(**settings)

    def report(done: Round) -> None:
        name = f"round {done.number} of {options.rounds}" if done.number else "warm-up"
        speeds = "  ".join(
            f"{backend} {done.images_per_s[backend]:,.0f}" for backend in BACKENDS if backend in done.images_per_s
        )
        click.echo(f"{name}: {speeds} images/s", err=True)

    result = compare_throughput(store, images=images, settings=options, progress=report)
    click.echo(json.dumps(result.to_dict()) if as_json else _table(result))


def _table(result: Comparison) -> str:
    settings, machine = result.settings, result.machine
    head = (
        f"{result.store}: {result.num_records:,} records, {result.image_bytes / 1e6:,.1f} MB\n"
        f"{settings.task}, {settings.size} x {settings.size}, batches of {settings.batch_size}, "
        f"{settings.workers} workers or threads, {settings.rounds} rounds of {settings.seconds:g} s\n"
        f"{machine['gpu'] or 'no GPU used'}, {machine['cores']} cores of {machine['cpu']}\n\n"
        f"{'':9}{'images/s':>10}{'min':>9}{'max':>9}{'ratio':>8}{'min':>7}{'max':>7}"
    )
    rows = [
        f"{found.backend:<9}{found.images_per_s:>10,.0f}{min(found.rounds):>9,.0f}{max(found.rounds):>9,.0f}"
        f"{found.ratio:>8.2f}{min(found.ratios):>7.2f}{max(found.ratios):>7.2f}"
        for found in result.measurements
    ]
    ways = [f"{found.backend:<9}{BACKENDS[found.backend]}" for found in result.measurements]
    return "\n".join([head, *rows, "", *ways])


if __name__ == "__main__":
    main(prog_name="python -m dali_lmdb.compare")
