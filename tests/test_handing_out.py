import threading

import numpy as np
import pytest
from loading import dali_on_the_cpu, epoch_of, planned
from nvidia.dali import Pipeline, fn, types

from dali_lmdb.loaders.pipeline import feed_without_copy
from dali_lmdb.plan.augment import EvalTransform
from dali_lmdb.plan.batches import Planner
from dali_lmdb.plan.order import StepPlan
from dali_lmdb.plan.sampling import AllRecords
from dali_lmdb.store import FileStore, open_store

EVAL = EvalTransform(size=16, resize=18)
LONG_S = 30  # a test that fails waits this long


class StallingStore(FileStore):
    """A store whose disk stalls at one record, until ``release`` is set."""

    stalls_at = -1

    def __init__(self, path):
        super().__init__(path)
        self.stalled, self.release = threading.Event(), threading.Event()
        self.was_released = True

    def byte_ranges(self, records):
        if self.stalls_at in records:
            self.stalled.set()
            self.was_released = self.release.wait(LONG_S)
        return super().byte_ranges(records)


def in_order(store, **arguments):
    return dali_on_the_cpu(store, transform=EVAL, batch_size=4, shuffle="none", return_index=True, **arguments)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("num_ready", [1, 2, 3])
def test_a_stalled_disk_delays_no_batch_that_is_ready(store_path, depth, num_ready):
    store = StallingStore(store_path)
    store.stalls_at = 4 * num_ready
    with in_order(store, prefetch_queue_depth=depth) as loader:
        iterator = iter(loader)
        seen = [next(iterator)[2].tolist() for _ in range(num_ready)]
        assert store.stalled.wait(LONG_S)
        assert store.was_released, "a batch was handed out only when the next one had been waited for"
        store.release.set()
        seen += [records.tolist() for _, _, records in iterator]
    assert seen == planned(batch_size=4, shuffle="none")


def test_an_epoch_that_is_left_during_a_stall_continues_in_another(store_path):
    store = StallingStore(store_path)
    store.stalls_at = 8
    with in_order(store) as loader:
        iterator = iter(loader)
        next(iterator), next(iterator)
        assert store.stalled.wait(LONG_S)
        store.release.set()
        store.stalls_at = -1
        loader.set_epoch(3)
        assert epoch_of(loader) == planned(batch_size=4, shuffle="none")


class CountingStore(FileStore):
    """A store that says each time a batch's bytes are asked for."""

    def __init__(self, path):
        super().__init__(path)
        self.asked = threading.Semaphore(0)

    def arrays(self, records):
        self.asked.release()
        return super().arrays(records)


def test_dali_works_on_batches_that_are_ready_while_one_is_used(store_path):
    store = CountingStore(store_path)
    with in_order(store, prefetch_queue_depth=2) as loader:
        iterator = iter(loader)
        next(iterator)
        while loader._prefetcher.fill < 2:
            assert store.asked.acquire(timeout=LONG_S)
        next(iterator)
        assert 1 <= len(loader._run.in_flight) <= 2


class WritableStore(FileStore):
    """A store whose arrays can be written to, and are kept."""

    def arrays(self, records):
        self.given = [array.copy() for array in super().arrays(records)]
        return self.given


@pytest.mark.parametrize("num_records", [5, 8])
def test_dali_reads_the_bytes_in_place(store_path, num_records):
    store = WritableStore(store_path)
    planner = Planner(
        store,
        transform=EVAL,
        steps=StepPlan(num_positions=num_records, batch_size=8, last_batch="short"),
        sampling=AllRecords(num_records, seed=0, shuffle="none"),
        seed=0,
    )
    encoded, *_ = feed_without_copy(planner.plan(0, 0), planner)
    expected = [array.copy() for array in open_store(store_path).arrays(np.arange(num_records))]
    pipeline = Pipeline(batch_size=8, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(fn.external_source(name="encoded", no_copy=True, dtype=types.UINT8, ndim=1))
    pipeline.build()
    pipeline.feed_input("encoded", encoded)
    for place, array in enumerate(store.given):
        array[0] = place
    (outputs,) = pipeline.run()
    assert len(outputs) == num_records
    for place, array in enumerate(expected):
        assert np.array(outputs[place])[0] == place
        assert np.array_equal(np.array(outputs[place])[1:], array[1:])
