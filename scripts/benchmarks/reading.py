"""Settings, options and records that the benchmarks without decoding share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import click
import numpy as np

from dali_lmdb.cli import option_of
from dali_lmdb.errors import StoreError
from dali_lmdb.plan.order import epoch_order
from dali_lmdb.plan.sampling import Listed
from dali_lmdb.store import Store

__all__ = ["ReadingSettings", "reading_options", "shuffled_part"]

_PART_SEED = 0x70617274  # "part"; not the epochs' seed, so that their order is independent of this choice


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """Settings of a benchmark that does not decode."""

    batch_size: int = 256
    """Number of records per step, at most ``records``."""
    rounds: int = 5
    """Number of measured rounds."""
    seconds: float = 5.0
    """Length of a window, in seconds."""
    records: int = 10_000
    """Number of records to read, chosen at random: at most the store's, and they must fit in the page cache."""

    def fitted_to(self, store: Store) -> ReadingSettings:
        """These settings with at most as many records as the store has.

        Raises:
            StoreError: the store is empty.
        """
        if len(store) == 0:
            raise StoreError(f"{store.path}: no records to read; convert a folder with images in it")
        records = min(self.records, len(store))
        return replace(self, records=records, batch_size=min(self.batch_size, records))


def reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add STORE, an option for each of ``ReadingSettings`` and ``--json`` to a command."""
    option, at_least_1 = option_of(ReadingSettings), click.IntRange(min=1)
    for decorate in (  # the decorator that is applied last comes first in the help
        click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object."),
        option("--records", type=at_least_1, help="Number of records to read, chosen at random."),
        option("--seconds", type=click.FloatRange(min=0, min_open=True), help="Length of a window, in seconds."),
        option("--rounds", type=at_least_1, help="Number of measured rounds."),
        option("--batch-size", type=at_least_1, help="Records per step, at most the record count."),
        click.argument("store", metavar="STORE"),
    ):
        command = decorate(command)
    return command


def shuffled_part(store: Store, num_records: int) -> Listed:
    """A uniform random sample of the store's records, in a different order in each epoch."""
    records = epoch_order(len(store), seed=_PART_SEED, epoch=0)(np.arange(num_records))
    return Listed(records, seed=0, shuffle="full")
