"""Ranks: their devices, how they are connected, and how they are started and ended.

Under torchrun the environment identifies the rank. Without it, :func:`launch` starts the ranks through torchrun's
own elastic launcher, so a rank cannot tell the difference.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dali_lmdb import errors
from dali_lmdb.errors import DaliLmdbError, DeviceError, DivergedError
from dali_lmdb.threads import threads_per_rank
from dali_lmdb.torchrun import RankEnvironment, join, sees_own_gpus
from dali_lmdb.train import interruption

__all__ = [
    "LAUNCHER_PID",
    "TIMEOUT",
    "RankFailedError",
    "find_device",
    "launch",
    "memory_errors",
    "process_group",
    "run_rank",
]

_log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)  # for a collective; torch's default for gloo; a rank that dies is noticed at once

_POLL_S = 0.05  # between two looks for signals and ranks; the launcher itself looks every 0.1 s

_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)

LAUNCHER_PID = "DALI_LMDB_LAUNCHER_PID"
"""Environment variable through which ranks learn the process id of :func:`launch`."""


def find_device(name: str, *, local_rank: int, ranks_per_node: int) -> torch.device:
    """Choose the device of a rank: ``"cuda"``, ``"cpu"``, or ``"auto"`` for GPUs if there are any.

    Raises:
        DeviceError: GPUs were requested and there are none, or fewer than this machine has ranks.
    """
    num_gpus = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if num_gpus == 0:
        raise DeviceError("--device cuda: no GPU found; use --device cpu, or check the driver (nvidia-smi)")
    if num_gpus == 1 and sees_own_gpus():
        return torch.device("cuda", 0)
    if ranks_per_node > num_gpus:
        # NCCL refuses two ranks on one GPU.
        raise DeviceError(
            f"{ranks_per_node} ranks on a machine with {num_gpus} GPU(s), each needs its own; "
            f"use --world-size {num_gpus} (torchrun: --nproc-per-node {num_gpus}) or --device cpu"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def memory_errors(
    *, batch_size: int, then: str = ", and --accumulate for as many records in a step"
) -> Iterator[None]:
    """Turn torch's lack of memory, on a GPU or the CPU, into one line that names ``--batch-size``.

    Args:
        then: what else to do, as the end of a sentence.

    Raises:
        DeviceError: there was too little memory.
    """
    try:
        yield
    except RuntimeError as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if not on_gpu and "DefaultCPUAllocator" not in str(error):
            raise
        tried = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        cause = f" ({tried[0].lower()})" if tried else ""
        raise DeviceError(
            f"--batch-size {batch_size}: {'the GPU' if on_gpu else 'this machine'} has too little memory{cause}; "
            f"use a smaller one{then}"
        ) from error


@contextmanager
def process_group(ranks: RankEnvironment, *, device: torch.device) -> Iterator[None]:
    """Connect the ranks, with NCCL on GPUs and gloo on CPUs, and set this rank's device and number of threads.

    A process group that the caller has already initialised is used as it is.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ and ranks.ranks_per_node > 1:
        # Otherwise every rank would use all cores and slow the others down.
        torch.set_num_threads(threads_per_rank(ranks.ranks_per_node))
    if ranks.world_size == 1 or dist.is_initialized():
        yield
        return
    store = join(ranks, say=_log.warning)
    store.set_timeout(TIMEOUT)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=TIMEOUT)
    yield
    # Only after success: if a rank has failed, this must not wait for the others.
    dist.destroy_process_group()


class RankFailedError(Exception):
    """A rank died from a bug, a signal or a library's error.

    Attributes:
        details: its traceback.
        crashed: its number if it was killed by a signal that tells of a fault in native code, else None.
    """

    def __init__(self, message: str, *, details: str, crashed: int | None = None) -> None:
        super().__init__(message)
        self.details, self.crashed = details, crashed


def run_rank(function: Callable[[], object], *, show_errors: bool) -> None:
    """Run one rank of several; if it fails, end the process at once, so that the launcher stops the others.

    Args:
        show_errors: print the error; not needed if :func:`launch` reads it from the error file.
    """
    try:
        record(function)()
    except KeyboardInterrupt:
        _end_process(128 + signal.SIGINT)
    except SystemExit as end:
        _end_process(end.code if isinstance(end.code, int) else 1)
    except DaliLmdbError as error:
        # All ranks know that a loss is not finite; one says so.
        is_said = isinstance(error, DivergedError) and int(os.environ.get("RANK", "0")) > 0
        _end_process(1, f"Error: {error}\n" if show_errors and not is_said else "")
    except Exception:
        _end_process(1, traceback.format_exc() if show_errors else "")


def _end_process(code: int, message: str = "") -> NoReturn:
    # A normal exit would first wait for decoder threads, worker processes and NCCL, which may be waiting for ranks
    # that wait for this one. An error in printing must not prevent the exit either.
    with contextlib.suppress(Exception):
        sys.stderr.write(message)
        sys.stderr.flush()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(code)


def launch(arguments: Sequence[str], *, world_size: int) -> None:
    """Run ``python arguments...`` as ``world_size`` ranks on this machine, until all have ended.

    If one dies, the others are stopped too. The first SIGTERM, SIGUSR1, SIGHUP or Ctrl-C is passed on to the
    ranks, which decide how they end; the second one kills them.

    Raises:
        DaliLmdbError: the first rank to die raised this error.
        RankFailedError: the first rank to die died in another way.
        KeyboardInterrupt, SystemExit: the ranks were interrupted, through this process or directly.
    """
    os.environ[LAUNCHER_PID] = str(os.getpid())  # the ranks inherit it, and end when this process does
    with (
        tempfile.TemporaryDirectory(prefix="dali_lmdb_ranks_") as folder,
        _quiet_launcher(),
        _Signals() as signals,
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any free port
            local_addr="localhost",  # not this machine's name, which may not resolve
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        # The launcher expands $names in arguments.
        escaped = [argument.replace("$", "$$") for argument in arguments]
        # In a thread it leaves signals alone; in the main thread it would kill the ranks 30 s after one.
        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(elastic_launch(config, sys.executable), "-u", *escaped)
            signals.pass_on(until=done)
        try:
            done.result()
        except ChildFailedError as error:
            signals.end_if_interrupted(error.failures.values())
            raise _explain(error.failures) from None


class _Signals:
    """Receives the launcher's signals while entered, and passes them on to the ranks."""

    def __init__(self) -> None:
        self._received: list[int] = []
        self._first_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
            for number, handler in self._before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            self._first_at = now
        if not self._received or now - self._first_at > interruption.SAME_SIGNAL_S:
            self._received.append(number)

    def pass_on(self, *, until: Future[Any]) -> None:
        """Wait until the launcher is done; a rank that starts later receives an earlier signal, too."""
        told: set[tuple[int, int]] = set()
        while not until.done():
            for count, number in enumerate(self._received[:2]):
                for rank in _rank_processes() - {pid for pid, at in told if at == count}:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rank, number if count == 0 else signal.SIGKILL)
                    told.add((rank, count))
            time.sleep(_POLL_S)

    def end_if_interrupted(self, failures: Iterable[ProcessFailure]) -> None:
        """Raise KeyboardInterrupt or SystemExit if the ranks have ended because of a signal to end."""
        if len(self._received) > 1:
            if self._received[1] == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + self._received[1])
        codes = {failure.exitcode for failure in failures}
        if interruption.EXIT_CODE in codes:
            raise SystemExit(interruption.EXIT_CODE)
        if 128 + signal.SIGINT in codes:
            raise KeyboardInterrupt
        if self._received and codes <= {-number for number in interruption.SIGNALS}:
            interruption.end(self._received[0])  # it came while they were starting


def _rank_processes() -> set[int]:
    """Process ids of the ranks that this process has started."""
    ranks = set()
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                with contextlib.suppress(OSError):
                    if b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                        ranks.add(int(pid))
    return ranks


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Silence the launcher's own log, unless LOGLEVEL is set: we report what happened."""
    before = logging.root.manager.disable
    if "LOGLEVEL" not in os.environ:
        logging.disable()
    try:
        yield
    finally:
        logging.disable(before)


def _explain(failures: dict[int, ProcessFailure]) -> Exception:
    """The error of the rank that died first."""
    order = sorted(failures, key=lambda rank: _time_of_death(failures[rank]))
    rank, failure = order[0], failures[order[0]]
    if failure.exitcode < 0:
        reason = f"killed by {failure.signal_name()}"
        if failure.exitcode == -signal.SIGKILL:
            reason += ", perhaps for lack of memory"
        crashed = rank if -failure.exitcode in _CRASHES else None
        return RankFailedError(f"rank {rank} was {reason}", details="", crashed=crashed)
    if not os.path.isfile(failure.error_file):
        return RankFailedError(f"rank {rank} ended with exit code {failure.exitcode}", details="")
    message = failure.error_file_data["message"]
    kind, _, text = message["message"].partition(": ")
    if _is_ours(failure):
        error: Exception = getattr(errors, kind)(f"rank {rank}: {text}")
        return error
    details = f"rank {rank}:\n{message['extraInfo']['py_callstack']}"
    return RankFailedError(f"rank {rank} failed: {message['message']}", details=details)


def _time_of_death(failure: ProcessFailure) -> tuple[int, int]:
    """Sort key: signals, then errors by the time they were written, then ranks that the launcher stopped.

    A signal leaves no time, but comes first: if it killed one rank, the errors of the others follow from that. Not
    so with SIGKILL and an error of ours: the launcher kills ranks that wait for the one that failed.
    """
    if failure.exitcode == -signal.SIGTERM:
        return (4, 0)
    if failure.exitcode < 0:
        return (2 if failure.exitcode == -signal.SIGKILL else 0, 0)
    if not os.path.isfile(failure.error_file):
        return (3, 0)
    return (1 if _is_ours(failure) else 3, os.stat(failure.error_file).st_mtime_ns)


def _is_ours(failure: ProcessFailure) -> bool:
    kind = failure.error_file_data["message"]["message"].partition(": ")[0]
    known = getattr(errors, kind, None)
    return isinstance(known, type) and issubclass(known, DaliLmdbError)
