import gc
import os
import threading
from functools import partial

import numpy as np
import page_cache
import pytest
from image_sets import save_noise

from dali_lmdb.convert import convert
from dali_lmdb.errors import StoreError
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.external_source import feed_of
from dali_lmdb.loaders.prefetch import Prefetcher
from dali_lmdb.plan.augment import TrainTransform
from dali_lmdb.plan.batches import Planner
from dali_lmdb.plan.order import StepPlan, epoch_order
from dali_lmdb.plan.sampling import AllRecords
from dali_lmdb.store import FileStore, open_store
from dali_lmdb.store.readahead import Readahead

NUM_RECORDS = 40
FAR_IN = np.arange(10, 20)  # opening a store touches its first and last pages and their neighbours


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Images of 20 to 60 pages each."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "class").mkdir()
    for record in range(NUM_RECORDS):
        save_noise(folder / "class" / f"{record:02}.jpg", seed=record, size=(200 + 10 * record, 300), quality=90)
    target = tmp_path_factory.mktemp("stores") / "noise.lmdb"
    convert(folder, target)
    return target


@pytest.fixture
def cold(store):
    """The store with its pages dropped from memory."""
    store.read_bytes()  # a page that the test before asked for, and that is still on its way, cannot be dropped
    page_cache.drop(store)
    if warm_part(store, FAR_IN) > 0:
        pytest.skip("the temporary folder is on a file system that has no storage behind it")
    return store


@pytest.fixture
def readahead(store):
    readahead = Readahead(open_store(store))
    yield readahead
    readahead.close()


def warm_part(store, records):
    [(path, offsets, lengths)] = open_store(store).byte_ranges(records)
    return page_cache.is_cached(path, offsets, lengths).mean()


def test_a_store_that_is_gone_is_an_error_that_says_so(store, tmp_path):
    path = tmp_path / "moved.lmdb"
    path.write_bytes(store.read_bytes())
    readahead = Readahead(open_store(path))
    path.unlink()
    with pytest.raises(StoreError, match="cannot be read ahead: No such file or directory"):
        readahead.wait(FAR_IN)
    readahead.close()


def loader_of(store, *, batch_size):
    """A loader that reads ahead no further than it must."""
    return DaliLoader(
        store,
        transform=TrainTransform(size=8),
        batch_size=batch_size,
        device="cpu",
        num_threads=1,
        readahead_bytes=1,
        return_index=True,
    )


def test_a_store_that_is_gone_for_a_while_costs_no_batch(cold, tmp_path):
    path = tmp_path / "moved.lmdb"
    path.write_bytes(cold.read_bytes())
    page_cache.drop(path)
    with loader_of(path, batch_size=8) as loader:
        path.rename(tmp_path / "elsewhere.lmdb")
        iterator = iter(loader)
        with pytest.raises(StoreError, match="cannot be read ahead: No such file or directory"):
            next(iterator)
        (tmp_path / "elsewhere.lmdb").rename(path)
        seen = [record for _, _, records in iterator for record in records.tolist()]
    assert sorted(seen) == list(range(NUM_RECORDS))


def test_an_error_of_storage_is_told_when_its_batch_is_due_and_costs_none(store):
    order = epoch_order(NUM_RECORDS, seed=0, epoch=0, shuffle="full")(np.arange(NUM_RECORDS))

    class Failing(FileStore):
        failed = False

        def byte_ranges(self, records):
            if not self.failed and order[12] in records:
                self.failed = True
                raise OSError(5, "Input/output error")
            return super().byte_ranges(records)

    with loader_of(Failing(store), batch_size=4) as loader:
        iterator = iter(loader)
        seen = [next(iterator)[2].tolist() for _ in range(3)]
        with pytest.raises(OSError, match="Input/output error"):
            next(iterator)
        seen += [records.tolist() for _, _, records in iterator]
    assert seen == order.reshape(-1, 4).tolist()


def test_who_waits_for_a_batch_is_woken_by_close(store):
    opened = open_store(store)
    planner = Planner(
        opened,
        transform=TrainTransform(),
        steps=StepPlan(num_positions=NUM_RECORDS, batch_size=4),
        sampling=AllRecords(NUM_RECORDS, seed=0, shuffle="full"),
        seed=0,
    )
    closing = threading.Event()
    reader = Prefetcher(planner, lambda plan, **options: closing.wait(), epoch=0, start=0)
    errors = []

    def wait():
        try:
            reader.next()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    closer = threading.Thread(target=reader.close, daemon=True)
    closer.start()
    closing.set()
    closer.join(10)
    thread.join(10)
    assert errors == ["the prefetcher is closed; make a new loader"]


def is_there(descriptor, offset):
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


def size_of(store, records):
    return int(open_store(store).gather("num_bytes", records).sum())


def new_threads(before):
    return [thread.name for thread in threading.enumerate() if thread not in before]


def test_waiting_brings_records_into_memory(cold, readahead):
    [(_, offsets, lengths)] = open_store(cold).byte_ranges(FAR_IN)
    lasts = (offsets + lengths - 1).tolist()
    with open(cold, "rb") as file:
        readahead.wait(FAR_IN)
        # At once, lest what is only on its way arrives.
        there = [is_there(file.fileno(), last) for last in reversed(lasts)]
    assert there.count(False) <= 1  # the kernel may take a page back at any time
    assert warm_part(cold, FAR_IN) > 0.9
    assert readahead.cold


def test_only_what_is_missing_counts(cold, readahead):
    readahead.wait(FAR_IN[:5])
    first = readahead.bytes_read
    # Looking may start reading, so a record may seem to be there; few do.
    assert 0.5 * size_of(cold, FAR_IN[:5]) < first <= size_of(cold, FAR_IN[:5])
    readahead.wait(FAR_IN)
    assert 0.5 * size_of(cold, FAR_IN[5:]) < readahead.bytes_read - first < size_of(cold, FAR_IN)


def test_announcing_asks_for_whole_ranges_and_no_more(cold, readahead):
    read_before = page_cache.bytes_from_device()
    if read_before is None:
        pytest.skip("the system does not tell what was read")
    readahead.announce(FAR_IN)
    readahead.wait(FAR_IN)
    read, page_bytes = page_cache.bytes_from_device() - read_before, 4096
    assert size_of(cold, FAR_IN) <= read <= size_of(cold, FAR_IN) + 2 * page_bytes * len(FAR_IN)


def test_records_in_memory_cost_no_threads_and_are_not_announced(store, readahead):
    store.read_bytes()
    before = threading.enumerate()
    readahead.wait(np.arange(NUM_RECORDS))
    assert not readahead.cold
    assert readahead.bytes_read == 0
    assert new_threads(before) == []


def test_announcing_goes_on_until_many_batches_in_a_row_were_in_memory(store):
    class InMemory(FileStore):
        def byte_ranges(self, records):
            return []

    readahead = Readahead(InMemory(store))
    readahead.cold = True
    for _ in range(63):
        readahead.wait(FAR_IN)
        assert readahead.cold
    readahead.wait(FAR_IN)
    assert not readahead.cold


def test_close_ends_the_threads_and_the_files(cold):
    readahead = Readahead(open_store(cold))
    gc.collect()  # so that no file of an earlier test is closed meanwhile
    before, files = threading.enumerate(), len(os.listdir("/proc/self/fd"))
    readahead.wait(np.arange(NUM_RECORDS))
    assert new_threads(before)
    readahead.close()
    assert new_threads(before) == []
    assert len(os.listdir("/proc/self/fd")) == files


def test_ranges_behind_the_end_of_the_file_are_harmless(store):
    class Moved(FileStore):
        def byte_ranges(self, records):
            [(path, offsets, lengths)] = super().byte_ranges(records)
            return [(path, offsets + np.uint64(store.stat().st_size - 5000), lengths)]

    readahead = Readahead(Moved(store))
    try:
        readahead.announce(np.arange(NUM_RECORDS))
        readahead.wait(np.arange(NUM_RECORDS))
    finally:
        readahead.close()


@pytest.mark.parametrize("readahead_bytes", [0, 1, 200_000, 1 << 30])
def test_batches_from_storage_come_in_order_however_much_is_read_ahead(cold, readahead_bytes):
    opened = open_store(cold)
    planner = Planner(
        opened,
        transform=TrainTransform(),
        steps=StepPlan(num_positions=NUM_RECORDS, batch_size=4),
        sampling=AllRecords(NUM_RECORDS, seed=0, shuffle="full"),
        seed=0,
    )
    before = threading.enumerate()
    feed = partial(feed_of, planner=planner)
    reader = Prefetcher(planner, feed, epoch=0, start=8, readahead_bytes=readahead_bytes)
    try:
        for expected in [*planner.plans(0, 8), *planner.plans(1, 0)]:
            plan, feed = reader.next()
            assert (plan.epoch, plan.start) == (expected.epoch, expected.start)
            assert [bytes(values) for values in feed[0]] == [bytes(opened.read(i)) for i in expected.records]
    finally:
        reader.close()
    assert new_threads(before) == []
    if readahead_bytes:
        assert 0 < reader.readahead.bytes_read <= size_of(cold, np.arange(NUM_RECORDS))
