"""The command ``dali-lmdb convert``, also ``python scripts/convert.py``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dali_lmdb.cli import (
    Command,
    FiniteRange,
    ProgressBar,
    interrupt_on_sigterm,
    option_of,
    print_progress,
    print_result,
    ranks_from_environment,
)
from dali_lmdb.convert import ConvertProgress, ConvertSettings, Split, Summary, convert, convert_split
from dali_lmdb.convert.ranks import RankLostError, Ranks, torchrun_ranks
from dali_lmdb.convert.settings import Check, OnBadImage
from dali_lmdb.convert.sources import KINDS, open_source
from dali_lmdb.convert.sources._files import lines_of
from dali_lmdb.convert.sources._names import listed
from dali_lmdb.errors import DaliLmdbError, one_line
from dali_lmdb.images.gpu_decoder import gpu_decoder
from dali_lmdb.store.layout import MAX_SHARDS
from dali_lmdb.torchrun import RankEnvironment

__all__ = ["main"]

_option = option_of(ConvertSettings)


@click.command(cls=Command)
@click.argument("source", metavar="SOURCE")
@click.argument("store", metavar="STORE")
@click.option(
    "--source",
    "kind",
    type=click.Choice(KINDS),
    help="Kind of SOURCE.  [default: detected]",
)
@click.option(
    "--val-labels",
    metavar="FILE",
    help="Labels of a flat folder or tar: one per line in the order of the images, or lines of path and label.",
)
@click.option("--follow-links", is_flag=True, help="Follow symbolic links that lead out of an image folder.")
@click.option("--allow-empty", is_flag=True, help="Accept class folders without images.")
@click.option(
    "--class-names",
    metavar="FILE",
    help="Names for classes that only have numbers, as in a classic database: one per line, label 0 first.",
)
@click.option(
    "--classes",
    multiple=True,
    metavar="NAME,NAME…",
    help="If SOURCE is a store, keep only these classes. Labels are renumbered. May be repeated; a NAME that "
    "contains a comma needs a --classes of its own.",
)
@click.option("--classes-file", metavar="FILE", help="Also keep the classes in FILE, one name per line.")
@click.option(
    "--per-class",
    type=click.IntRange(min=1),
    metavar="N",
    help="If SOURCE is a store, keep only the first N records of each class.",
)
@_option(
    "--check",
    help="header: parse each image's header; decode: also decode it, in processes of their own, and reject what "
    "libjpeg only warns about or DALI does not decode; none: store images unseen.",
)
@_option(
    "--on-bad",
    help="fail: publish nothing if there are bad images; skip: publish without them. Either way STORE.bad.tsv "
    "lists them.",
)
@_option("--max-pixels", type=click.IntRange(min=1), help="Reject larger images.")
@_option(
    "--transcode",
    is_flag=True,
    help="Re-encode what the GPU cannot decode as baseline RGB JPEG, and decode all, as --check decode.",
)
@_option(
    "--resize",
    type=click.IntRange(min=1),
    metavar="SHORT_SIDE",
    help="Shrink images whose shorter side exceeds this many pixels.",
)
@_option("--quality", type=click.IntRange(1, 100), help="JPEG quality of what is re-encoded.")
@click.option(
    "--shards",
    type=click.IntRange(1, MAX_SHARDS),
    metavar="K",
    help="Write K files, NAME-00000-of-0000K.lmdb and so on. Under torchrun the ranks share them.",
)
@click.option(
    "--split",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    metavar="FRACTION",
    help="Make two stores, NAME-train.lmdb and NAME-val.lmdb, with this share of each class in the second.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), help="With --split: another seed is another split.  [default: 0]"
)
@click.option("--restart", is_flag=True, help="Start over instead of resuming an interrupted conversion.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads that read images, and processes that decode.  [default: all cores]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def main(
    source: str,
    store: str,
    *,
    kind: str | None,
    val_labels: str | None,
    follow_links: bool,
    allow_empty: bool,
    class_names: str | None,
    classes: tuple[str, ...],
    classes_file: str | None,
    per_class: int | None,
    check: Check,
    on_bad: OnBadImage,
    max_pixels: int,
    transcode: bool,
    resize: int | None,
    quality: int,
    shards: int | None,
    split: float | None,
    seed: int | None,
    restart: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Turn SOURCE into the LMDB file STORE.

    SOURCE is a folder with one folder of images for each class; WebDataset shards, a tar of class folders or
    ImageNet's tar of tars; a flat folder or tar with --val-labels; Parquet files as Hugging Face writes them; a
    CSV or TSV of path,label; a classic database of PyTorch-LMDB; or a store, to subset, re-shard or re-encode.

    After an interrupt, a kill or a full disk, the same command resumes where it stopped.
    """
    if seed is not None and split is None:
        raise click.UsageError("--seed needs --split")
    interrupt_on_sigterm()
    settings = ConvertSettings(
        check=check,
        on_bad=on_bad,
        max_pixels=max_pixels,
        transcode=transcode,
        resize=resize,
        quality=quality,
    )
    environment = ranks_from_environment() or RankEnvironment()
    several = environment.world_size > 1
    joining = torchrun_ranks(environment, say=print_progress) if several else nullcontext(Ranks())
    with joining as ranks, ProgressBar(quiet=as_json) as bar:
        try:
            opened = open_source(
                source,
                kind=kind,
                val_labels=val_labels,
                follow_links=follow_links,
                classes=_class_names(classes, classes_file),
                per_class=per_class,
                allow_empty=allow_empty,
                class_names=None if class_names is None else lines_of(Path(class_names), what="class names"),
            )
            if kind is None and opened.kind == "imagenet-tar" and ranks.rank == 0:
                # Classes are guessed from the tars' names alone, so show them.
                line = f"{source}: a tar for each class; classes: {listed(opened.classes)}"
                click.echo(one_line(line), err=True)
            options: dict[str, Any] = {
                "settings": settings,
                "shards": shards,
                "ranks": ranks,
                "restart": restart,
                "num_threads": threads,
                "progress": _progress_callback(bar),
            }
            summaries: Sequence[Summary]
            if split is None:
                summaries = [convert(opened, store, **options)]
            else:
                how = Split(fraction=split, seed=seed or 0)
                summaries = convert_split(opened, store, split=how, **options)
        except DaliLmdbError as error:
            if ranks.rank != 0 and not isinstance(error, RankLostError):  # rank 0 speaks for all
                sys.exit(1)
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Stopped. Run the same command again to resume where it stopped.") from None
    if ranks.rank == 0:
        done = " and ".join(summary.store for summary in summaries)
        print_result(_json(summaries) if as_json else "\n".join(map(_sentence, summaries)), done=done)


def _class_names(names: tuple[str, ...], file: str | None) -> list[str] | None:
    """Class names from ``--classes`` and ``--classes-file``; None if neither was given."""
    if file is None:
        return list(names) or None
    return [*names, *lines_of(Path(file), what="class names")]


def _json(summaries: Sequence[Summary]) -> str:
    if len(summaries) == 1:
        return json.dumps(asdict(summaries[0]))
    train, val = summaries
    return json.dumps({"train": asdict(train), "val": asdict(val)})


def _sentence(summary: Summary) -> str:
    text = (
        f"{one_line(summary.store)}: {summary.records:,} records, {summary.classes:,} classes, "
        f"{summary.bytes:,} bytes, {summary.seconds:.1f} s, {summary.images_per_s:,.0f} images/s, "
        f"{summary.megabytes_per_s:,.0f} MB/s\nread as {summary.source}"
    )
    text += (
        f"\nwith --decode-device gpu, {gpu_decoder()} decodes {summary.gpu:,}, "
        f"{summary.cpu:,} fall back to the CPU"
    )
    if summary.none:
        text += f", {summary.none:,} have no known decoder"
    if summary.transcoded or summary.resized:
        text += f"\n{summary.transcoded:,} re-encoded for the GPU, {summary.resized:,} resized"
    not_stored = [(summary.skipped, "bad images"), (summary.left_out, "other files")]
    listed = " and ".join(f"{count:,} {what}" for count, what in not_stored if count)
    if listed:
        text += f"\n{listed} left out, listed in {', '.join(map(one_line, summary.reports))}"
    return text


def _progress_callback(bar: ProgressBar) -> Callable[[ConvertProgress], None]:
    def show(progress: ConvertProgress) -> None:
        phase = f"{progress.phase} {os.path.basename(progress.store)}"
        bar.show(phase, progress.done, progress.total, progress.num_bytes)

    return show


if __name__ == "__main__":
    main(prog_name="python -m dali_lmdb.convert")
