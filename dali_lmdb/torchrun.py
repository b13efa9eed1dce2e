"""Ranks as torchrun starts them: which one this process is, and how it finds the others."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dali_lmdb.errors import DaliLmdbError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # torch re-exports it without saying so

__all__ = ["JOIN_LIMIT_S", "RankEnvironment", "ignored_variables", "join"]

JOIN_LIMIT_S = 600.0
"""Time for all ranks to come; torchrun's machines wait so long for each other, too (its ``join_timeout``)."""

_QUIET_S = 3.0  # ranks that are started together have imported torch by then
_POLL_S = 0.1
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_REMEDY = f"start all ranks with torchrun, or unset {', '.join(_VARIABLES)}"


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """This process among the others; alone by default."""

    rank: int = 0
    local_rank: int = 0
    """Rank on this machine."""
    world_size: int = 1
    ranks_per_node: int = 1

    @classmethod
    def from_environment(cls) -> RankEnvironment | None:
        """What torchrun has put into RANK, LOCAL_RANK and WORLD_SIZE; None if one of them is not set.

        Raises:
            ValueError: one that is set is not such a number.
        """
        given = {name: _number(name) for name in _VARIABLES if name in os.environ}
        if len(given) < len(_VARIABLES):
            return None
        rank, local_rank, world_size = given.values()
        if "LOCAL_WORLD_SIZE" in os.environ:
            given["LOCAL_WORLD_SIZE"] = _number("LOCAL_WORLD_SIZE")
        ranks_per_node = given.get("LOCAL_WORLD_SIZE", local_rank + 1)
        if not (rank < world_size and local_rank < ranks_per_node <= world_size):
            found = ", ".join(f"{name}={number}" for name, number in given.items())
            raise ValueError(f"{found} in the environment, expected ranks from 0 to WORLD_SIZE - 1; {_REMEDY}")
        return cls(rank=rank, local_rank=local_rank, world_size=world_size, ranks_per_node=ranks_per_node)


def ignored_variables() -> str | None:
    """One line about several ranks in the environment that :meth:`from_environment` ignores; None without them."""
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
    """Wait until all ranks are there, and return a key-value store of them.

    It waits in short steps: torch's own waiting is deaf to signals.

    Args:
        say: called with one line if it has to wait, on one rank of each machine.

    Raises:
        ValueError: MASTER_ADDR or MASTER_PORT is missing or wrong.
        DaliLmdbError: they are not all there after ``JOIN_LIMIT_S``, or cannot be connected.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    patience = _Patience(ranks, say)
    try:
        store = PrefixStore(f"dali_lmdb/{_attempt()}", _connect(ranks, patience))
        if store.add(f"rank-{ranks.rank}", 1) == 1:  # not one that was stopped while it waited, and started again
            store.add("joined", 1)
        while (joined := store.add("joined", 0)) < ranks.world_size:
            patience.spend(f"{ranks.world_size} ranks, {joined} of them here")
    except RuntimeError as error:  # torch's: the port is taken, or the rank that had the store has ended
        cause = " ".join(str(error).splitlines()[0].split())
        raise DaliLmdbError(f"rank {ranks.rank}: no connection to the other ranks: {cause}; {_REMEDY}") from error
    return store


class _Patience:
    """The time that is left for all ranks to come; says once that it is being waited for them."""

    def __init__(self, ranks: RankEnvironment, say: Callable[[str], None]) -> None:
        self._say: Callable[[str], None] | None = say if ranks.local_rank == 0 else None
        self._begin = time.monotonic()

    def spend(self, whom: str) -> None:
        """Wait a moment for ``whom``."""
        waited_s = time.monotonic() - self._begin
        if waited_s > JOIN_LIMIT_S:
            raise DaliLmdbError(f"gave up waiting for {whom}, after {JOIN_LIMIT_S / 60:g} minutes; {_REMEDY}")
        if self._say is not None and waited_s > _QUIET_S:
            self._say(f"waiting for {whom}; at most {JOIN_LIMIT_S / 60:g} minutes")
            self._say = None
        time.sleep(_POLL_S)


def _connect(ranks: RankEnvironment, patience: _Patience) -> Store:
    """Connect to the store of torchrun's agent, or to that of rank 0, which makes it."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)} in the environment of rank {ranks.rank}; {_REMEDY}")
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    if not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT={port} in the environment, expected 1 to 65535; {_REMEDY}")
    makes_it = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not (makes_it or _answers(host, port)):
        patience.spend(f"{ranks.world_size} ranks: nobody answers at {host}:{port} yet")
    found: list[Store | Exception] = []

    def connect() -> None:
        try:
            found.append(TCPStore(host, port, is_master=makes_it, wait_for_workers=False, multi_tenant=True))
        except Exception as error:
            found.append(error)

    # Whoever answers may be no store and never say a word. A thread that still waits then ends with the process.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    while thread.is_alive():
        patience.spend(f"{ranks.world_size} ranks: no store answers at {host}:{port} yet")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _attempt() -> str:
    """A name for this start of the ranks, where torchrun's store may know an earlier one.

    torchrun keeps its store over a restart, so new ranks would read the addresses of dead ones (pytorch issue
    135712). Its count of restarts tells them apart, but is the same everywhere on one machine only; on several,
    ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` makes torchrun begin with a new store.
    """
    on_one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if on_one_machine else "0"
