"""What a window takes: memory and bytes from storage, of processes that use known amounts."""

import mmap
import time

import numpy as np
import page_cache
import pytest

from dali_lmdb.compare import CompareSettings
from dali_lmdb.compare.usage import free_unused_memory, memory_bytes, storage_bytes
from dali_lmdb.compare.window import measure

MEBIBYTE = 1 << 20


def settings(*, seconds):
    return CompareSettings(batch_size=4, rounds=1, seconds=seconds, workers=1, size=16, device="cpu")


def test_memory_is_the_peak_of_a_window_not_what_is_left_at_its_end():
    def batches():
        for _ in range(4):  # the warm-up and the first step of the window
            yield None, range(4)
        held, until = np.ones(512 * MEBIBYTE, np.uint8), time.monotonic() + 0.5
        while time.monotonic() < until:
            yield None, range(4)
        del held
        while True:
            yield None, range(4)

    free_unused_memory()  # of earlier tests, as it does itself
    before = memory_bytes()
    found = measure(batches(), settings(seconds=1.0), burst=1).memory_bytes
    # What earlier tests have left running may use some more, or less.
    assert 400 * MEBIBYTE < found - before < 620 * MEBIBYTE
    assert memory_bytes() - before < 100 * MEBIBYTE


@pytest.fixture
def cold_file(tmp_path):
    """A file of 8 MiB that is dropped from the page cache."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * MEBIBYTE))
    page_cache.drop(path)
    if page_cache.is_cached(path, np.array([0], np.uint64), np.array([8 * MEBIBYTE], np.uint32)).any():
        pytest.skip("the temporary folder is on a file system that has no storage behind it")
    if storage_bytes() is None:
        pytest.skip("this kernel does not count what is read")
    return path


def read(path):
    path.read_bytes()


def touch(path):
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert not any(mapped[place] for place in range(0, len(mapped), mmap.PAGESIZE))


@pytest.mark.parametrize("use", [read, touch])
def test_bytes_of_a_window_are_what_was_not_in_the_page_cache_read_or_mapped(cold_file, use):
    def batches():
        for _ in range(3):  # the warm-up
            yield None, range(4)
        while True:
            use(cold_file)
            yield None, range(4)

    one_step = settings(seconds=1e-9)
    # Pages of this process's own libraries may be read meanwhile.
    assert 2 * MEBIBYTE <= measure(batches(), one_step, burst=1).read_bytes_per_image < 2.5 * MEBIBYTE
    assert measure(batches(), one_step, burst=1).read_bytes_per_image < MEBIBYTE / 2
