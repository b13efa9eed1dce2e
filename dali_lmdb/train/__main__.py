"""The command: ``python -m dali_lmdb.train``."""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any, get_type_hints

import click

from dali_lmdb.cli import Command, option_of
from dali_lmdb.errors import StateError
from dali_lmdb.loaders.tuned import read_tuned
from dali_lmdb.torchrun import RankEnvironment, incomplete_launcher
from dali_lmdb.train import preflight, trainer
from dali_lmdb.train.crashes import what_was_decoded
from dali_lmdb.train.distributed import RankFailedError, launch, run_rank
from dali_lmdb.train.progress import no_line_left
from dali_lmdb.train.rank import show_progress
from dali_lmdb.train.recipes import RECIPES
from dali_lmdb.train.settings import RANGES, Range, TrainSettings

__all__ = ["main"]

_AT_LEAST_1 = click.IntRange(min=1)
_HINTS = get_type_hints(TrainSettings)


class _Number(click.ParamType[Any]):
    """A number of a setting's range, or ``auto`` where the setting may have that value."""

    name = "number"

    def __init__(self, allowed: Range, *, kind: type[int] | type[float], auto: bool) -> None:
        self._range, self._kind, self._auto = allowed, kind, auto

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if self._auto and value == "auto":
            return value
        try:
            number = self._kind(value)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not {'an integer' if self._kind is int else 'a number'}.", param, ctx)
        if not self._range.holds(number):
            self.fail(f"{value} is not {self._range}.", param, ctx)
        return number


def _option(name: str, **arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    field = name.removeprefix("--").replace("-", "_")
    if field in RANGES:
        hint = str(_HINTS[field])
        kind = float if "float" in hint else int
        arguments["type"] = _Number(RANGES[field], kind=kind, auto="auto" in hint)
        arguments.setdefault("metavar", "NUMBER")
    return option_of(TrainSettings)(name, **arguments)


def _use_config(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    """Make a file's values defaults, above those of a recipe."""
    if path is None:
        return path
    try:
        import tomllib
    except ImportError as error:
        raise click.BadParameter("needs Python 3.11", ctx=ctx, param=param) from error
    try:
        with open(path, "rb") as file:
            values = {key.replace("-", "_"): value for key, value in tomllib.load(file).items()}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path}: not a readable TOML file: {error}", ctx=ctx, param=param) from error
    known = {option.name: option for option in ctx.command.params if option.name not in ("config", "tuned")}
    if unknown := sorted(values.keys() - known.keys()):
        raise click.BadParameter(f"{path}: no such option: {', '.join(unknown)}", ctx=ctx, param=param)
    for name, value in values.items():
        is_flag = isinstance(known[name].type, click.types.BoolParamType)
        if not isinstance(value, bool if is_flag else str | int | float) or isinstance(value, bool) != is_flag:
            expected = "true or false" if is_flag else "text or a number"
            raise click.BadParameter(f"{path}: {name} is {value!r}, expected {expected}", ctx=ctx, param=param)
        values[name] = value if is_flag else str(value)  # as on the command line, where 1.5 is no integer
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


def _use_recipe(ctx: click.Context, param: click.Parameter, name: str | None) -> str | None:
    """Make a recipe's settings defaults, below those of a file."""
    if name is not None:
        ctx.default_map = {**RECIPES[name].settings, **(ctx.default_map or {})}
    return name


def _tuned_values(path: str, *, ranks_per_node: int) -> dict[str, Any]:
    """A file's values for options that are neither given nor in a --config file or a recipe."""
    try:
        found = read_tuned(path, ranks_per_node=ranks_per_node)
    except StateError as error:
        raise click.BadParameter(str(error), param_hint="'--tuned'") from error
    values = {"workers" if name == "num_threads" else name: value for name, value in found.items()}
    source = click.get_current_context().get_parameter_source
    return {name: value for name, value in values.items() if source(name) is click.core.ParameterSource.DEFAULT}


@click.command(
    cls=Command, epilog="\b\nRecipes:\n" + "\n".join(f"  {name}: {r.about}" for name, r in RECIPES.items())
)
@click.option("--train", required=True, metavar="STORE", help="Store to train on, or an image folder.")
@click.option("--val", required=True, metavar="STORE", help="Store to evaluate on, with the same classes.")
@click.option(
    "--world-size",
    type=_AT_LEAST_1,
    default=1,
    show_default=True,
    metavar="N",
    help="Ranks to start on this machine, each on its own GPU. Under torchrun, its number is used instead.",
)
@click.option(
    "--config",
    metavar="FILE",
    is_eager=True,
    callback=_use_config,
    help="Options from a TOML file; those given on the command line rule.",
)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    is_eager=True,
    callback=_use_recipe,
    help="A published recipe, see below; other options rule.",
)
@click.option(
    "--tuned",
    metavar="FILE",
    help="Options for DALI from dali-lmdb tune --save; others rule.",
)
@_option("--arch", metavar="NAME", help="Any torchvision classification model, or MODULE:FUNCTION.")
@_option(
    "--weights",
    help="Weights to begin with: DEFAULT or another of torchvision's names, or a file; none: random ones.",
)
@_option("--backend", help="torch is the classic path: Pillow on the CPU.")
@_option("--device", help="auto uses GPUs if there are any.")
@_option("--precision", help="Precision on GPUs; CPUs use float32.")
@_option("--epochs", help="Number of training epochs.")
@_option("--batch-size", help="Records per step of one rank.")
@_option("--accumulate", help="Batches of a rank whose gradients make one step.")
@_option("--opt", help="The optimizer.")
@_option("--lr", help="Peak learning rate; auto: --lr-base for every 256 records of a step, over all ranks.")
@_option("--lr-base", help="See --lr.  [default: 0.1 for SGD, 2.5e-4 for AdamW]")
@_option("--lr-scheduler", help="How the rate falls after the warm-up.")
@_option("--lr-warmup-epochs", help="Epochs in which the rate rises from 0.  [default: 5 % of the run]")
@_option("--lr-step-size", help="Epochs between two steps of --lr-scheduler step.")
@_option("--lr-gamma", help="Factor of each of its steps.")
@_option("--momentum", help="SGD momentum; the first beta of AdamW.")
@_option("--weight-decay", help="Weight decay.")
@_option("--norm-weight-decay", help="Weight decay of normalisation layers and biases.")
@_option("--label-smoothing", help="Label smoothing.")
@_option("--mixup-alpha", help="Mixup, of this Beta distribution; 0: none.")
@_option("--cutmix-alpha", help="Cutmix likewise; with both, each batch has one of the two.")
@_option("--model-ema-decay", help="Also evaluate an average of the weights with this decay a step; 0: none.")
@_option("--clip-grad-norm", help="Largest norm of the gradients together; 0: no limit.")
@_option("--zero-init-residual", is_flag=True, help="Start with residual blocks that pass their input through.")
@_option("--sync-bn", is_flag=True, help="Normalise batches over all ranks.")
@_option("--compile", is_flag=True, help="Train through torch.compile.")
@_option("--size", help="Height and width of the training images, in pixels.")
@_option("--start-size", help="Size until 11/16 of the run; it reaches --size at 13/16.  [default: --size]")
@_option("--val-size", help="Height and width of the validation images.  [default: --size]")
@_option("--val-resize", help="Their shorter side before the central crop.  [default: --val-size * 256 / 224]")
@_option("--interpolation", help="Resizing filter.")
@_option("--crop-scale", help="Smallest fraction of an image's area that a training crop covers.")
@_option("--hflip", help="Probability of a horizontal flip.")
@_option("--color-jitter", help="Strength of changes of brightness, contrast and saturation.")
@_option("--hue", help="Strength of changes of the hue.")
@_option("--grayscale", help="Probability of conversion to grey.")
@_option("--random-erase", help="Probability that a rectangle is erased.")
@_option(
    "--workers",
    help="DALI threads or DataLoader processes of each rank.  [default: its share of the node's cores]",
)
@_option("--decode", help="DALI decodes whole images or crop windows only; auto suits the device.")
@_option("--decode-device", help="Where DALI decodes.  [default: gpu if training on GPUs]")
@_option(
    "--hw-decoder-load",
    help="Fraction of a batch offered to the GPU's hardware JPEG engine.",
)
@_option("--prefetch-queue-depth", help="Batches that DALI works on ahead.")
@_option("--readahead-bytes", help="Bytes DALI's loader requests from storage ahead; 0: none.")
@_option("--shuffle", help="block suits storage that is slow at random reads.")
@_option(
    "--on-bad",
    help="If a record cannot be decoded: stop and name it, or warn and use another of its batch.",
)
@_option("--quarantine", metavar="FILE", help="List records that cannot be decoded, one JSON object per line.")
@_option("--seed", help="Seed of weights, order, crops and flips.")
@_option("--output", metavar="DIR", help="Folder for last.pt and best.pt, written after each epoch.")
@_option("--resume", is_flag=True, help="Resume from the checkpoint in --output, if there is one.")
@_option("--checkpoint-every", metavar="STEPS", help="Also save after every STEPS steps.")
@_option("--keep", metavar="N", help="Keep the checkpoints of the last N epochs, too.")
@_option("--log-json", metavar="FILE", help="Write measurements, one JSON object per line.")
@_option("--log-every", metavar="STEPS", help="Steps between two reports.")
@_option("--tensorboard", metavar="DIR", help="Write them for TensorBoard, too; it must be installed.")
@_option("--profile", metavar="STEPS", help="Write a trace of STEPS steps of each rank to --output.")
def main(*, world_size: int, config: str | None, recipe: str | None, tuned: str | None, **values: Any) -> None:
    """Train a model with DDP and evaluate it after each epoch.

    With --backend torch, STORE may also be a folder of class folders with images.

    On several machines, or with torchrun's restarts:
    torchrun --nproc-per-node 8 [--nnodes ...] -m dali_lmdb.train --train STORE --val STORE

    Evaluation counts every record once. val_top1 and val_top5 are percentages. Epochs count from 0, steps
    from 1 in each epoch.

    SIGTERM, SIGUSR1, SIGHUP or Ctrl-C, to this process or to any rank, ends the run after the step in progress,
    with a checkpoint and exit code 85 (Ctrl-C: 130); start it again with --resume. A second one stops it at once.
    """
    del config  # it has set defaults, as has the recipe
    for name in ("resume", "checkpoint_every", "keep", "profile"):
        if values[name] and values["output"] is None:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --output DIR")
    if values["weights"] == "none":
        values["weights"] = None
    if recipe is not None and values["val_size"] != RECIPES[recipe].settings.get("val_size"):
        given = click.get_current_context().get_parameter_source("val_resize")
        if given is not click.core.ParameterSource.COMMANDLINE:
            values["val_resize"] = None  # the recipe's is for its own size
    if tuned is not None:
        if values["backend"] != "dali":
            raise click.UsageError("--tuned holds options of DALI; leave it out with this --backend")
        ranks = RankEnvironment.from_environment()
        values |= _tuned_values(tuned, ranks_per_node=ranks.ranks_per_node if ranks else world_size)
    settings = TrainSettings(**values)
    _run(settings, world_size=world_size)


def _run(settings: TrainSettings, *, world_size: int) -> None:
    """Train as one rank that torchrun started, alone, or as ``world_size`` ranks that this process starts."""
    ranks = RankEnvironment.from_environment()
    if ranks is None and (incomplete := incomplete_launcher()):
        raise ValueError(incomplete)
    num_ranks = ranks.world_size if ranks else world_size
    preflight.check(settings, world_size=num_ranks, ranks_per_node=ranks.ranks_per_node if ranks else world_size)

    if ranks is None and world_size > 1:
        _launch(settings, world_size=world_size)
        return
    line = show_progress(rank=ranks.rank if ranks else 0)
    if num_ranks > 1:
        run_rank(lambda: trainer.train(settings, line=line), show_errors=True)
        return
    try:
        trainer.train(settings, line=line)
    except ValueError:  # all input has been validated: this is a bug, so show its traceback
        traceback.print_exc()
        sys.exit(1)


def _launch(settings: TrainSettings, *, world_size: int) -> None:
    arguments = ["-m", "dali_lmdb.train.rank", json.dumps(dataclasses.asdict(settings))]
    try:
        with no_line_left():
            launch(arguments, world_size=world_size)
    except RankFailedError as error:
        if error.details:
            click.echo(error.details, err=True)
        message = str(error)
        if error.crashed is not None and settings.output is not None:
            stores = {"train": settings.train, "val": settings.val}
            message += what_was_decoded(settings.output, stores, rank=error.crashed)
        raise click.ClickException(message) from error


if __name__ == "__main__":
    main(prog_name="python -m dali_lmdb.train")
