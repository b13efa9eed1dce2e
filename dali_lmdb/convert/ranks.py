"""Processes that share a conversion, one under plain Python, several under torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from dali_lmdb.errors import ConversionError

__all__ = ["Ranks", "torchrun_ranks"]

T = TypeVar("T")

_PATIENCE = timedelta(days=365)


class Ranks:
    """This process alone.

    Attributes:
        rank, world_size: torch.distributed's.
    """

    rank = 0
    world_size = 1

    def agree(self, failure: BaseException | None, value: T) -> list[T]:
        """Wait for all ranks; if any failed, all do.

        Returns:
            Every rank's ``value``, in their order.

        Raises:
            BaseException: this rank's ``failure``, if it is the only one.
            ConversionError: others failed; it says all that they did.
        """
        if failure is not None:
            raise failure
        return [value]


class _DistributedRanks(Ranks):
    """The processes of an initialised torch.distributed group."""

    def __init__(self) -> None:
        import torch.distributed

        self._distributed = torch.distributed
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def agree(self, failure: BaseException | None, value: T) -> list[T]:
        found: list[tuple[str | None, T]] = [(None, value)] * self.world_size
        self._distributed.all_gather_object(found, (None if failure is None else str(failure), value))
        failed = [
            f"rank {rank} failed: {message}" for rank, (message, _) in enumerate(found) if message is not None
        ]
        if len(failed) == 1 and failure is not None:
            raise failure
        if failed:
            raise ConversionError("; ".join(failed)) from failure
        return [each for _, each in found]


@contextmanager
def torchrun_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun started (its environment says so), connected through gloo."""
    # Imported here: a conversion by one process needs no torch.
    import torch.distributed

    # One rank may be done hours before another; torch would give up waiting after half an hour.
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield _DistributedRanks()
    finally:
        torch.distributed.destroy_process_group()
