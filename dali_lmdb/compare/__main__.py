"""The command ``dali-lmdb compare``, also ``python -m dali_lmdb.compare``."""

from __future__ import annotations

import json
from typing import Literal

import click

from dali_lmdb.cli import Command, option_of, print_progress, print_result
from dali_lmdb.compare.settings import CompareSettings
from dali_lmdb.compare.throughput import BACKENDS, Comparison, Round, compare_throughput
from dali_lmdb.loaders.settings import Decode, DecodeDevice

__all__ = ["main"]

_option = option_of(CompareSettings)
_AT_LEAST_1 = click.IntRange(min=1)


@click.command(cls=Command)
@click.argument("store", metavar="STORE")
@_option(
    "--task", type=click.Choice(["train", "eval"]), help="train: random crops and flips; eval: central crops."
)
@click.option("--images", metavar="DIR", help="The image folder that STORE was made from, to measure it too.")
@_option(
    "--batch-size",
    type=_AT_LEAST_1,
    help="Images per step, at most the record count.  [default: 256 on a GPU, else 64]",
)
@_option("--rounds", type=_AT_LEAST_1, help="Number of measured rounds.")
@_option("--seconds", type=click.FloatRange(min=0, min_open=True), help="Length of each measurement, in seconds.")
@_option("--workers", type=_AT_LEAST_1, help="DataLoader workers, and DALI threads.  [default: all cores]")
@_option("--size", type=_AT_LEAST_1, help="Height and width of the images, in pixels.")
@_option("--device", help="auto uses the GPU if there is one.")
@_option("--decode", help="DALI decodes whole images or crop windows only; auto suits the device.")
@_option("--decode-device", help="Where DALI decodes.  [default: with a GPU both are measured]")
@_option(
    "--hw-decoder-load",
    type=click.FloatRange(min=0, max=1),
    help="Fraction of a batch offered to the GPU's hardware JPEG engine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
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
    as_json: bool,
) -> None:
    """Measure the images per second of each way of loading STORE.

    files: an image folder, Pillow in DataLoader workers (with --images). torch: STORE, Pillow in DataLoader
    workers (the classic path). dali: STORE, DALI. reader: the image folder, DALI's own file reader. All do the
    same work; they take turns, and the ratio to torch is the median of the rounds' ratios. With a GPU, dali-cpu is
    STORE, DALI with decoding on the CPU.
    """
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
    )
    found = compare_throughput(store, images=images, settings=settings, progress=_report)
    print_result(json.dumps(found.to_dict()) if as_json else _table(found))


def _report(done: Round) -> None:
    what = f"round {done.number}" if done.number else "warm-up"
    speeds = [f"{name} {done.images_per_s[name]:,.0f}" for name in BACKENDS if name in done.images_per_s]
    print_progress(f"{what}: {'  '.join(speeds)} images/s")


def _table(result: Comparison) -> str:
    settings = result.settings
    head = result.heading(
        f"{settings.task}, {settings.size} x {settings.size}, batches of {settings.batch_size}, "
        f"{settings.workers} workers or threads, {settings.rounds} rounds of {settings.seconds:g} s",
        *_gpu_line(result),
    )
    columns = f"{'':9}{'images/s':>10}{'min':>9}{'max':>9}{'ratio':>8}{'min':>7}{'max':>7}"
    rows = [
        f"{found.backend:<9}{found.images_per_s:>10,.0f}{min(found.rounds):>9,.0f}{max(found.rounds):>9,.0f}"
        f"{found.ratio:>8.2f}{min(found.ratios):>7.2f}{max(found.ratios):>7.2f}"
        for found in result.measurements
    ]
    meanings = [f"{found.backend:<9}{_meaning(found.backend, result)}" for found in result.measurements]
    failed = [f"{backend:<9}not measured: {cause}" for backend, cause in result.failed.items()]
    return "\n".join([head, columns, *rows, "", *meanings, *failed])


def _gpu_line(result: Comparison) -> list[str]:
    """What decides how fast a GPU decodes; nothing without one."""
    if result.settings.device != "cuda":
        return []
    found, settings = result.versions, result.settings
    return [
        f"DALI {found['nvidia-dali-cuda120']}, nvImageCodec {found['nvimagecodec']}, nvJPEG {found['nvjpeg']}, "
        f"driver {result.machine['driver']}; hw_decoder_load {settings.hw_decoder_load:g}, "
        f"{settings.dtype} {settings.layout}"
    ]


def _meaning(backend: str, result: Comparison) -> str:
    chosen = result.decoding.get(backend)
    if chosen is None:
        return BACKENDS[backend]
    return f"{BACKENDS[backend]} ({chosen['decode']}s decoded on the {chosen['decode_device'].upper()})"


if __name__ == "__main__":
    main(prog_name="python -m dali_lmdb.compare")
