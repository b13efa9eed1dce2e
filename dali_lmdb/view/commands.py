"""The commands ``dali-lmdb preview`` and ``dali-lmdb parity``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal

import click

from dali_lmdb.cli import Command, option_of, print_progress, print_result
from dali_lmdb.errors import one_line
from dali_lmdb.plan.augment import Transform
from dali_lmdb.plan.order import Shuffle
from dali_lmdb.store import Store, open_store
from dali_lmdb.train.settings import TrainSettings
from dali_lmdb.view.delivery import Way, way_of
from dali_lmdb.view.picture import check_picture, write_picture
from dali_lmdb.view.preview import preview
from dali_lmdb.view.records import Named, checked, first_of_epoch, in_report

__all__ = ["preview_command"]

_AT_LEAST_0, _AT_LEAST_1 = click.IntRange(min=0), click.IntRange(min=1)
_Command = Callable[..., None]
_option = option_of(TrainSettings)


_TRANSFORM_OPTIONS: list[Callable[[_Command], _Command]] = [
    _option("--size", type=_AT_LEAST_1, help="Height and width of the training images, in pixels."),
    _option(
        "--start-size",
        type=_AT_LEAST_1,
        help="Size until 11/16 of the run; it reaches --size at 13/16.  [default: --size]",
    ),
    _option("--epochs", type=_AT_LEAST_1, help="Number of training epochs, for --start-size."),
    _option(
        "--val-size",
        type=_AT_LEAST_1,
        help="Height and width of the validation images.  [default: --size]",
    ),
    _option(
        "--val-resize",
        type=_AT_LEAST_1,
        help="Their shorter side before the central crop.  [default: --val-size * 256 / 224]",
    ),
    _option("--interpolation", help="Resizing filter."),
    _option("--crop-scale", help="Smallest fraction of an image's area that a training crop covers."),
    _option("--hflip", help="Probability of a horizontal flip."),
    _option("--color-jitter", help="Strength of changes of brightness, contrast and saturation."),
    _option("--hue", help="Strength of changes of the hue."),
    _option("--grayscale", help="Probability of conversion to grey."),
    _option("--random-erase", help="Probability that a rectangle is erased."),
    _option("--seed", type=_AT_LEAST_0, help="Seed of order, crops and flips."),
    click.option("--epoch", type=_AT_LEAST_0, default=0, show_default=True, help="Epoch, from 0."),
]
"""Of ``train``: how images are cut and augmented; and which epoch's and seed's they are."""


def _transform_options(command: _Command) -> _Command:
    return reduce(lambda made, option: option(made), reversed(_TRANSFORM_OPTIONS), command)


def _transform(settings: TrainSettings, *, task: Literal["train", "eval"]) -> Transform:
    return settings.train_transform if task == "train" else settings.val_transform


@click.command("preview", cls=Command)
@click.argument("store", metavar="STORE")
@click.option("-o", "--output", required=True, metavar="FILE", help="The picture, a PNG.")
@click.option(
    "--task",
    type=click.Choice(["train", "eval"]),
    default="train",
    show_default=True,
    help="train: random crops and flips; eval: central crops.",
)
@click.option(
    "--backend",
    type=click.Choice(["dali", "torch", "both"]),
    default="dali",
    show_default=True,
    help="both: side by side.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "gpu", "cpu"]),
    default="auto",
    show_default=True,
    help="Where DALI works; auto uses the GPU if there is one.",
)
@click.option("--record", "records", type=_AT_LEAST_0, multiple=True, help="A record to show; may be repeated.")
@click.option("--class", "classes", multiple=True, metavar="NAME", help="Only of this class; may be repeated.")
@click.option(
    "--bad",
    "reports",
    multiple=True,
    metavar="REPORT",
    help="Those that STORE.bad.tsv of convert or a --quarantine file names; may be repeated.",
)
@click.option("--count", type=_AT_LEAST_1, default=20, show_default=True, help="Most records to show.")
@_transform_options
def preview_command(
    store: str,
    *,
    output: str,
    task: Literal["train", "eval"],
    backend: Literal["dali", "torch", "both"],
    device: Literal["auto", "gpu", "cpu"],
    records: tuple[int, ...],
    classes: tuple[str, ...],
    reports: tuple[str, ...],
    count: int,
    seed: int,
    epoch: int,
    **values: Any,
) -> None:
    """Draw records of STORE as a model sees them: crop, flip and colours of an epoch, before normalising.

    By default the first records of the epoch's order. A record that cannot be decoded is shown as its reason; then
    the exit code is 1.
    """
    if sum(map(bool, (records, classes, reports))) > 1:
        raise click.UsageError("--record, --class and --bad exclude each other")
    check_picture(output, option="--output")
    settings = TrainSettings(train=store, val=store, **values)
    names = ["torch", "dali"] if backend == "both" else [backend]
    ways = [way_of(f"dali:{device}" if name == "dali" and device != "auto" else name) for name in names]
    with open_store(store) as opened:
        absent: list[Named] = []
        if records:
            chosen = checked(opened, records)
        elif reports:
            chosen, absent = _named(opened, reports, count=count)
        else:
            shuffle: Shuffle = "full" if task == "train" else "none"
            chosen = first_of_epoch(opened, count, seed=seed, epoch=epoch, shuffle=shuffle, classes=classes)
        found = preview(
            opened,
            chosen,
            ways=ways,
            transform=_transform(settings, task=task),
            seed=seed,
            epoch=epoch,
            absent=absent,
        )
    write_picture(output, found.picture)
    for line in found.missing:
        print_progress(line)
    print_result(one_line(f"{output}: {_described(ways, len(chosen))}"), done=output)
    sys.exit(1 if found.missing else 0)


def _named(store: Store, reports: Sequence[str], *, count: int) -> tuple[list[int], list[Named]]:
    """The records that reports name, and what they name that is not in the store."""
    named = [image for path in reports for image in in_report(store, path)]
    if not named:
        raise ValueError(f"{', '.join(reports)}: no bad image of {store.path} is named there")
    named = named[:count]
    records = [image.record for image in named if image.record is not None]
    return checked(store, records), [image for image in named if image.record is None]


def _described(ways: Sequence[Way], num_records: int) -> str:
    return f"{num_records} records, {' and '.join(way.name for way in ways)}"
