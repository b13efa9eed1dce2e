"""Report what works on this machine's GPU and how fast, in under 8 minutes: ``gpu_report.py STORE``.

Versions; which decoder does the work in each decode mode; pixels against the CPU and Pillow; images/s over modes,
the hardware engine's share and threads, with GPU memory; DALI's own reader; bad records; lack of memory;
training; hand-over; the tests that need a GPU. Each step runs in a process of its own with a time limit
(``gpu_steps/``), so a crash or a hang costs only that step. The report so far is written after each step, as
Markdown and as JSON.

Use a store of at least some thousand photos: smaller ones are repeated, and then come from the CPU's caches.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import torch
from gpu_steps.isolated import Outcome, Row, Step, run_steps

from dali_lmdb.cli import Command, interrupt_on_sigterm, print_progress, print_result
from dali_lmdb.errors import DeviceError, StoreError, one_line
from dali_lmdb.store import open_store

__all__ = ["main", "markdown", "steps_of"]

_BUDGET_S = 470  # leaves 10 s of the 8 minutes to end the last step
_CPU_TRAINING_IMAGES = 2  # of a step: with 64, some machines need more than the time limit
_SHARES = [0.0, 0.12, 0.65, 1.0]  # none, NVIDIA's floor on Hopper, DALI's default, all

_Modes = dict[str, tuple[dict[str, str], list[float], list[int]]]
# Each decode mode with the shares of the hardware engine and the numbers of threads (0: all cores) to measure.
_GPU_MODES: _Modes = {
    "image on the GPU": ({"decode": "image", "decode_device": "gpu"}, _SHARES, [8, 0]),
    "window on the GPU": ({"decode": "window", "decode_device": "gpu"}, [0.0, 0.65], [0]),
    "window on the CPU": ({"decode": "window", "decode_device": "cpu"}, [0.0], [4, 0]),
}
_CPU_MODES: _Modes = {"image on the CPU": ({"decode": "image", "decode_device": "cpu"}, [0.0], [0])}

# Tests that need a GPU: files, and patterns of files to leave out. One step each, since a crash ends its pytest.
_TESTS: dict[str, tuple[list[str], list[str]]] = {
    "decoding": (["tests/test_gpu_decoding.py"], []),
    "loading": (["tests/test_gpu.py"], []),
    "others": (["tests"], ["*/test_gpu.py", "*/test_gpu_decoding.py"]),
}


def steps_of(store: str, *, device: str, batch_size: int, seconds: float) -> list[Step]:
    """All steps, the most important ones first.

    Args:
        device: with ``"cpu"``, those that need a GPU are left out.
        batch_size: records in a batch, at most the number of records in the store; training on a CPU takes fewer.
        seconds: length of each measurement of speed.
    """
    on_gpu = device == "cuda"
    common = {"store": store, "device": device}
    sized = common | {"batch_size": batch_size}
    modes = _GPU_MODES if on_gpu else _CPU_MODES
    steps = [Step(name="versions", function="gpu_steps.card:versions", arguments={"device": device}, limit_s=30)]

    def add(name: str, function: str, arguments: dict[str, Any], limit_s: float) -> None:
        steps.append(Step(name=name, function=f"gpu_steps.{function}", arguments=arguments, limit_s=limit_s))

    for name, (mode, _, _) in modes.items():
        add(f"decoders: {name}", "decoding:route", sized | mode, 30)
    for name, (mode, _, _) in modes.items():
        add(f"pixels: {name}", "decoding:pixels", common | mode, 45)
    add("pixels: erase with float16", "decoding:erased_float16", common, 30)
    for name, (mode, shares, threads) in modes.items():
        measured = {"seconds": seconds, "shares": shares, "threads": threads}
        add(f"speed: {name}", "speed:decoding", sized | mode | measured, 80)
    add("speed: DALI's own file reader", "speed:file_reader", sized | {"seconds": seconds}, 45)
    add("bad records", "faults:bad_records", common, 45)
    if on_gpu:
        add("out of memory", "faults:out_of_memory", {"store": store, "batch_size": batch_size}, 45)
    work = (
        {"arch": "resnet50", "steps": 200, "batch_size": batch_size}
        if on_gpu
        else {"arch": "resnet18", "steps": 4, "batch_size": min(batch_size, _CPU_TRAINING_IMAGES)}
    )
    add("speed: training", "speed:training", common | work | {"seconds": 10 * seconds}, 100)
    add("speed: hand-over to DALI", "speed:handover", {"store": store, "seconds": seconds}, 30)
    add("decoders: each of nvImageCodec's alone", "decoding:backends", common, 30)
    for name, (paths, ignored) in _TESTS.items() if on_gpu else ():
        add(f"tests: {name}", "faults:tests", {"paths": paths, "ignored": ignored}, 120)
    return steps


def markdown(title: str, outcomes: Sequence[Outcome]) -> str:
    """The report as Markdown: a table of the steps, then a section for each one that was run."""
    lines = [f"# {title}", "", "| step | result | seconds | why |", "|---|---|---|---|"]
    lines += [f"| {one.name} | {one.status} | {one.elapsed_s:.1f} | {_cell(one.cause)} |" for one in outcomes]
    for one in outcomes:
        if one.rows or one.log:
            lines += ["", f"## {one.name}", "", *_table(one.rows)]
        if one.log:
            lines += ["", "```text", *one.log.replace("```", "'''").splitlines(), "```"]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not columns:
        return []
    body = ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *body]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
    return one_line(text).replace("|", "\\|")


def _write(output: str, title: str, settings: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    found = {"title": title, "settings": settings, "steps": [asdict(one) for one in outcomes]}
    for path, text in (
        (f"{output}.md", markdown(title, outcomes)),
        (f"{output}.json", json.dumps(found, indent=1) + "\n"),
    ):
        Path(f"{path}.partial").write_text(text, encoding="utf-8")
        os.replace(f"{path}.partial", path)


@click.command(cls=Command)
@click.argument("store", metavar="STORE")
@click.option("--cpu", is_flag=True, help="Run what makes sense without a GPU, to try the report itself.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Records per step, at most the record count.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="Length of each measurement of speed, in seconds.",
)
@click.option(
    "--output",
    metavar="NAME",
    default="gpu-report",
    show_default=True,
    help="Write NAME.md and NAME.json, replacing them if they exist.",
)
def main(store: str, *, cpu: bool, batch_size: int, seconds: float, output: str) -> None:
    """Report how decoding, loading and training on STORE work on this machine's GPU.

    Exit code 1 if there is no GPU, or if a step failed or found something wrong; the report is complete anyway.
    """
    if not seconds > 0:  # click lets nan pass
        raise ValueError(f"seconds is {seconds}, expected more than 0")
    if not cpu and not torch.cuda.is_available():
        raise DeviceError("no usable GPU found; install its driver, or try the report with --cpu")
    with open_store(store) as opened:
        if len(opened) == 0:
            raise StoreError(f"{store}: no records to read; convert a folder with images in it")
        batch_size = min(batch_size, len(opened))
    interrupt_on_sigterm()
    settings = {"store": store, "cpu": cpu, "batch_size": batch_size, "seconds": seconds}
    card = "no GPU" if cpu else torch.cuda.get_device_name()
    title = f"dali_lmdb on {card}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, batches of {batch_size}"
    steps = steps_of(
        os.path.abspath(store), device="cpu" if cpu else "cuda", batch_size=batch_size, seconds=seconds
    )
    done: list[Outcome] = []
    try:
        _write(output, title, settings, done)
    except OSError as error:
        raise ValueError(
            f"--output {output}: cannot be written: {error.strerror}; name a file that can"
        ) from error
    try:
        for one in run_steps(steps, budget_s=_BUDGET_S):
            done.append(one)
            why = f": {one.cause[:200]}" if one.cause else ""
            print_progress(f"{one.name}: {one.status} after {one.elapsed_s:.0f} s{why}")
            _write(output, title, settings, done)
    finally:  # also after Ctrl-C between two steps
        done += [Outcome(name=step.name, status="not run", cause="stopped") for step in steps[len(done) :]]
        _write(output, title, settings, done)
    counts = Counter(one.status for one in done)
    summary = ", ".join(f"{number} {status}" for status, number in counts.items())
    print_result(f"{output}.md, {output}.json: {len(done)} steps: {summary}")
    if counts["interrupted"]:
        raise KeyboardInterrupt
    sys.exit(0 if counts["ok"] == len(done) else 1)


if __name__ == "__main__":
    main()
