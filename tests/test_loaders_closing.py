import copy
import gc
import multiprocessing
import os
import pickle
import threading
import weakref

import numpy as np
import pytest
from loading import DALI, GPU, NUM_RECORDS, TORCH, TRAIN, WORKERS, cut_short, dali_on_the_cpu, epoch_of, planned
from odd_kinds import GREY, saved

from dali_lmdb.convert import convert
from dali_lmdb.loaders.pillow import encoded_for_dali
from dali_lmdb.loaders.prefetch import Prefetcher
from dali_lmdb.plan.augment import TrainTransform
from dali_lmdb.store import open_store


def test_a_closed_loader_is_closed(make):
    loader = make()
    iterator = iter(loader)
    next(iterator)
    unused = iter(loader)
    loader.close()
    loader.close()
    cut_short(iterator, because="the loader was closed")
    for use in (lambda: iter(loader), lambda: next(unused)):
        with pytest.raises(RuntimeError, match="is closed; make a new one"):
            use()


def test_a_loader_is_a_context_manager(make):
    with make() as loader:
        assert epoch_of(loader) == planned(batch_size=4)
    with pytest.raises(RuntimeError, match="closed"):
        iter(loader)


@pytest.mark.parametrize("backend", [DALI, GPU, TORCH, WORKERS])
def test_a_loader_that_releases_its_memory_goes_on_with_the_next_batch(store_path, backend):
    with backend(store_path, transform=TRAIN, batch_size=4, return_index=True) as loader:
        loader.release_memory()
        steps = []
        for _, _, records in loader:
            steps.append(records.tolist())
            loader.release_memory()
        assert steps == planned(batch_size=4)
        assert epoch_of(loader) == planned(epoch=1, batch_size=4)


def test_a_dali_loader_that_releases_its_memory_leaves_no_threads_or_descriptors(store_path):
    with dali_on_the_cpu(store_path, transform=TRAIN, batch_size=4) as loader:

        def use():
            next(iter(loader))
            running = threading.active_count()
            loader.release_memory()
            assert threading.active_count() < running

        use()
        before = descriptors_and_threads()
        for _ in range(4):
            use()
        after = descriptors_and_threads()
    assert all(late <= early + 1 for late, early in zip(after, before, strict=True)), (before, after)


def test_a_loader_that_was_never_used_closes(make):
    make().close()


def descriptors_and_threads():
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(threading.enumerate())


@pytest.mark.parametrize("backend", [DALI, GPU, TORCH, WORKERS])
def test_closed_loaders_leave_no_threads_processes_or_descriptors(store_path, backend):
    def use():
        with backend(store_path, transform=TRAIN, batch_size=4) as loader:
            next(iter(loader))

    use()
    before = descriptors_and_threads()
    for _ in range(4):
        use()
    after = descriptors_and_threads()
    assert all(late <= early + 1 for late, early in zip(after, before, strict=True)), (before, after)
    assert not multiprocessing.active_children()


def test_a_closed_loader_lets_go_of_the_map_at_once(image_folder, tmp_path):
    path = tmp_path / "images.lmdb"
    convert(image_folder, path)

    def is_mapped():
        with open("/proc/self/maps") as file:
            return str(path) in file.read()

    gc.collect()
    gc.disable()
    try:
        with dali_on_the_cpu(path, transform=TRAIN, batch_size=4) as loader:
            next(iter(loader))
            assert is_mapped()
        del loader
        assert not is_mapped()
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", [DALI, GPU, TORCH, WORKERS])
def test_a_loader_that_is_dropped_without_closing_goes_away(store_path, backend):
    def use():
        loader = backend(store_path, transform=TRAIN, batch_size=4)
        next(iter(loader))
        return weakref.ref(loader)

    use()
    before = descriptors_and_threads()
    gone = [use() for _ in range(3)]
    after = descriptors_and_threads()
    assert all(reference() is None for reference in gone)
    assert all(late <= early + 1 for late, early in zip(after, before, strict=True)), (before, after)


@pytest.mark.soak
@pytest.mark.parametrize("backend", [DALI, GPU, WORKERS])
def test_hundreds_of_epochs_need_no_more_memory_descriptors_or_threads(store_path, backend):
    def resident_bytes():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with backend(store_path, transform=TrainTransform(size=64), batch_size=4) as loader:
        for epoch in range(1000):
            for _ in loader:
                pass
            if epoch == 200:
                before, memory = descriptors_and_threads(), resident_bytes()
        assert descriptors_and_threads() == before
        assert resident_bytes() < memory + 20e6


def test_stats_count_what_was_handed_out(make):
    loader = make()
    list(loader)
    next(iter(loader))
    stats = loader.stats()
    assert stats["images"] == 28
    sizes = loader.store.gather("num_bytes", np.arange(NUM_RECORDS))
    seen = [record for batch in planned(batch_size=4) + planned(batch_size=4, epoch=1)[:1] for record in batch]
    assert stats["bytes_read"] == sizes[seen].sum()
    assert stats["queue_fill"] >= 0
    assert stats["images_per_s"] > 0
    assert stats["wait_s"] >= 0
    assert 0 <= stats["wait_fraction"] <= 1


def use_in_a_fork(iterator):
    """What a forked process says that uses an iterator of a loader."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            next(iterator)
            os.write(writing, b"a batch")
        except BaseException as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside threads, which is the matter here
@pytest.mark.parametrize("backend", [DALI, TORCH])
def test_a_loader_that_was_used_says_in_a_forked_process_that_it_cannot_be(store_path, backend):
    with backend(store_path, transform=TRAIN, batch_size=4) as loader:
        assert use_in_a_fork(iter(loader)) == "a batch"
        iterator = iter(loader)
        next(iterator)
        assert "make a new loader here" in use_in_a_fork(iterator)
        assert "make a new loader here" in use_in_a_fork(iter(loader))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forgotten_pipeline_is_not_collected_in_a_forked_process(store_path):
    gc.collect()
    gc.disable()
    try:
        loader = dali_on_the_cpu(store_path, transform=TRAIN, batch_size=4)
        next(iter(loader))
        loader.itself = loader
        del loader
        pid = os.fork()
        if pid == 0:
            gc.collect()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    finally:
        gc.enable()
        gc.collect()


@pytest.mark.parametrize("use", [pickle.dumps, copy.deepcopy])
def test_a_loader_cannot_be_pickled_and_says_so(make, use):
    with pytest.raises(TypeError, match="make one in each process"):
        use(make())


def test_a_batch_that_pillow_decodes_is_given_up_between_images(tmp_path):
    """So that Ctrl-C need not wait for a whole batch of slow images."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    for number in range(8):
        (tmp_path / "images" / "a" / f"{number}.jpg").write_bytes(saved(GREY, "GIF"))
    convert(tmp_path / "images", tmp_path / "x.lmdb")
    store = open_store(tmp_path / "x.lmdb")
    asked = []

    def is_stopped():
        asked.append(len(asked))
        return len(asked) == 3

    with pytest.raises(RuntimeError, match="closed while it prepared a batch"):
        encoded_for_dali(store, np.arange(8), is_stopped=is_stopped)
    assert len(asked) == 3


def test_the_prefetcher_says_when_nobody_waits_any_more(store_path):
    with dali_on_the_cpu(store_path, transform=TRAIN, batch_size=4) as loader:
        said, given = [], threading.Event()

        def feed(plan, is_stopped):
            said.append(is_stopped)
            given.set()
            return ()

        prefetcher = Prefetcher(loader.planner, feed, epoch=0, start=0)
        prefetcher.next()
        assert given.wait(10)
        assert not said[0]()
        prefetcher.close()
        assert said[0]()
