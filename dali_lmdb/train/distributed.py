"""Ranks: their devices, how they are connected, and how they are started and ended.

Under torchrun the environment identifies the rank. Without it, :func:`launch` starts the ranks through torchrun's
own elastic launcher, so a rank cannot tell the difference.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dali_lmdb import errors
from dali_lmdb.errors import DaliLmdbError, DeviceError
from dali_lmdb.threads import threads_per_rank
from dali_lmdb.torchrun import RankEnvironment, join

__all__ = ["LAUNCHER_PID", "RankFailedError", "find_device", "launch", "process_group", "run_rank"]

_log = logging.getLogger(__name__)

_TIMEOUT = timedelta(minutes=30)  # for a collective; torch's default for gloo

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
    if ranks_per_node > num_gpus:
        # NCCL refuses two ranks on one GPU.
        raise DeviceError(
            f"{ranks_per_node} ranks on a machine with {num_gpus} GPU(s), each needs its own; "
            f"use --world-size {num_gpus} (torchrun: --nproc-per-node {num_gpus}) or --device cpu"
        )
    return torch.device("cuda", local_rank)


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
    store.set_timeout(_TIMEOUT)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=_TIMEOUT)
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
    except DaliLmdbError as error:
        _end_process(1, f"Error: {error}\n" if show_errors else "")
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

    If one dies, the others are stopped too.

    Raises:
        DaliLmdbError: the first rank to die raised this error.
        RankFailedError: the first rank to die died in another way.
        KeyboardInterrupt, SystemExit: this process was interrupted or terminated, and has stopped the ranks.
    """
    os.environ[LAUNCHER_PID] = str(os.getpid())  # the ranks inherit it, and end when this process does
    with tempfile.TemporaryDirectory(prefix="dali_lmdb_ranks_") as folder, _quiet_launcher(), _own_signals():
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
        try:
            elastic_launch(config, sys.executable)("-u", *escaped)
        except ChildFailedError as error:
            raise _explain(error.failures) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None


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


@contextmanager
def _own_signals() -> Iterator[None]:
    """Restore the caller's signal handlers; the launcher leaves its own in place."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, DaliLmdbError):
        return known(f"rank {rank}: {text}")
    details = f"rank {rank}:\n{message['extraInfo']['py_callstack']}"
    return RankFailedError(f"rank {rank} failed: {message['message']}", details=details)


def _time_of_death(failure: ProcessFailure) -> tuple[int, int]:
    """Sort key: signals, then errors by the time they were written, then ranks that the launcher stopped.

    A signal leaves no time, but comes first: if it killed one rank, the errors of the others follow from that.
    """
    if failure.exitcode == -signal.SIGTERM:
        return (2, 0)
    if failure.exitcode < 0:
        return (0, 0)
    if os.path.isfile(failure.error_file):
        return (1, os.stat(failure.error_file).st_mtime_ns)
    return (1, 0)
