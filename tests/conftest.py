import os
from pathlib import Path

# Before torch is imported anywhere, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from image_sets import make_image_folder

from dali_lmdb.convert import convert

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs an NVIDIA GPU, and torch sees none")
    if os.environ.get("DALI_LMDB_SOAK") != "1":
        _skip(items, "soak", "runs for minutes; set DALI_LMDB_SOAK=1")


def _skip(items, marker, reason):
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


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
