"""The commands ``dali-lmdb preview`` and ``dali-lmdb parity``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import reduce
from typing import Any, Literal

import click
import numpy as np
from click.core import ParameterSource

from dali_lmdb.cli import Command, FiniteRange, ProgressBar, option_of, print_progress, print_result
from dali_lmdb.errors import RecordError, one_line
from dali_lmdb.plan.augment import TrainTransform, Transform
from dali_lmdb.plan.order import Shuffle
from dali_lmdb.store import Store, open_store
from dali_lmdb.train.settings import TrainSettings
from dali_lmdb.view.delivery import DALI_ARGUMENTS, Shown, Way, deliver, way_of
from dali_lmdb.view.parity import measure_parity
from dali_lmdb.view.picture import check_picture, write_picture
from dali_lmdb.view.predictions import Predictor
from dali_lmdb.view.preview import preview
from dali_lmdb.view.records import Named, check_any, checked, first_of_epoch, in_report, sample
from dali_lmdb.view.report import Report

__all__ = ["parity_command", "preview_command"]

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
            check_any(opened, chosen)
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


@click.command("parity", cls=Command)
@click.argument("store", metavar="STORE")
@click.option(
    "--left", default="torch", show_default=True, metavar="WAY", help="torch, dali, dali:cpu or dali:gpu."
)
@click.option(
    "--right",
    default="dali",
    show_default=True,
    metavar="WAY",
    help="Likewise; dali is on the GPU if there is one. Arguments of DaliLoader follow commas: "
    f"dali:cpu,resize=dali ({', '.join(DALI_ARGUMENTS)}).",
)
@click.option(
    "--task",
    type=click.Choice(["train", "eval"]),
    help="train: random crops and flips; eval: central crops.  [default: train; eval with --checkpoint]",
)
@click.option("--count", type=_AT_LEAST_1, default=256, show_default=True, help="Records, drawn by --seed.")
@click.option("--all", "every", is_flag=True, help="Every record.")
@click.option(
    "--tolerance",  # on a CPU images differ by 0.7 at most, and a photo shifted by one pixel by 1.9 or more
    type=FiniteRange(min=0),
    default=1.0,
    show_default=True,
    help="Largest mean difference of an image, in grey levels.",
)
@click.option(
    "--checkpoint", metavar="FILE", help="Also compare the predictions of this model, as evaluate makes them."
)
@click.option("--plot", "plot_file", metavar="FILE", help="Draw the worst, as PNG: left, right and difference.")
@click.option(
    "--workers", type=_AT_LEAST_1, metavar="N", help="Threads or processes of each.  [default: all cores]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@_transform_options
def parity_command(
    store: str,
    *,
    left: str,
    right: str,
    task: Literal["train", "eval"] | None,
    count: int,
    every: bool,
    tolerance: float,
    checkpoint: str | None,
    plot_file: str | None,
    workers: int | None,
    as_json: bool,
    seed: int,
    epoch: int,
    **values: Any,
) -> None:
    """Compare the images that two ways of loading make of STORE: the same records, crops and flips.

    Differences are in grey levels, 0 to 255. The exit code is 1 if the mean difference of an image is above
    --tolerance, or if one way cannot decode what the other can.
    """
    ways = way_of(left), way_of(right)
    if plot_file is not None:
        check_picture(plot_file, option="--plot")
    task = task or ("eval" if checkpoint is not None else "train")
    with open_store(store) as opened:
        predictor = None
        if checkpoint is not None:
            predictor = Predictor(checkpoint, opened, **_given(task, values))
        settings = TrainSettings(train=store, val=store, **values) if predictor is None else predictor.settings
        transform = _transform(settings, task=task)
        records = list(range(len(opened))) if every else sample(opened, count, seed=seed)
        check_any(opened, records)
        left_images, right_images = (
            deliver(opened, records, way, transform=transform, seed=seed, epoch=epoch, workers=workers)
            for way in ways
        )
        with closing(left_images), closing(right_images), ProgressBar(quiet=as_json) as bar:
            watched = _watched(left_images, bar, store=opened, total=len(records))
            each = None if predictor is None else predictor.add
            parity = measure_parity(watched, right_images, each=each)
        if len(parity.bad) == len(records):
            raise RecordError(
                f"{store}: no images to compare: none of {len(records)} records can be decoded; see why with: "
                f"dali-lmdb verify --decode {store}"
            )
        report = Report(
            store=opened,
            ways=ways,
            what={"task": task, "size": _size(transform, epoch), "epoch": epoch, "seed": seed},
            tolerance=tolerance,
            parity=parity,
            top1=None if predictor is None else predictor.top1(),
        )
        if plot_file is not None:
            write_picture(plot_file, report.picture())
        print_result(json.dumps(report.to_dict()) if as_json else report.text(), done=plot_file)
    sys.exit(1 if report.is_beyond else 0)


def _size(transform: Transform, epoch: int) -> int:
    return transform.size_at(epoch) if isinstance(transform, TrainTransform) else transform.size


def _watched(
    delivered: Iterable[tuple[int, Shown]], bar: ProgressBar, *, store: Store, total: int
) -> Iterator[tuple[int, Shown]]:
    num_bytes = 0
    for done, (record, shown) in enumerate(delivered, 1):
        yield record, shown
        num_bytes += int(store.gather("num_bytes", np.array([record]))[0])
        bar.show("comparing", done, total, num_bytes)


def _given(task: str, values: dict[str, Any]) -> dict[str, Any]:
    """The options for evaluation that are on the command line; others are the checkpoint's.

    Raises:
        UsageError: there are options that have no effect on evaluation.
    """
    source = click.get_current_context().get_parameter_source
    given = {name: value for name, value in values.items() if source(name) is ParameterSource.COMMANDLINE}
    unfit = ["task"] if task == "train" else sorted(given.keys() - {"val_size", "val_resize", "interpolation"})
    if unfit:
        raise click.UsageError(
            f"--checkpoint is for evaluation, which --{unfit[0].replace('_', '-')} does not fit"
        )
    return given
