"""The command: ``python -m dali_lmdb.train``."""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback

import click

from dali_lmdb.cli import Command, option_of
from dali_lmdb.loaders.backends import Backend
from dali_lmdb.loaders.bad import OnBad
from dali_lmdb.loaders.settings import Decode, DecodeDevice
from dali_lmdb.torchrun import RankEnvironment, incomplete_launcher
from dali_lmdb.train import preflight, trainer
from dali_lmdb.train.crashes import what_was_decoded
from dali_lmdb.train.distributed import RankFailedError, launch, run_rank
from dali_lmdb.train.rank import show_progress
from dali_lmdb.train.settings import DeviceChoice, Precision, TrainSettings, TrainShuffle

__all__ = ["main"]

_option = option_of(TrainSettings)
_AT_LEAST_0 = click.IntRange(min=0)
_AT_LEAST_1 = click.IntRange(min=1)


@click.command(cls=Command)
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
@_option("--arch", metavar="NAME", help="Any torchvision classification model.")
@_option("--backend", help="torch is the classic path: Pillow on the CPU.")
@_option("--device", help="auto uses GPUs if there are any.")
@_option("--precision", help="Precision on GPUs; CPUs use float32.")
@_option("--epochs", type=_AT_LEAST_1, help="Number of training epochs.")
@_option("--batch-size", type=_AT_LEAST_1, help="Records per step of one rank.")
@_option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    help="Peak learning rate, used as given: not scaled by batch size or ranks.",
)
@_option("--momentum", type=click.FloatRange(min=0), help="SGD momentum.")
@_option("--weight-decay", type=click.FloatRange(min=0), help="Weight decay of SGD, on all parameters.")
@_option("--size", type=_AT_LEAST_1, help="Height and width of the images, in pixels.")
@_option(
    "--workers",
    type=_AT_LEAST_0,
    help="DALI threads or DataLoader processes of each rank.  [default: its share of the node's cores]",
)
@_option("--decode", help="DALI decodes whole images or crop windows only; auto suits the device.")
@_option("--decode-device", help="Where DALI decodes.  [default: gpu if training on GPUs]")
@_option(
    "--hw-decoder-load",
    type=click.FloatRange(min=0, max=1),
    help="Fraction of a batch offered to the GPU's hardware JPEG engine.",
)
@_option("--prefetch-queue-depth", type=_AT_LEAST_1, help="Batches that DALI works on ahead.")
@_option("--readahead-bytes", type=_AT_LEAST_0, help="Bytes DALI's loader requests from storage ahead; 0: none.")
@_option("--shuffle", help="block suits storage that is slow at random reads.")
@_option(
    "--on-bad",
    help="If a record cannot be decoded: stop and name it, or warn and use another of its batch.",
)
@_option("--quarantine", metavar="FILE", help="List records that cannot be decoded, one JSON object per line.")
@_option("--seed", type=_AT_LEAST_0, help="Seed of weights, order, crops and flips.")
@_option("--output", metavar="DIR", help="Folder for last.pt and best.pt, written after each epoch.")
@_option("--resume", is_flag=True, help="Resume from the checkpoint in --output, if there is one.")
@_option("--checkpoint-every", type=_AT_LEAST_0, metavar="STEPS", help="Also save after every STEPS steps.")
@_option("--keep", type=_AT_LEAST_0, metavar="N", help="Keep the checkpoints of the last N epochs, too.")
@_option("--log-json", metavar="FILE", help="Write measurements, one JSON object per line.")
@_option("--log-every", type=_AT_LEAST_1, metavar="STEPS", help="Steps between two reports.")
def main(
    *,
    train: str,
    val: str,
    world_size: int,
    arch: str,
    backend: Backend,
    device: DeviceChoice,
    precision: Precision,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    size: int,
    workers: int | None,
    decode: Decode,
    decode_device: DecodeDevice | None,
    hw_decoder_load: float,
    prefetch_queue_depth: int,
    readahead_bytes: int,
    shuffle: TrainShuffle,
    on_bad: OnBad,
    quarantine: str | None,
    seed: int,
    output: str | None,
    resume: bool,
    checkpoint_every: int,
    keep: int,
    log_json: str | None,
    log_every: int,
) -> None:
    """Train a torchvision model with DDP and evaluate it after each epoch.

    With --backend torch, STORE may also be a folder of class folders with images.

    On several machines, or with torchrun's restarts:
    torchrun --nproc-per-node 8 [--nnodes ...] -m dali_lmdb.train --train STORE --val STORE

    The learning rate rises linearly over the first 5 % of the run, then falls to 0 on a cosine. Evaluation
    counts every record once. val_top1 and val_top5 are percentages. Epochs count from 0, steps from 1 in each
    epoch.

    SIGTERM, SIGUSR1, SIGHUP or Ctrl-C, to this process or to any rank, ends the run after the step in progress,
    with a checkpoint and exit code 85 (Ctrl-C: 130); start it again with --resume. A second one stops it at once.
    """
    for option, given in (("--resume", resume), ("--checkpoint-every", checkpoint_every), ("--keep", keep)):
        if given and output is None:
            raise click.UsageError(f"{option} needs --output DIR")
    settings = TrainSettings(
        train=train,
        val=val,
        arch=arch,
        backend=backend,
        device=device,
        precision=precision,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        size=size,
        workers=workers,
        decode=decode,
        decode_device=decode_device,
        hw_decoder_load=hw_decoder_load,
        prefetch_queue_depth=prefetch_queue_depth,
        readahead_bytes=readahead_bytes,
        shuffle=shuffle,
        on_bad=on_bad,
        quarantine=quarantine,
        seed=seed,
        output=output,
        resume=resume,
        checkpoint_every=checkpoint_every,
        keep=keep,
        log_json=log_json,
        log_every=log_every,
    )
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
    show_progress(rank=ranks.rank if ranks else 0)
    if num_ranks > 1:
        run_rank(lambda: trainer.train(settings), show_errors=True)
        return
    try:
        trainer.train(settings)
    except ValueError:  # all input has been validated: this is a bug, so show its traceback
        traceback.print_exc()
        sys.exit(1)


def _launch(settings: TrainSettings, *, world_size: int) -> None:
    arguments = ["-m", "dali_lmdb.train.rank", json.dumps(dataclasses.asdict(settings))]
    try:
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
