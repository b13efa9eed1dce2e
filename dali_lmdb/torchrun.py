"""Ranks as torchrun, Open MPI or SLURM start them: which one this process is, and how it meets the others."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dali_lmdb.errors import DaliLmdbError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # torch re-exports it without saying so

__all__ = [
    "JOIN_LIMIT_S",
    "RankEnvironment",
    "first_host",
    "ignored_variables",
    "incomplete_launcher",
    "join",
    "sees_own_gpus",
]

JOIN_LIMIT_S = 600.0
"""Time limit for all ranks to join: as long as torchrun waits for the other machines (its ``join_timeout``)."""

_QUIET_S = 3.0  # no message before: ranks that were started together take about that long to import torch
_POLL_S = 0.1
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_LAUNCHERS = {
    "torchrun": (*_VARIABLES, "LOCAL_WORLD_SIZE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", ""),
}
"""Each launcher's variables of rank, rank on this machine, number of ranks and of those on this machine."""

_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
_REMEDY = f"start all ranks with torchrun, or unset {', '.join(_VARIABLES)}"


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """The rank of this process, and how many ranks there are; by default it is the only one."""

    rank: int = 0
    local_rank: int = 0
    """Rank on this machine."""
    world_size: int = 1
    ranks_per_node: int = 1

    @classmethod
    def from_environment(cls) -> RankEnvironment | None:
        """Read what torchrun, Open MPI's mpirun or SLURM's srun sets; None if none has set all it should.

        A single task of srun or mpirun is no rank: it may start ranks itself.

        Raises:
            ValueError: a variable is not a number, or out of range.
        """
        launcher = _launcher()
        if launcher is None:
            return None
        *variables, per_node = _LAUNCHERS[launcher]
        given = {name: _number(name) for name in variables}
        rank, local_rank, world_size = given.values()
        if launcher != "torchrun" and world_size == 1:
            return None
        if per_node in os.environ:
            given[per_node] = _number(per_node)
        ranks_per_node = given.get(per_node, local_rank + 1)
        if launcher == "srun":
            ranks_per_node = _tasks_on_this_node() or ranks_per_node
        if not (rank < world_size and local_rank < ranks_per_node <= world_size):
            found = ", ".join(f"{name}={number}" for name, number in given.items())
            raise ValueError(f"{found} in the environment, expected ranks from 0 to WORLD_SIZE - 1; {_REMEDY}")
        return cls(rank=rank, local_rank=local_rank, world_size=world_size, ranks_per_node=ranks_per_node)


def _launcher() -> str | None:
    """The launcher that has set all variables of a rank."""
    for launcher, (*variables, _) in _LAUNCHERS.items():
        # A batch script is SLURM's first task, too, but a step of srun is what makes ranks.
        is_script = launcher == "srun" and _is_batch_script()
        if all(name in os.environ for name in variables) and not is_script:
            return launcher
    return None


def _is_batch_script() -> bool:
    return os.environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in os.environ


def _tasks_on_this_node() -> int | None:
    """SLURM's number of this step's tasks on this node, from a list such as ``4(x2),3``."""
    counts: list[int] = []
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE") or ""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID") or 0)
    return counts[node] if node < len(counts) else None


def sees_own_gpus() -> bool:
    """Whether SLURM shows each rank no GPU but its own (``--gpus-per-task 1``)."""
    return _launcher() == "srun" and os.environ.get("SLURM_GPUS_PER_TASK", "").endswith("1")


def incomplete_launcher() -> str | None:
    """Describe, in one line, a launcher of several ranks of which this process is none; None without one."""
    if _launcher() is not None:
        return None
    for launcher, (*variables, _) in _LAUNCHERS.items():
        size = variables[-1]
        missing = [name for name in variables if name not in os.environ]
        if os.environ.get(size, "1") == "1" or not (missing or launcher == "srun"):
            continue
        why = f"{' and '.join(missing)} not set" if missing else "this is the batch script, not a step of srun"
        return (
            f"{size}={os.environ[size]} in the environment, but {why}; start the ranks with {launcher}, or unset "
            f"{size} to start them from here with --world-size"
        )
    return None


def ignored_variables() -> str | None:
    """Describe, in one line, a WORLD_SIZE above 1 that ``from_environment`` ignores; None if there is none."""
    missing = [name for name in _VARIABLES if name not in os.environ]
    world_size = os.environ.get("WORLD_SIZE", "1")
    if not missing or world_size == "1":
        return None
    return f"WORLD_SIZE={world_size} in the environment is ignored without {' and '.join(missing)}"


def _number(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name}={text!r} in the environment, expected a whole number; {_REMEDY}")
    return int(text)


def join(ranks: RankEnvironment, *, say: Callable[[str], None]) -> Store:
    """Wait until all ranks have joined, and return the key-value store that they share.

    Polls, since signals do not interrupt torch's own waiting.

    Args:
        say: called with one line if it has to wait, on one rank of each machine.

    Raises:
        ValueError: MASTER_ADDR or MASTER_PORT is missing or wrong.
        DaliLmdbError: not all ranks have joined after ``JOIN_LIMIT_S``, or they cannot be connected.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    waiting = _Waiting(ranks, say)
    try:
        store = PrefixStore(f"dali_lmdb/{_attempt()}", _connect(ranks, waiting))
        if store.add(f"rank-{ranks.rank}", 1) == 1:  # 2 if this rank was stopped while waiting, then restarted
            store.add("joined", 1)
        while (joined := store.add("joined", 0)) < ranks.world_size:
            waiting.pause(f"{ranks.world_size} ranks ({joined} joined)")
    except RuntimeError as error:  # torch's: the port is taken, or the rank that hosts the store has ended
        cause = " ".join(str(error).splitlines()[0].split())
        raise DaliLmdbError(f"rank {ranks.rank}: no connection to the other ranks: {cause}; {_REMEDY}") from error
    return store


class _Waiting:
    """Waits for at most ``JOIN_LIMIT_S`` in total, and reports once that it is waiting."""

    def __init__(self, ranks: RankEnvironment, say: Callable[[str], None]) -> None:
        self._say: Callable[[str], None] | None = say if ranks.local_rank == 0 else None
        self._begin = time.monotonic()

    def pause(self, whom: str) -> None:
        """Sleep briefly.

        Args:
            whom: who has not joined yet, for messages.

        Raises:
            DaliLmdbError: the time is up.
        """
        waited_s = time.monotonic() - self._begin
        if waited_s > JOIN_LIMIT_S:
            raise DaliLmdbError(f"gave up waiting for {whom}, after {JOIN_LIMIT_S / 60:g} minutes; {_REMEDY}")
        if self._say is not None and waited_s > _QUIET_S:
            self._say(f"waiting for {whom}; at most {JOIN_LIMIT_S / 60:g} minutes")
            self._say = None
        time.sleep(_POLL_S)


def _connect(ranks: RankEnvironment, waiting: _Waiting) -> Store:
    """Connect to the key-value store, which torchrun's agent hosts or else rank 0."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = _meeting_point(ranks)
    if not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT={port} in the environment, expected 1 to 65535; {_REMEDY}")
    is_host = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not (is_host or _answers(host, port)):
        waiting.pause(f"{ranks.world_size} ranks: nothing listens at {host}:{port} yet")
    store: Future[Store] = Future()

    def connect() -> None:
        try:
            store.set_result(TCPStore(host, port, is_master=is_host, wait_for_workers=False, multi_tenant=True))
        except Exception as error:
            store.set_exception(error)

    # A daemon thread, which ends with the process: something else may listen at the port and never reply.
    threading.Thread(target=connect, daemon=True).start()
    while not store.done():
        waiting.pause(f"{ranks.world_size} ranks: no key-value store answers at {host}:{port} yet")
    return store.result()


def _meeting_point(ranks: RankEnvironment) -> tuple[str, int]:
    """Host and port of rank 0: MASTER_ADDR and MASTER_PORT, or what the launcher says otherwise."""
    launcher, host = _launcher(), os.environ.get("MASTER_ADDR") or None
    port = _number("MASTER_PORT") if os.environ.get("MASTER_PORT") else None
    if launcher == "srun":
        host = host or first_host(next((os.environ[name] for name in _NODE_LISTS if os.environ.get(name)), ""))
        # The same for all tasks of a step; below Linux's range of ports for outgoing connections.
        job, step = (int(os.environ.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = port or 15_000 + (job * 7 + step) % 15_000
    elif launcher == "mpirun" and ranks.ranks_per_node == ranks.world_size:
        host = host or "127.0.0.1"
        port = port or 15_000 + os.getppid() % 15_000  # mpirun's process
    given = {"MASTER_ADDR": host, "MASTER_PORT": port}
    missing = [name for name, value in given.items() if not value]
    if host is None or port is None or missing:
        raise ValueError(f"no {' and no '.join(missing)} in the environment of rank {ranks.rank}; {_REMEDY}")
    return host, port


def first_host(nodes: str) -> str | None:
    """The first host of a SLURM node list: ``node003`` of ``node[003-010,12],gpu1``; None of an empty list."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return None if first is None else re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _attempt() -> str:
    """torchrun's count of restarts, to keep this start's keys apart from those of earlier ones.

    torchrun keeps its key-value store over a restart, so new ranks would read the addresses of dead ones (pytorch
    issue 135712). The count is the same for all ranks only on a single machine; on several,
    ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` makes torchrun begin with a new store.
    """
    on_one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if on_one_machine else "0"
