"""The command ``dali-lmdb compare``, also ``python -m dali_lmdb.compare``."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click
from click.core import ParameterSource

from dali_lmdb.cli import Command, option_of, print_progress, print_result
from dali_lmdb.compare.cold import COLD_WAYS, ColdComparison, ColdRound, compare_cold
from dali_lmdb.compare.handover import Handover, HandoverRound, measure_handover
from dali_lmdb.compare.part import ReadingSettings
from dali_lmdb.compare.report import spread
from dali_lmdb.compare.throughput import BACKENDS, CompareSettings, Comparison, Round, compare_throughput
from dali_lmdb.errors import one_line

__all__ = ["main"]

_SETTINGS = {
    "train": CompareSettings,
    "eval": CompareSettings,
    "cold": ReadingSettings,
    "handover": ReadingSettings,
}
_AT_LEAST_1 = click.IntRange(min=1)


_option = option_of(ReadingSettings, CompareSettings)


@click.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("store", metavar="STORE")
@click.option(
    "--task",
    type=click.Choice(list(_SETTINGS)),
    default="train",
    show_default=True,
    help="train: random crops and flips; eval: central crops; cold and handover: see above.",
)
@click.option("--images", metavar="DIR", help="The image folder that STORE was made from, to measure it too.")
@click.option(
    "--batch-size",
    type=_AT_LEAST_1,
    help="Images per step, at most the record count.  [default: 64; 256 with cold and handover]",
)
@_option("--rounds", type=_AT_LEAST_1, help="Number of measured rounds.")
@_option("--seconds", type=click.FloatRange(min=0, min_open=True), help="Length of each measurement, in seconds.")
@_option("--workers", type=_AT_LEAST_1, help="DataLoader workers, and DALI threads.  [default: all cores]")
@_option("--size", type=_AT_LEAST_1, help="Height and width of the images, in pixels.")
@_option("--device", type=click.Choice(["auto", "cuda", "cpu"]), help="auto uses the GPU if there is one.")
@_option(
    "--records", type=_AT_LEAST_1, help="With cold and handover: number of records to read, chosen at random."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def main(store: str, *, task: str, as_json: bool, **options: Any) -> None:
    """Measure the images per second of each way of loading STORE.

    files: an image folder, Pillow in DataLoader workers (with --images). torch: STORE, Pillow in DataLoader
    workers (the classic path). dali: STORE, DALI. All do the same work; they take turns, and the ratio to torch
    is the median of the rounds' ratios.

    --task cold: records per second read from storage in random order, with the page cache dropped before each
    window: one by one through liblmdb, by 16 threads that know the records' offsets, and by the loader's
    readahead.

    --task handover: records per second that one core hands over to DALI from memory, without decoding.
    """
    given = _given(task, options)
    if task == "cold":
        cold = compare_cold(store, settings=ReadingSettings(**given), progress=_report_cold)
        print_result(json.dumps(cold.to_dict()) if as_json else _cold_table(cold))
    elif task == "handover":
        handover = measure_handover(store, settings=ReadingSettings(**given), progress=_report_handover)
        print_result(json.dumps(handover.to_dict()) if as_json else _handover_table(handover))
    else:
        images = given.pop("images", None)
        settings = CompareSettings(task=task, **given)  # type: ignore[arg-type]
        found = compare_throughput(store, images=images, settings=settings, progress=_report)
        print_result(json.dumps(found.to_dict()) if as_json else _table(found))


def _given(task: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options given on the command line; the library has the defaults of the others."""
    known = {field.name for field in dataclasses.fields(_SETTINGS[task])}
    if _SETTINGS[task] is CompareSettings:
        known.add("images")
    source = click.get_current_context().get_parameter_source
    given = {name: value for name, value in options.items() if source(name) is not ParameterSource.DEFAULT}
    for name in given.keys() - known:
        raise click.UsageError(f"--{name.replace('_', '-')} does not apply to --task {task}; leave it out")
    return given


def _progress(number: int, what: str) -> None:
    print_progress(f"{f'round {number}' if number else 'warm-up'}: {what}")


def _report(done: Round) -> None:
    speeds = [f"{name} {done.images_per_s[name]:,.0f}" for name in BACKENDS if name in done.images_per_s]
    _progress(done.number, f"{'  '.join(speeds)} images/s")


def _report_cold(done: ColdRound) -> None:
    speeds = [f"{way} {done.windows[way].records_per_s:,.0f}" for way in COLD_WAYS]
    _progress(done.number, f"{'  '.join(speeds)} records/s")


def _report_handover(done: HandoverRound) -> None:
    _progress(done.number, f"{done.records_per_s:,.0f} records/s")


def _head(result: Comparison | ColdComparison | Handover, *lines: str) -> str:
    machine = result.machine
    return "\n".join(
        [
            f"{one_line(result.store)}: {result.num_records:,} records, {result.image_bytes / 1e6:,.1f} MB",
            *lines,
            f"{machine['gpu'] or 'no GPU used'}, {machine['cores']} cores of {machine['cpu']}",
            "",
        ]
    )


def _table(result: Comparison) -> str:
    settings = result.settings
    head = _head(
        result,
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


def _cold_table(result: ColdComparison) -> str:
    settings = result.settings
    head = _head(
        result,
        f"cold, {settings.records:,} records in random order, batches of {settings.batch_size}, "
        f"{settings.rounds} rounds of at most {settings.seconds:g} s",
    )
    columns = f"{'':9}{'records/s':>10}{'min':>9}{'max':>9}{'x get':>8}{'min':>7}{'max':>7}"
    columns += f"{'x pread':>9}{'min':>7}{'max':>7}{'read/used':>11}"
    rows = []
    for way in COLD_WAYS:
        speed, to_get = spread(result.speeds(way)), spread(result.ratios(way, to="get"))
        to_pread, read = spread(result.ratios(way, to="pread")), result.read_per_used(way)
        rows.append(
            f"{way:<9}{speed['median']:>10,.0f}{speed['min']:>9,.0f}{speed['max']:>9,.0f}"
            f"{to_get['median']:>8.1f}{to_get['min']:>7.1f}{to_get['max']:>7.1f}"
            f"{to_pread['median']:>9.2f}{to_pread['min']:>7.2f}{to_pread['max']:>7.2f}"
            f"{'unknown' if read is None else f'{read:.2f}':>11}"
        )
    notes = [f"{way:<9}{meaning}" for way, meaning in COLD_WAYS.items()]
    notes.append("read/used: bytes read from storage per byte of the records")
    if not result.is_cold:
        notes += [
            "",
            f"NOT COLD: {result.warm_before:.0%} of the records were in the page cache before they were read,",
            "although it was asked to drop them: the file system is in memory (tmpfs), another process has the",
            "store open, or you do not own it and the kernel does not tell.",
        ]
    return "\n".join([head, columns, *rows, "", *notes])


def _handover_table(result: Handover) -> str:
    settings = result.settings
    head = _head(
        result,
        f"handover, {settings.records:,} records in random order, batches of {settings.batch_size}, one core, "
        f"{settings.rounds} rounds of {settings.seconds:g} s",
    )
    columns = f"{'':9}{'records/s':>10}{'min':>9}{'max':>9}"
    rows = [
        f"{name:<9}{found['median']:>10,.0f}{found['min']:>9,.0f}{found['max']:>9,.0f}"
        for name, found in (
            ("elapsed", spread([one.records_per_s for one in result.rounds])),
            ("cpu", spread([one.records_per_cpu_s for one in result.rounds])),
        )
    ]
    notes = [
        "elapsed  per second of wall time",
        "cpu      per second of CPU time: the rate if nothing else had used the core",
    ]
    if result.cold > 0.01:
        notes += [
            "",
            f"NOT WARM: {result.cold:.0%} of the bytes had to be read from storage; use fewer --records.",
        ]
    return "\n".join([head, columns, *rows, "", *notes])


if __name__ == "__main__":
    main(prog_name="python -m dali_lmdb.compare")
