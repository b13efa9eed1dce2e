"""Run the steps of a report, each in its own process with a time limit: a crash or a hang costs only its own step.

A step is a generator function. Each row that it yields is saved at once, so what was found before a crash is kept.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Outcome", "Row", "Status", "Step", "run_step", "run_steps"]

Row = dict[str, Any]
"""Plain values by column. The key ``wrong`` says what is not as it should be."""

Status = Literal["ok", "wrong", "failed", "crashed", "timed out", "interrupted", "not run"]

_LOG_BYTES = 4000  # kept of the end of a step's output: enough for a traceback of every thread
_EXIT_S = 5  # for a process that hangs to print its traceback and end
_ORPHAN_S = 30  # after this much more than its limit, a step whose report was killed ends itself


@dataclass(frozen=True, kw_only=True)
class Step:
    """What to run."""

    name: str
    function: str
    """``module:function``, a generator function of rows."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments, as plain values."""
    limit_s: float
    """Time after which it is ended, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a step.

    The status is ``"wrong"`` if the step ran and one of its rows says that something is not as it should be,
    ``"failed"`` if it raised an exception, ``"crashed"`` if a signal ended its process.
    """

    name: str
    status: Status
    cause: str = ""
    """Why the status is not ``"ok"``, in one line."""
    elapsed_s: float = 0.0
    rows: list[Row] = field(default_factory=list)
    log: str = ""
    """The end of the step's output; empty if the status is ``"ok"`` or ``"wrong"``."""


def run_steps(steps: Iterable[Step], *, budget_s: float) -> Iterator[Outcome]:
    """Run steps one after the other and give their outcomes; those for which no time is left are not run.

    Ctrl-C ends the step that is running; its outcome is the last one.

    Args:
        budget_s: time for all of them, in seconds.
    """
    end = time.monotonic() + budget_s
    for step in steps:
        left_s = end - time.monotonic()
        if left_s > 0:
            outcome = run_step(step, limit_s=min(step.limit_s, left_s))
        else:
            outcome = Outcome(name=step.name, status="not run", cause=f"the {budget_s:g} s are used up")
        yield outcome
        if outcome.status == "interrupted":
            return


def run_step(step: Step, *, limit_s: float | None = None) -> Outcome:
    """Run one step in a process of its own and end all processes that it leaves behind.

    Args:
        limit_s: a shorter limit than the step's own.
    """
    limit_s = step.limit_s if limit_s is None else limit_s
    with tempfile.TemporaryDirectory(prefix="gpu_report-") as folder:
        rows, log = Path(folder, "rows"), Path(folder, "log")
        command = [sys.executable, "-X", "faulthandler", "-m", __name__, str(rows), str(int(limit_s) + _ORPHAN_S)]
        begin = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, step.function, json.dumps(step.arguments)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the report only, and the step's whole group can be killed
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        ended = _wait(process, limit_s)
        elapsed_s = time.monotonic() - begin
        found, error = _read(rows)
        status, cause = _verdict(ended, found, error)
        tail = log.read_bytes()[-_LOG_BYTES:].decode(errors="replace") if status not in ("ok", "wrong") else ""
    return Outcome(name=step.name, status=status, cause=cause, elapsed_s=elapsed_s, rows=found, log=tail)


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> int | str:
    """The exit code, or why the process was ended."""
    try:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler prints where every thread is
            process.wait(_EXIT_S)
            return f"still running after {limit_s:.0f} s"
    except subprocess.TimeoutExpired:
        return f"still running after {limit_s:.0f} s, and SIGABRT did not end it"
    except KeyboardInterrupt:
        return "Ctrl-C"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait(_EXIT_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass  # gone, or stuck in the driver, where no signal reaches it


def _read(path: Path) -> tuple[list[Row], str | None]:
    """The rows of a step, and its exception on one line: empty if it raised none, None if it did not finish."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    read = [json.loads(line) for line in lines if line.endswith("\n")]
    rows = [line["row"] for line in read if "row" in line]
    return rows, next((line["error"] for line in read if "error" in line), None)


def _verdict(ended: int | str, rows: list[Row], error: str | None) -> tuple[Status, str]:
    """Status and cause, from how the process ended and what it wrote."""
    if isinstance(ended, str):
        return ("interrupted" if ended == "Ctrl-C" else "timed out"), ended
    if ended < 0:
        return "crashed", signal.Signals(-ended).name + (" after its last row" if error == "" else "")
    if error or ended:
        return "failed", error or f"exit code {ended}"
    wrong = [row["wrong"] for row in rows if row.get("wrong")]
    return ("wrong", "; ".join(wrong)) if wrong else ("ok", "")


def _main(path: str, limit_s: str, function: str, arguments: str) -> None:
    """Run a step in this process: a line of JSON for each row, then one for its exception, empty without one."""
    signal.alarm(int(limit_s))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module, _, name = function.partition(":")
    with open(path, "w", encoding="utf-8", buffering=1) as file:
        try:
            for row in getattr(importlib.import_module(module), name)(**json.loads(arguments)):
                file.write(json.dumps({"row": row}) + "\n")
        except Exception as error:
            traceback.print_exc()
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            file.write(json.dumps({"error": what}) + "\n")
            sys.exit(1)
        file.write(json.dumps({"error": ""}) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
