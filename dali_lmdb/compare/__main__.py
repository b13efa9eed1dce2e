"""The command ``dali-lmdb compare``, also ``python -m dali_lmdb.compare``."""

from __future__ import annotations

import json
from typing import Literal

import click

from dali_lmdb.cli import Command, option_of, print_progress, print_result
from dali_lmdb.compare.throughput import BACKENDS, CompareSettings, Comparison, Round, compare_throughput

__all__ = ["main"]

_option = option_of(CompareSettings)
_AT_LEAST_1 = click.IntRange(min=1)


@click.command(cls=Command)
@click.argument("store", metavar="STORE")
@_option(
    "--task", type=click.Choice(["train", "eval"]), help="train: random crops and flips; eval: central crops."
)
@click.option("--images", metavar="DIR", help="The image folder that STORE was made from, to measure it too.")
@_option("--batch-size", type=_AT_LEAST_1, help="Images per step, at most the record count.")
@_option("--rounds", type=_AT_LEAST_1, help="Number of measured rounds.")
@_option("--seconds", type=click.FloatRange(min=0, min_open=True), help="Length of each measurement, in seconds.")
@_option("--workers", type=_AT_LEAST_1, help="DataLoader workers, and DALI threads.  [default: all cores]")
@_option("--size", type=_AT_LEAST_1, help="Height and width of the images, in pixels.")
@_option("--device", help="auto uses the GPU if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def main(
    store: str,
    *,
    task: Literal["train", "eval"],
    images: str | None,
    batch_size: int,
    rounds: int,
    seconds: float,
    workers: int | None,
    size: int,
    device: Literal["auto", "cuda", "cpu"],
    as_json: bool,
) -> None:
    """Measure the images per second of each way of loading STORE.

    files: an image folder, Pillow in DataLoader workers (with --images). torch: STORE, Pillow in DataLoader
    workers (the classic path). dali: STORE, DALI. All do the same work; they take turns, and the ratio to torch
    is the median of the rounds' ratios.
    """
    settings = CompareSettings(
        task=task,
        batch_size=batch_size,
        rounds=rounds,
        seconds=seconds,
        workers=workers,
        size=size,
        device=device,
    )
    found = compare_throughput(store, images=images, settings=settings, progress=_report)
    print_result(json.dumps(found.to_dict()) if as_json else _table(found))


def _report(done: Round) -> None:
    name = f"round {done.number}" if done.number else "warm-up"
    speeds = [f"{way} {done.images_per_s[way]:,.0f}" for way in BACKENDS if way in done.images_per_s]
    print_progress(f"{name}: {'  '.join(speeds)} images/s")


def _table(result: Comparison) -> str:
    settings = result.settings
    head = result.heading(
        f"{settings.task}, {settings.size} x {settings.size}, batches of {settings.batch_size}, "
        f"{settings.workers} workers or threads, {settings.rounds} rounds of {settings.seconds:g} s",
    )
    columns = f"{'':9}{'images/s':>10}{'min':>9}{'max':>9}{'ratio':>8}{'min':>7}{'max':>7}"
    rows = [
        f"{found.backend:<9}{found.images_per_s:>10,.0f}{min(found.rounds):>9,.0f}{max(found.rounds):>9,.0f}"
        f"{found.ratio:>8.2f}{min(found.ratios):>7.2f}{max(found.ratios):>7.2f}"
        for found in result.measurements
    ]
    ways = [f"{found.backend:<9}{BACKENDS[found.backend]}" for found in result.measurements]
    return "\n".join([head, columns, *rows, "", *ways])


if __name__ == "__main__":
    main(prog_name="python -m dali_lmdb.compare")
