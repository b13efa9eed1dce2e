"""Memory, file descriptors and threads over many epochs: they stay what they are after the first few."""

import gc
import itertools
import multiprocessing
import os
import time
from typing import NamedTuple

import numpy as np
import pytest
from image_sets import make_image_folder, save_noise

from dali_lmdb.convert import convert
from dali_lmdb.errors import RecordError
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import EvalTransform, TrainTransform

TRAIN = TrainTransform(size=16)
EVAL = EvalTransform(size=16, resize=18)


def dali(store, **arguments):
    return DaliLoader(store, **arguments, device="cpu", num_threads=1)


def torch_here(store, **arguments):
    return TorchLoader(store, **arguments, num_workers=0)


def torch_in_a_worker(store, **arguments):
    return TorchLoader(store, **arguments, num_workers=1)


class Held(NamedTuple):
    """What this process holds."""

    resident_bytes: int
    descriptors: int
    threads: int
    processes: int


def held():
    gc.collect()
    with open("/proc/self/statm") as file:
        resident_pages = int(file.read().split()[1])
    return Held(
        resident_bytes=resident_pages * os.sysconf("SC_PAGE_SIZE"),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        processes=len(multiprocessing.active_children()),
    )


@pytest.mark.parametrize("backend", [dali, torch_here, torch_in_a_worker])
def test_200_epochs_need_what_50_need(store_path, backend):
    with backend(store_path, transform=TRAIN, batch_size=6) as loader:
        for epoch in range(250):
            if epoch == 50:
                before = held()
            most_steps = 2 if epoch % 10 == 0 else None  # some epochs are left early
            for _ in itertools.islice(loader, most_steps):
                pass
        after = held()
    assert after[1:] == before[1:]
    # 760 batches of 18 kB; were they kept, it would be 14 MB.
    assert after.resident_bytes < before.resident_bytes + 4e6


@pytest.fixture(scope="module")
def bad_path(tmp_path_factory):
    """A store of 24 records of which two do not decode."""
    root = tmp_path_factory.mktemp("soak")
    folder = make_image_folder(root / "images")
    for record in (9, 22):
        (path,) = folder.rglob(f"{record:03}.jpg")
        save_noise(path, seed=record, size=(60, 60), format="PNG")
        raw = bytearray(path.read_bytes())
        raw[2000:5000] = bytes(3000)
        path.write_bytes(raw)
    convert(folder, root / "bad.lmdb")
    return root / "bad.lmdb"


def fail_at_the_first_batch(loader):
    for images, _ in loader:
        assert 1 / len(images[:0])


def use_in_every_way(backend, store_path, bad_path, *, random):
    """Whole epochs, epochs left early, errors of the consumer and of the data, resuming, new loaders."""
    loader = backend(store_path, transform=TRAIN, batch_size=4, seed=int(random.integers(1000)))
    for _ in range(5):
        for _ in itertools.islice(loader, int(random.integers(1, 9))):
            pass
        loader.load_state_dict(loader.state_dict())
        # Another epoch: the state's own may have no step left.
        loader.set_epoch(loader.epoch + int(random.integers(1, 100)))
    with pytest.raises(ZeroDivisionError):
        fail_at_the_first_batch(loader)
    if random.integers(2):
        loader.close()
    with backend(bad_path, transform=EVAL, batch_size=5) as raising:
        iterator = iter(raising)
        errors = 0
        for _ in range(len(raising)):
            try:
                next(iterator)
            except RecordError:
                errors += 1
        assert errors == 2
    substituting = backend(bad_path, transform=TRAIN, batch_size=5, on_bad="substitute")
    for _ in range(2):
        assert len(list(substituting)) == 4
    iter(substituting)  # and is left to the garbage collector


@pytest.mark.soak
def test_a_long_time_of_everything_needs_no_more_than_its_beginning(store_path, bad_path):
    seconds = float(os.environ.get("DALI_LMDB_SOAK_S", "600"))
    random = np.random.default_rng(0)
    begin, measured = time.monotonic(), []
    while time.monotonic() < begin + seconds or len(measured) < 12:
        for backend in (dali, torch_here, torch_in_a_worker):
            use_in_every_way(backend, store_path, bad_path, random=random)
        measured.append(held())
    quarter = len(measured) // 4
    second, last = measured[quarter : 2 * quarter], measured[-quarter:]
    print(f"{len(measured)} rounds, after the first {measured[0]}, half way {second[-1]}, at the end {last[-1]}")
    for name in ("descriptors", "threads", "processes"):
        assert max(getattr(each, name) for each in last) <= max(getattr(each, name) for each in second), name
    grown = np.median([each.resident_bytes for each in last]) - np.median([each.resident_bytes for each in second])
    assert grown < 10e6
