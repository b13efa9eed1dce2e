"""A running DALI pipeline and the batches it works on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from dali_lmdb.loaders.external_source import ExternalSource
from dali_lmdb.loaders.pipeline import OUTPUTS, GraphSettings, build_pipeline
from dali_lmdb.loaders.prefetch import Prefetcher

__all__ = ["Run"]


class Run:
    """A pipeline and the batches that it works on.

    Attributes:
        next_place: (epoch, position) of the first batch in flight.
    """

    def __init__(self, source: ExternalSource, settings: GraphSettings, *, next_place: tuple[int, int]) -> None:
        self.source, self.next_place = source, next_place
        try:
            self._iterator: Iterator[Any] = DALIGenericIterator(
                build_pipeline(source, settings),
                list(OUTPUTS),
                size=-1,  # short batches pass, and the source never ends
                prepare_first_batch=False,
            )
        except BaseException:
            source.stop()
            raise

    def continue_at(self, epoch: int, position: int, prefetcher: Prefetcher) -> Run | None:
        """Drop the batches in flight and continue from another place; return None if only a new run can."""
        self.source.continue_with(prefetcher)
        for _ in range(len(self.source.in_flight)):
            try:
                next(self._iterator)
            except RuntimeError:  # a bad record of an epoch that was left early does not matter
                self.stop()
                return None
            self.source.in_flight.popleft()
        self.next_place = epoch, position
        return self

    def next(self) -> dict[str, torch.Tensor]:
        """The outputs of the first batch in flight, by name; it stays in ``source.in_flight``.

        Raises:
            Exception: the source's, in its place.
        """
        first = self.source.in_flight[0] if self.source.in_flight else None
        if isinstance(first, Exception):
            raise first
        try:
            outputs: dict[str, torch.Tensor] = next(self._iterator)[0]
        except StopIteration as error:  # an iterator may not raise it in the middle of an epoch
            raise RuntimeError("DALI's pipeline ended, though its source never does") from error
        return outputs

    def stop(self) -> None:
        """Drop the pipeline; a traceback may keep it alive, and with it the source, whose bytes it reads."""
        self.source.stop()
        self._iterator = iter(())

    def close(self) -> None:
        """Drop the pipeline and the bytes."""
        self.stop()
        self.source.close()
