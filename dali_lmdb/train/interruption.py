"""Interruptions: signals that end a run after the step in progress, at the same step on all ranks.

The first SIGTERM, SIGUSR1, SIGHUP or Ctrl-C of any rank only sets a flag. Every other step the ranks combine their
flags with an all-reduce of one integer on the CPU, over a gloo group of its own. It runs in the background; its
result is read two steps later, when it has long arrived. So a step neither waits for the GPU nor, measurably, for
another rank, and the ranks stop together at most four steps after the signal.

One signal may come several times: SLURM sends it to all processes of a job, launchers pass it on, and coreutils'
``timeout`` sends it to its command and to the command's group.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

__all__ = ["EXIT_CODE", "SAME_SIGNAL_S", "SIGNALS", "Interrupted", "Interruption", "end"]

EXIT_CODE = 85
"""Exit code of an interrupted run: start it again with ``--resume``. Neither shells nor signals use it."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
"""SIGUSR1 is what SLURM's ``--signal`` is usually told to send before a job's end."""

SAME_SIGNAL_S = 1.0
"""Signals that come so soon after the first one are the same one."""

_EVERY = 2  # steps between two all-reduces

_Handlers = dict[signal.Signals, Any]


class Interrupted(Exception):
    """All ranks have agreed to stop after this step, for the signal ``number``."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def end(number: int) -> NoReturn:
    """Raise KeyboardInterrupt for Ctrl-C, SystemExit with ``EXIT_CODE`` for other signals."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(EXIT_CODE)


class Interruption:
    """Receives the signals of one rank while entered, and agrees on them with the other ranks.

    Until :meth:`begin` signals do what they did before: the process may be waiting, in C, for a rank that has
    failed. Afterwards the first one waits for :meth:`check`, and one that comes ``SAME_SIGNAL_S`` later ends the
    process at once. Only the main thread of a process can receive signals.
    """

    def __init__(self) -> None:
        self._number = 0
        self._before: _Handlers = {}
        self._group: Any = None
        self._step = 0
        self._flag = torch.zeros((), dtype=torch.int64)
        self._work: dist.Work | None = None

    def __enter__(self) -> Interruption:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            os.close(signal.set_wakeup_fd(-1))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number

    def begin(self, *, world_size: int, timeout: timedelta) -> None:
        """Let steps finish from now on; a collective."""
        if world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            for number, handler in self._before.items():
                if handler is not signal.SIG_IGN:  # as nohup does with SIGHUP
                    signal.signal(number, self._receive)
            arrivals, wakeup = os.pipe()
            os.set_blocking(wakeup, False)
            signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
            threading.Thread(target=_end_at_second_signal, args=(arrivals,), daemon=True).start()

    def check(self) -> None:
        """Call after each step, equally often on all ranks.

        Raises:
            Interrupted: on all ranks after the same step.
        """
        if self._group is None:
            if self._number:
                raise Interrupted(self._number)
            return
        self._step += 1
        if self._step % _EVERY:
            return
        self._wait()
        if agreed := int(self._flag):
            raise Interrupted(agreed)
        self._flag = torch.tensor(self._number)
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def finish(self) -> None:
        """Wait until all ranks have come here, after :meth:`Interrupted` or the last step; a collective."""
        self._wait()
        if self._group is not None:
            dist.barrier(group=self._group)

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None


def _end_at_second_signal(arrivals: int) -> None:
    """End the process at a second signal, even if its main thread hangs in C and runs no handler.

    Args:
        arrivals: the pipe into which Python writes the number of each signal that comes.
    """
    first_at = None
    with open(arrivals, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] not in SIGNALS:
                continue
            if first_at is None:
                first_at = time.monotonic()
            elif time.monotonic() - first_at > SAME_SIGNAL_S:
                os._exit(128 + number[0])
