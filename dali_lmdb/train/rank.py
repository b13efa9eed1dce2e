"""One rank, started by the command; not meant to be run by hand.

``python -m dali_lmdb.train.rank '{"train": …}'`` reads its settings as JSON; they are already validated.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, TextIO

from dali_lmdb.errors import one_line
from dali_lmdb.train.distributed import LAUNCHER_PID, run_rank
from dali_lmdb.train.progress import ERASE, STEPS, TerminalLine, is_terminal
from dali_lmdb.train.settings import TrainSettings
from dali_lmdb.train.trainer import train

__all__ = ["run_started", "show_progress"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def show_progress(*, rank: int, stream: TextIO | None = None) -> TerminalLine | None:
    """Print what is logged to ``stream``, by default stdout; on other ranks than 0, warnings only.

    Returns:
        The progress line, if this is rank 0 and stderr is a terminal; where the stream is one too, it replaces the
        reports of steps.
    """
    stream = sys.stdout if stream is None else stream
    logger = logging.getLogger("dali_lmdb")
    has_line = is_terminal(sys.stderr)
    logger.addHandler(_Printer(stream, erases=has_line and stream.isatty()))
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if not has_line or rank != 0:
        return None
    if stream.isatty():
        logging.getLogger(STEPS).setLevel(logging.WARNING)
    line = TerminalLine(sys.stderr)
    show_warning = warnings.showwarning

    def show(*arguments: Any, **options: Any) -> None:
        line.erase()
        show_warning(*arguments, **options)

    warnings.showwarning = show
    return line


class _Printer(logging.StreamHandler[TextIO]):
    """Prints each message on one line; a failed write ends the printing, not the run.

    Args:
        erases: erase the progress line first, which may be another rank's.
    """

    def __init__(self, stream: TextIO, *, erases: bool) -> None:
        super().__init__(stream)
        self._before = ERASE if erases else ""

    def format(self, record: logging.LogRecord) -> str:
        return self._before + one_line(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logging.getLogger("dali_lmdb").removeHandler(self)
        with contextlib.suppress(OSError):
            # Python would retry at exit, and then exit with code 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            print(f"standard output: cannot be written: {error.strerror}; training continues", file=sys.stderr)


def _end_with_launcher() -> None:
    """Make the kernel kill this rank when the process that started it ends, in whatever way."""
    # A launcher that is killed by SIGKILL cannot stop its ranks; they would continue and overwrite the checkpoint
    # of the next run. See PR_SET_PDEATHSIG in prctl(2).
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # If the launcher ended before that call, no signal comes.
    if os.getppid() != int(os.environ[LAUNCHER_PID]):
        os.kill(os.getpid(), signal.SIGKILL)


def run_started(function: Callable[[], object]) -> None:
    """Run ``function`` as a rank that :func:`~dali_lmdb.train.distributed.launch` has started."""
    _end_with_launcher()
    run_rank(function, show_errors=False)


def _train() -> None:
    line = show_progress(rank=int(os.environ["RANK"]))
    train(TrainSettings(**json.loads(sys.argv[1])), line=line)


if __name__ == "__main__":
    run_started(_train)
