import os
import pickle

import numpy as np
import pytest
from image_sets import record_of, save_noise
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from dali_lmdb.convert import convert
from dali_lmdb.loaders.dataset import ImageFolderLMDB
from dali_lmdb.store import open_store


@pytest.fixture(scope="module")
def labels(store_path):
    with open_store(store_path) as store:
        return store.labels.tolist()


def test_items_are_image_folders_pixel_for_pixel(tmp_path):
    folder = tmp_path / "images"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    save_noise(folder / "a" / "1.jpg", seed=1)
    save_noise(folder / "a" / "2.jpg", seed=2, progressive=True, subsampling=2)
    save_noise(folder / "a" / "3.png", seed=3)
    Image.new("L", (20, 30), 77).save(folder / "b" / "grey.jpg")
    Image.new("CMYK", (20, 30), (10, 200, 30, 40)).save(folder / "b" / "cmyk.jpg")
    Image.new("P", (20, 30), 7).save(folder / "b" / "palette.png")
    Image.new("RGBA", (20, 30), (1, 2, 3, 4)).save(folder / "b" / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    save_noise(folder / "b" / "turned.jpg", seed=4, exif=exif)
    convert(folder, tmp_path / "x.lmdb")
    ours, theirs = ImageFolderLMDB(tmp_path / "x.lmdb"), ImageFolder(str(folder))
    assert len(ours) == len(theirs) == 8
    assert (ours.classes, ours.class_to_idx, ours.targets) == (theirs.classes, theirs.class_to_idx, theirs.targets)
    expected = [(os.path.relpath(path, folder), label) for path, label in theirs.samples]
    assert ours.samples == ours.imgs == expected
    for (image, label), (expected, target) in zip(ours, theirs, strict=True):
        assert (image.mode, image.size, label) == ("RGB", expected.size, target)
        assert type(label) is int
        assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_items_are_transformed(store_path):
    data = ImageFolderLMDB(store_path, transform=lambda image: image.size, target_transform=lambda label: -label)
    assert data[23] == ((93, 109), -2)


def test_indices_are_a_lists(store_path):
    data = ImageFolderLMDB(store_path)
    assert data[-1][1] == 2
    assert np.array_equal(data[-24][0], data[0][0])
    assert data[np.int64(3)][1] == 0
    for index in (24, -25, 10**9):
        with pytest.raises(IndexError):
            data[index]


def test_the_data_set_pickles(store_path):
    data = pickle.loads(pickle.dumps(ImageFolderLMDB(store_path)))
    assert len(data) == 24
    assert len(pickle.dumps(data)) < 10_000


def grey_and_label(image):
    return int(np.asarray(image).mean())


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_the_data_set_works_in_workers_before_and_after_the_parent_read(store_path, labels, method):
    data = ImageFolderLMDB(store_path, transform=grey_and_label)

    def read():
        loader = DataLoader(data, batch_size=6, num_workers=1, multiprocessing_context=method)
        return [
            (record_of(grey), label)
            for greys_, labels_ in loader
            for grey, label in zip(greys_.tolist(), labels_.tolist(), strict=True)
        ]

    expected = list(enumerate(labels))
    assert read() == expected
    assert [(record_of(grey), label) for grey, label in data] == expected
    if method == "fork":  # the others start Python anew: nothing of the parent comes along
        assert read() == expected
