import gc
import logging
import os
import subprocess
from pathlib import Path

# Before torch is imported anywhere, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from conversions import write_with
from image_sets import make_image_folder, save_noise

from dali_lmdb.convert import convert

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs an NVIDIA GPU, and torch sees none")
    if os.environ.get("DALI_LMDB_SOAK") != "1":
        _skip(items, "soak", "runs for minutes; set DALI_LMDB_SOAK=1")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # torch, DALI and thousands of tests: collecting would look at them again and again


def _skip(items, marker, reason):
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def loggers_as_imported():
    """Undo what a command that ran in this process, in a test or a fixture, has made of the package's loggers."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == "dali_lmdb" and isinstance(logger, logging.Logger):
            logger.setLevel(logging.NOTSET)
            logger.handlers.clear()


@pytest.fixture(scope="session")
def test_data():
    """Real photos and odd files that are not part of the project."""
    path = Path(os.environ.get("DALI_LMDB_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; set DALI_LMDB_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """24 grey images in 3 classes, see ``image_sets``; read-only."""
    return make_image_folder(tmp_path_factory.mktemp("images") / "images")


@pytest.fixture(scope="session")
def store_path(image_folder, tmp_path_factory):
    """The store of ``image_folder``; read-only."""
    path = tmp_path_factory.mktemp("store") / "images.lmdb"
    convert(image_folder, path)
    return path


@pytest.fixture(scope="session")
def noise_path(tmp_path_factory):
    """A store of 20 noise images, JPEG and PNG, whose every pixel differs, so crops show; read-only."""
    root = tmp_path_factory.mktemp("noise")
    for number in range(20):
        folder = root / "images" / str(number % 4)
        folder.mkdir(parents=True, exist_ok=True)
        options = {"format": "PNG"} if number % 2 else {"format": "JPEG", "quality": 95, "subsampling": 0}
        save_noise(folder / f"{number:02}.jpg", seed=number, size=(40 + number, 70 - number), **options)
    convert(root / "images", root / "noise.lmdb")
    return root / "noise.lmdb"


@pytest.fixture
def images(tmp_path):
    """A folder of 24 images that a test may change."""
    return make_image_folder(tmp_path / "images")


@pytest.fixture
def target(tmp_path):
    """A name for a store in a folder that holds nothing else."""
    (tmp_path / "stores").mkdir()
    return tmp_path / "stores" / "x.lmdb"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not allowed here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_pieces(monkeypatch):
    """An index in pieces of seven records, so that a small store has several."""
    write_with(monkeypatch, piece_records=7)


@pytest.fixture(params=["dali", pytest.param("dali-gpu", marks=pytest.mark.gpu), "torch", "torch-workers"])
def make(request, store_path):
    """Makes loaders of one backend over the store of grey images; they are closed at the test's end."""
    from loading import BACKENDS, TRAIN  # not above, since most tests need neither torch nor DALI

    made = []

    def make_loader(data=store_path, **arguments):
        defaults = {"transform": TRAIN, "batch_size": 4, "return_index": True}
        loader = BACKENDS[request.param](data, **defaults | arguments)
        made.append(loader)
        return loader

    yield make_loader
    for loader in made:
        loader.close()
