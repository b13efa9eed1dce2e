"""The command ``dali-lmdb tune``."""

from __future__ import annotations

import json
from typing import Any, Literal

import click

from dali_lmdb.cli import Command, FiniteRange, option_of, print_progress, print_result
from dali_lmdb.compare.settings import CompareSettings
from dali_lmdb.compare.tuning import Tuning, Values, tune
from dali_lmdb.loaders.tuned import check_target, write_tuned

__all__ = ["tune_command"]

_option = option_of(CompareSettings)
_AT_LEAST_1 = click.IntRange(min=1)


@click.command("tune", cls=Command)
@click.argument("store", metavar="STORE")
@click.option(
    "--minutes",
    type=FiniteRange(min=0, min_open=True),
    default=3.0,
    show_default=True,
    help="How long to search, in minutes.",
)
@_option(
    "--task", type=click.Choice(["train", "eval"]), help="train: random crops and flips; eval: central crops."
)
@_option(
    "--batch-size",
    type=_AT_LEAST_1,
    help="Images per step, at most the record count.  [default: 256 on a GPU, else 64]",
)
@_option("--workers", type=_AT_LEAST_1, help="Threads that the search begins with.  [default: all cores]")
@_option("--size", type=_AT_LEAST_1, help="Height and width of the images, in pixels.")
@_option("--device", help="auto uses the GPU if there is one.")
@click.option("--save", metavar="FILE", help="Write what was found, for train --tuned and DaliLoader(tuned=...).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def tune_command(
    store: str,
    *,
    minutes: float,
    task: Literal["train", "eval"],
    batch_size: int | None,
    workers: int | None,
    size: int,
    device: Literal["auto", "cuda", "cpu"],
    save: str | None,
    as_json: bool,
) -> None:
    """Search for the options with which DALI loads STORE fastest on this machine.

    Threads, batches ahead and bytes read ahead; on a GPU also where images are decoded. What is found is
    recommended only if it is faster than the defaults with 99 % confidence. Nothing else should run meanwhile;
    files are read from the page cache, as in later epochs.
    """
    if save is not None:
        check_target(save)
    settings = CompareSettings(task=task, batch_size=batch_size, workers=workers, size=size, device=device)
    found = tune(store, minutes=minutes, settings=settings, progress=print_progress)
    if save is not None:
        write_tuned(save, found.chosen, machine={**found.machine, "workers": found.settings.workers})
    print_result(json.dumps(found.to_dict()) if as_json else _text(found))


def _text(found: Tuning) -> str:
    settings, figures = found.settings, found.to_dict()["figures"]
    head = found.heading(
        f"{settings.task}, {settings.size} x {settings.size}, batches of {settings.batch_size}; "
        f"{len(found.tried)} candidates, then {len(found.best_windows)} turns of two"
    )
    rows = [
        f"{name:<10}{row['images_per_s']:>10,.0f} images/s; a batch in {row['batch_ms_mean']:.1f} ms, "
        f"99 % within {row['batch_ms_p99']:.1f} ms"
        for name, row in figures.items()
    ]
    return "\n".join([head, *rows, f"best: {_options(found.best)}", _verdict(found)])


_SMALL_GAIN = 1.05


def _verdict(found: Tuning) -> str:
    low, high = found.interval
    sure = f"{low:.2f} to {high:.2f} times the defaults' speed, with 99 % confidence"
    if found.chosen:
        return f"{sure}; use: {_options(found.chosen)}"
    if high <= _SMALL_GAIN:
        return f"{sure}: these options do not matter here; keep the defaults"
    return f"{sure}: no gain is certain; keep the defaults, or search longer with --minutes"


def _options(values: Values) -> str:
    """As options of ``train``."""
    names: dict[str, str] = {"num_threads": "workers"}
    shown: list[Any] = []
    for name, value in values.items():
        shown += [f"--{names.get(name, name).replace('_', '-')}", value]
    return " ".join(map(str, shown)) or "the defaults"
