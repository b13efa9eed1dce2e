"""The command: ``dali-lmdb evaluate``."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import click

from dali_lmdb.cli import Command, interrupt_on_sigterm, option_of, print_result
from dali_lmdb.evaluate.rank import evaluate_checkpoint, print_plainly
from dali_lmdb.evaluate.settings import EvaluateSettings, check
from dali_lmdb.torchrun import RankEnvironment, incomplete_launcher
from dali_lmdb.train.distributed import RankFailedError, launch, run_rank
from dali_lmdb.train.rank import show_progress

__all__ = ["main"]

_AT_LEAST_1 = click.IntRange(min=1)
_THE_CHECKPOINTS = "  [default: the checkpoint's]"
_option = option_of(EvaluateSettings)


@click.command(cls=Command)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("--val", required=True, metavar="STORE", help="Store to evaluate on, or an image folder.")
@_option("--allow-subset", is_flag=True, help="STORE may lack some of the classes.")
@click.option("--ema/--no-ema", default=None, help="Averaged or plain weights only.  [default: what there is]")
@click.option(
    "--world-size",
    type=_AT_LEAST_1,
    default=1,
    show_default=True,
    metavar="N",
    help="Ranks to start on this machine, each on its own GPU. Under torchrun, its number is used instead.",
)
@_option("--backend", help=f"torch is the classic path: Pillow on the CPU.{_THE_CHECKPOINTS}")
@_option("--device", help="auto uses GPUs if there are any.")
@_option("--precision", help=f"Precision on GPUs; CPUs use float32.{_THE_CHECKPOINTS}")
@_option("--batch-size", type=_AT_LEAST_1, metavar="N", help=f"Records per step of one rank.{_THE_CHECKPOINTS}")
@_option("--val-size", type=_AT_LEAST_1, metavar="N", help=f"Height and width of the images.{_THE_CHECKPOINTS}")
@_option(
    "--val-resize",
    type=_AT_LEAST_1,
    metavar="N",
    help="Their shorter side before the central crop.  "
    "[default: the checkpoint's; with --val-size, that * 256 / 224]",
)
@_option("--interpolation", help=f"Resizing filter.{_THE_CHECKPOINTS}")
@_option(
    "--workers",
    type=click.IntRange(min=0),
    metavar="N",
    help="DALI threads or DataLoader processes of each rank.  [default: its share of the node's cores]",
)
@_option("--json", is_flag=True, help="Print one JSON object.")
@_option("--per-class", metavar="FILE", help="Write records, top-1 and top-5 of each class, as TSV.")
@_option("--predictions", metavar="FILE", help="Write each record's five most probable labels, as Parquet.")
@_option("--worst", metavar="FILE", help="Draw the 25 most confident mistakes, as PNG.")
def main(*, world_size: int, **values: Any) -> None:
    """Evaluate CHECKPOINT, which train has written, on a store with its classes.

    Every record counts once. top-1 and top-5 are percentages. If the checkpoint has averaged weights, both are
    evaluated, and files and confusions are of the averaged ones. Classes are matched by name.
    """
    settings = EvaluateSettings(**values)
    ranks = RankEnvironment.from_environment()
    if ranks is None and (incomplete := incomplete_launcher()):
        raise ValueError(incomplete)
    check(settings, ranks_per_node=ranks.ranks_per_node if ranks else world_size)
    if ranks is None and world_size > 1:
        _launch(settings, world_size=world_size)
        return
    interrupt_on_sigterm()
    show_progress(rank=ranks.rank if ranks else 0, stream=sys.stderr)
    if ranks is not None and ranks.world_size > 1:
        run_rank(lambda: evaluate_checkpoint(settings, say=print_plainly), show_errors=True)
        return
    evaluate_checkpoint(settings, say=print_result)


def _launch(settings: EvaluateSettings, *, world_size: int) -> None:
    arguments = ["-m", "dali_lmdb.evaluate.rank", json.dumps(dataclasses.asdict(settings))]
    try:
        launch(arguments, world_size=world_size)
    except SystemExit:  # a signal's; there is nothing to go on with, so the code of training would mislead
        raise KeyboardInterrupt from None
    except RankFailedError as error:
        if error.details:
            click.echo(error.details, err=True)
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main(prog_name="python -m dali_lmdb.evaluate")
