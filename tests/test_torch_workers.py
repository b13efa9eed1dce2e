"""Workers of a ``DataLoader``: how they are started (Python 3.14 forks from a server), and what they need."""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from image_sets import make_image_folder, save_damaged
from samplers import EpochSampler
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Resize, ToTensor

from dali_lmdb import ImageFolderLMDB, TorchLoader, TrainTransform
from dali_lmdb.convert import convert


@pytest.fixture(params=["fork", "forkserver", "spawn"])
def start_method(request):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def torch_loader(path, **arguments):
    return TorchLoader(
        path,
        **{"transform": TrainTransform(size=16), "batch_size": 4, "num_workers": 1, "return_index": True}
        | arguments,
    )


class UnpicklableSampler(EpochSampler):
    """Samplers often hold a ``torch.Generator``, which pickles in some versions of torch and not in others."""

    def __reduce__(self):
        raise TypeError("a sampler stays in the process that made it")


def test_nothing_of_a_sampler_travels_to_the_workers(start_method, store_path):
    with torch_loader(store_path, sampler=UnpicklableSampler(24)) as loader:
        seen = [record for _, _, records in loader for record in records.tolist()]
    assert seen == list(EpochSampler(24))


def test_a_batch_of_bad_records_gets_one_that_follows_from_the_sampler(start_method, tmp_path):
    folder = make_image_folder(tmp_path / "images", num_records=8, classes=("one",))
    order = list(EpochSampler(8))
    for record in order[2:4]:
        save_damaged(folder / "one" / f"{record:03}.jpg")
    convert(folder, tmp_path / "x.lmdb")
    with torch_loader(
        tmp_path / "x.lmdb", sampler=UnpicklableSampler(8), batch_size=2, on_bad="substitute"
    ) as loader:
        seen = [records.tolist() for _, _, records in loader]
    assert seen == [order[0:2], [order[4]] * 2, order[4:6], order[6:8]]


def test_the_data_set_of_the_classic_way_works(start_method, store_path):
    loader = DataLoader(
        ImageFolderLMDB(store_path, Compose([Resize((8, 8)), ToTensor()])), batch_size=6, num_workers=1
    )
    assert [labels.tolist() for _, labels in loader] == [[0] * 6, [0] * 2 + [1] * 4, [1] * 4 + [2] * 2, [2] * 6]


LOAD = """
import sys
from dali_lmdb import EvalTransform, TorchLoader
try:
    transform = EvalTransform(size=8, resize=8)
    with TorchLoader(sys.argv[1], transform=transform, batch_size=4, num_workers=1) as loader:
        print(sum(len(labels) for _, labels in loader), "records")
except ValueError as error:
    print("Error:", error)
"""


@pytest.mark.parametrize(("length", "works"), [(70, True), (110, False), (250, False)])
def test_a_temporary_folder_without_room_for_sockets_is_an_error_not_a_hang(store_path, length, works):
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        folder = Path(short, "d" * (length - len(short) - 1))
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", LOAD, store_path],
            env=os.environ | {"TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    expected = "24 records\n" if works else f"Error: TMPDIR is {folder}, where worker processes cannot make their "
    assert done.stdout.startswith(expected)
    assert done.stdout.count("\n") == 1


def test_batches_of_many_epochs_leave_no_shared_memory_and_a_kept_one_does_not_change(store_path):
    with torch_loader(store_path, batch_size=8, num_workers=2) as loader:
        kept = next(iter(loader))[0]
        before = kept.clone()
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(200):
            assert all(batch[0].is_shared() for batch in loader)
        assert kept.equal(before)
        assert len(os.listdir("/proc/self/fd")) <= files
    del kept
    gc.collect()
    assert "/dev/shm/torch" not in Path("/proc/self/maps").read_text(encoding="utf-8")
