"""The processes that share a conversion: one under plain Python, several under torchrun."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from dali_lmdb.errors import ConversionError
from dali_lmdb.torchrun import RankEnvironment, join

__all__ = ["RankLostError", "Ranks", "torchrun_ranks"]

T = TypeVar("T")

_CONNECT_TIMEOUT = timedelta(minutes=1)  # after all ranks have joined
_AGREE_TIMEOUT = timedelta(days=365)  # one rank may finish hours before another
_POLL_S = 0.1


class RankLostError(ConversionError):
    """Another rank ended before all were done."""


class Ranks:
    """The processes that share a conversion; this base class is the case of a single process.

    Attributes:
        rank, world_size: as in torch.distributed.
    """

    rank = 0
    world_size = 1

    def agree(self, failure: BaseException | None, value: T) -> list[T]:
        """Wait for all ranks; if one failed, raise on all of them.

        Returns:
            Every rank's ``value``, in rank order.

        Raises:
            BaseException: this rank's ``failure``, if no other rank failed.
            ConversionError: others failed; the message lists the failures.
        """
        if failure is not None:
            raise failure
        return [value]


class _DistributedRanks(Ranks):
    """The processes of torch.distributed's initialised group."""

    def __init__(self) -> None:
        import torch.distributed

        self._distributed = torch.distributed
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        group = torch.distributed.new_group(timeout=_AGREE_TIMEOUT)
        assert isinstance(group, torch.distributed.ProcessGroup)  # this rank is in it
        self._group = group

    def agree(self, failure: BaseException | None, value: T) -> list[T]:
        found: list[tuple[str | None, T]] = [(None, value)] * self.world_size
        own = (None if failure is None else str(failure), value)
        with _rank_lost_errors(f"rank {self.rank}: {'' if failure is None else f'{failure}; '}"):
            self._wait()
            self._distributed.all_gather_object(found, own, group=self._group)
        failed = [
            f"rank {rank} failed: {message}" for rank, (message, _) in enumerate(found) if message is not None
        ]
        if len(failed) == 1 and failure is not None:
            raise failure
        if failed:
            raise ConversionError("; ".join(failed)) from failure
        return [each for _, each in found]

    def _wait(self) -> None:
        """Wait until all ranks call this; polls, since signals do not interrupt torch's own waiting."""
        others = self._distributed.barrier(group=self._group, async_op=True)
        assert others is not None  # this rank is in the group
        while not others.is_completed():
            time.sleep(_POLL_S)
        others.wait()  # raises what went wrong


@contextmanager
def _rank_lost_errors(prefix: str) -> Iterator[None]:
    """Convert gloo's error about a lost process to ``RankLostError``."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(f"{prefix}another rank has ended; run the same command again to resume") from error


@contextmanager
def torchrun_ranks(own: RankEnvironment, *, say: Callable[[str], None]) -> Iterator[Ranks]:
    """The ranks that torchrun started, connected through gloo.

    Args:
        own: this process's rank.
        say: see ``torchrun.join``.

    Raises:
        ValueError, DaliLmdbError: as ``torchrun.join``.
        RankLostError: a rank ended before all were connected.
    """
    # Imported here: a conversion by one process needs no torch.
    import torch.distributed

    store = join(own, say=say)
    try:
        with _rank_lost_errors(f"rank {own.rank}: "):
            torch.distributed.init_process_group(
                "gloo", store=store, rank=own.rank, world_size=own.world_size, timeout=_CONNECT_TIMEOUT
            )
            ranks = _DistributedRanks()
        yield ranks
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
