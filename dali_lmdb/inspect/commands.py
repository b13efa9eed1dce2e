"""The commands ``dali-lmdb info``, ``dali-lmdb verify`` and ``dali-lmdb export``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dali_lmdb.cli import Command, ProgressBar, interrupt_on_sigterm, print_result
from dali_lmdb.errors import one_line
from dali_lmdb.figures import check_figure
from dali_lmdb.images.gpu_decoder import gpu_decoder
from dali_lmdb.inspect import Progress, Spread, StoreInfo, Verification, export, info, verify
from dali_lmdb.inspect.export import SHARD_SIZE_BYTES
from dali_lmdb.inspect.pixels import RESIZE, SAMPLE_RECORDS, SIZE, PixelStatistics, pixel_statistics
from dali_lmdb.inspect.plot import plot_store
from dali_lmdb.inspect.shared import SharedImages, shared_images

__all__ = ["export_command", "info_command", "verify_command"]

_LISTED = 1_000  # lines about shared images


@click.command("info", cls=Command)
@click.argument("store", metavar="STORE")
@click.option(
    "--stats",
    is_flag=True,
    help=f"Also mean and standard deviation of the pixels, for Normalize: of {SAMPLE_RECORDS:,} records, decoded, "
    f"resized to {RESIZE} and cropped to {SIZE}.",
)
@click.option(
    "--plot",
    "plot_file",
    metavar="FILE",
    help="Draw images per class and sizes (.png or .svg); needs matplotlib.",
)
@click.option(
    "--against",
    metavar="OTHER",
    help="Also list the images of STORE whose bytes are in the store OTHER too; exit code 1 if there are any.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object, with the record count of each class."
)
def info_command(store: str, *, stats: bool, plot_file: str | None, against: str | None, as_json: bool) -> None:
    """Describe STORE: records, classes, sizes, kinds, how many the GPU decodes, how it was made.

    Reads only the index, and the headers of images other than JPEG and WebP; --stats decodes a sample.
    """
    if plot_file is not None:
        check_figure(Path(plot_file))
    found = info(store)
    shared = None if against is None else shared_images(store, against)
    pixels = None
    if stats:
        interrupt_on_sigterm()
        with ProgressBar(quiet=as_json, unit="records") as bar:
            pixels = pixel_statistics(store, progress=_report_to(bar))
    if plot_file is not None:
        plot_store(store, Path(plot_file))
    if as_json:
        extra: dict[str, Any] = {} if pixels is None else {"pixels": asdict(pixels)}
        if shared is not None:
            extra["shared"] = {**asdict(shared), "images": [image._asdict() for image in shared.images]}
        print_result(json.dumps({**asdict(found), **extra}))
    else:
        lines = [_table(found, pixels)] + ([] if shared is None else _shared_lines(shared))
        print_result("\n".join(lines))
    sys.exit(1 if shared is not None and shared.images else 0)


@click.command("verify", cls=Command)
@click.argument("store", metavar="STORE")
@click.option("--decode", is_flag=True, help="Also decode every record.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads that read and check.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify_command(store: str, *, decode: bool, threads: int | None, as_json: bool) -> None:
    """Check every checksum, key and column of STORE.

    Prints a line for each problem. The exit code is 1 if STORE is damaged, otherwise 0.
    """
    with ProgressBar(quiet=as_json, unit="records") as bar:
        found = verify(store, decode=decode, num_threads=threads, progress=_report_to(bar))
    if as_json:
        print_result(json.dumps({"clean": found.clean, **asdict(found)}))
    else:
        notes = [f"note: {note}" for note in found.notes]
        print_result("\n".join([*found.damage, *notes, one_line(_verdict(found))]))
    sys.exit(0 if found.clean else 1)


@click.command("export", cls=Command)
@click.argument("store", metavar="STORE")
@click.argument("folder", metavar="DIR")
@click.option(
    "--tar", is_flag=True, help="Write WebDataset shards: DIR/NAME-000000.tar and so on, and classes.txt."
)
@click.option(
    "--shard-size-bytes",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"With --tar: start a new shard before the current one exceeds N bytes.  [default: {SHARD_SIZE_BYTES}]",
)
@click.option(
    "--per-shard",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --tar: start a new shard after N records.",
)
def export_command(
    store: str, folder: str, *, tar: bool, shard_size_bytes: int | None, per_shard: int | None
) -> None:
    """Export the images of STORE as files, byte for byte, to the new folder DIR: one folder for each class.

    DIR appears when everything is written; after an error or an interrupt nothing is left behind,
    except after a second one, which is said; the same command then starts over.
    """
    interrupt_on_sigterm()
    with ProgressBar(unit="records") as bar:
        try:
            done = export(
                store,
                folder,
                tar=tar,
                shard_size_bytes=shard_size_bytes,
                per_shard=per_shard,
                progress=_report_to(bar),
            )
        except KeyboardInterrupt as stop:
            removed = "Stopped. Nothing was left behind; run the same command again to start over."
            raise KeyboardInterrupt(str(stop) or removed) from None
    into = f"{done.tars:,} tars" if tar else f"{done.classes:,} class folders"
    done_line = one_line(f"{done.folder}: {done.records:,} records, {done.num_bytes:,} bytes, in {into}")
    print_result(done_line, done=done.folder)


def _report_to(bar: ProgressBar) -> Callable[[Progress], None]:
    return lambda progress: bar.show(*progress)


def _verdict(found: Verification) -> str:
    checked = f"{found.records:,} records, {found.num_bytes:,} bytes read{' and decoded' if found.decoded else ''}"
    if found.clean:
        return f"{found.store}: clean: {checked} in {found.seconds:.1f} s"
    listed = len(found.damage)
    more = f" ({found.num_damage - listed:,} more not listed)" if found.num_damage > listed else ""
    return f"{found.store}: damaged: {found.num_damage:,} problems{more}; {checked} in {found.seconds:.1f} s"


def _table(found: StoreInfo, pixels: PixelStatistics | None) -> str:
    rows = [
        ("store", found.store if not found.shards else f"{found.store} ({len(found.shards):,} shards)"),
        ("records", f"{found.records:,}"),
        ("classes", f"{found.classes:,}" + _spread(", records per class", found.per_class)),
        ("height", _spread("", found.height) or "unknown"),
        ("width", _spread("", found.width) or "unknown"),
        ("kinds", ", ".join(f"{kind} {count:,}" for kind, count in found.kinds.items()) or "none"),
        ("on the GPU", f"{gpu_decoder()} decodes {found.decoders.gpu:,} with --decode-device gpu"),
        ("on the CPU", f"{found.decoders.cpu:,} fall back to a CPU decoder{_by_pillow(found)}"),
        ("no decoder", f"{found.decoders.none:,}{_uninspected(found)}"),
        ("changed", f"{found.transcoded:,} transcoded, {found.resized:,} resized"),
        ("bytes", f"{found.num_bytes:,}" + _spread(", per record", found.record_bytes)),
        ("file bytes", f"{found.file_bytes:,}"),
        *([] if pixels is None else _pixel_rows(pixels, found.records)),
        ("fingerprint", found.fingerprint),
        *((f"made {key}", _value(value)) for key, value in found.made.items()),
        *(
            (f"shard {number}", f"{shard.path}, {shard.records:,} records")
            for number, shard in enumerate(found.shards)
        ),
    ]
    if found.format is not None:
        rows.insert(1, ("format", f"dali_lmdb {found.format}"))
    else:
        rows.insert(1, ("format", "classic database"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {one_line(text)}" for name, text in rows)


def _pixel_rows(pixels: PixelStatistics, num_records: int) -> list[tuple[str, str]]:
    def rgb(values: tuple[float, ...], decimals: int = 4) -> str:
        return f"({', '.join(f'{value:.{decimals}f}' for value in values)})"

    error = max(pixels.mean_error)
    sample = f" (a sample, seed {pixels.seed})" if pixels.records + pixels.undecodable < num_records else ""
    bad = f"; {pixels.undecodable:,} more cannot be decoded" if pixels.undecodable else ""
    return [
        ("pixel mean", f"{rgb(pixels.mean)}, R, G, B in 0 to 1{f'; standard error {error:.4f}' if error else ''}"),
        ("pixel std", rgb(pixels.std)),
        (
            "pixels of",
            f"{pixels.records:,} records{sample}, shorter side resized to {pixels.resize}, centre of "
            f"{pixels.size} x {pixels.size}{bad}",
        ),
    ]


def _shared_lines(shared: SharedImages) -> list[str]:
    how = "same bytes" if shared.compared else "same checksums and lengths"
    listed = [f"{name} is {other_name} there" for name, other_name in shared.images[:_LISTED]]
    more = len(shared.images) - len(listed)
    if listed:
        lines = [
            f"{shared.other}: {len(shared.images):,} images of {shared.store} are in it, too ({how}):",
            *listed,
        ]
    else:
        lines = [f"{shared.other}: no image of {shared.store} is in it"]
    if more:
        lines.append(f"{more:,} more, listed with --json")
    if shared.changed:
        lines.append(
            f"note: {shared.changed:,} records of the two were re-encoded or resized; copies of their originals "
            "have other bytes, and are not found"
        )
    return [one_line(line) for line in lines]


def _spread(of: str, spread: Spread | None) -> str:
    if spread is None:
        return ""
    text = f"{spread.min:,} to {spread.max:,}, median {spread.median:,g}"
    return f"{of} {text}" if of else text


def _by_pillow(found: StoreInfo) -> str:
    if not found.by_pillow:
        return ""
    return f", {found.by_pillow:,} of them to Pillow, which is slow; convert with --transcode to make them JPEGs"


def _uninspected(found: StoreInfo) -> str:
    return f", {found.not_looked_at:,} of them not inspected (--check none)" if found.not_looked_at else ""


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
