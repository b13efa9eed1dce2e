"""Ask about a library or a store in a process of its own: drivers and disks hang, and native code crashes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from dali_lmdb.errors import one_line

__all__ = ["TIMEOUT_S", "Reply", "ask"]

TIMEOUT_S = 120
"""Importing torch from a cold network disk may take a minute."""
_END_S = 5  # a process that waits inside the driver does not end when it is killed

# sys.path comes as arguments, so that the process finds this very package.
_BOOT = "import sys; sys.path[:] = sys.argv[4:]; from dali_lmdb.doctor.probe import main; main(*sys.argv[1:4])"


class Reply(NamedTuple):
    """The answer about a library or a store."""

    value: Any
    """What ``probe.py`` says; None if it failed."""
    cause: str = ""
    """Why it failed, in one line."""


def ask(
    names: Sequence[str], *, store: str | os.PathLike[str] = "", timeout_s: float = TIMEOUT_S
) -> dict[str, Reply]:
    """Run some of ``probe.PROBES``, each in a process of its own, at the same time.

    Args:
        store: what is asked about, if it is a store.
        timeout_s: for all together.
    """
    end = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as started:
        processes = {name: _start(name, folder, os.fspath(store), started) for name in names}
        return {
            name: _answer(name, folder, process, end=end, timeout_s=timeout_s)
            for name, process in processes.items()
        }


def _start(name: str, folder: str, store: str, started: contextlib.ExitStack) -> subprocess.Popen[bytes]:
    with open(os.path.join(folder, f"{name}.log"), "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, name, os.path.join(folder, name), store, *sys.path],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a terminal's Ctrl-C is for the parent, which then ends this process
        )
    started.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)


def _answer(name: str, folder: str, process: subprocess.Popen[bytes], *, end: float, timeout_s: float) -> Reply:
    try:
        code = process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return Reply(None, f"did not answer within {timeout_s:g} s")
    if code == 0:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return Reply(json.load(file))
    if code < 0:
        return Reply(None, f"crashed: {signal.Signals(-code).name}")
    with open(os.path.join(folder, f"{name}.log"), encoding="utf-8", errors="replace") as file:
        lines = file.read().strip().splitlines()
    return Reply(None, one_line(lines[-1]) if lines else f"ended with exit code {code}")
