"""What scripts do with an ``ImageFolder``, done with an ``ImageFolderLMDB``."""

import os
import pickle

import numpy as np
import pytest
from image_sets import grey_of, record_of, save_noise
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader, pil_loader

from dali_lmdb.errors import RecordError, SourceError
from dali_lmdb.loaders.dataset import ImageFolderLMDB


def records_of(data):
    return [(record_of(np.asarray(image).mean()), label) for image, label in data]


def test_the_store_may_be_named_as_elsewhere(store_path):
    for data in (
        ImageFolderLMDB(db_path=store_path),
        ImageFolderLMDB(root=store_path),
        ImageFolderLMDB(store_path, None, None, pil_loader, None),
        ImageFolderLMDB(ImageFolderLMDB(store_path).store),
    ):
        assert (len(data), data.root, data.db_path) == (24, str(store_path), str(store_path))
    for wrong in ({}, {"db_path": store_path, "root": store_path}):
        with pytest.raises(TypeError, match="of path, db_path and root are given, expected one"):
            ImageFolderLMDB(**wrong)


def test_attributes_are_an_image_folders(store_path, image_folder):
    ours, theirs = ImageFolderLMDB(store_path), ImageFolder(image_folder)
    assert ours.extensions == theirs.extensions == IMG_EXTENSIONS
    assert ours.find_classes(ours.root) == theirs.find_classes(theirs.root)
    assert ours.transforms is theirs.transforms is None
    assert ours.target_transform is theirs.target_transform is None
    both = {"transform": lambda image: image.size, "target_transform": lambda label: -label}
    ours, theirs = ImageFolderLMDB(store_path, **both), ImageFolder(image_folder, **both)
    assert repr(ours.transforms).split("0x")[0] == repr(theirs.transforms).split("0x")[0]
    assert ours.transforms(theirs.loader(theirs.samples[5][0]), 2) == theirs.transforms(
        theirs.loader(theirs.samples[5][0]), 2
    )


def test_a_loader_is_called_with_an_open_file(store_path, tmp_path):
    data = ImageFolderLMDB(store_path, transform=np.asarray, loader=lambda file: Image.open(file).convert("L"))
    image, _ = data[7]
    assert image.ndim == 2
    assert abs(float(image.mean()) - grey_of(7)) < 2
    assert data.loader is not ImageFolderLMDB(store_path).loader
    assert ImageFolderLMDB(store_path, loader=default_loader)[7][0].mode == "RGB"
    save_noise(tmp_path / "x.png", seed=1)
    with open(tmp_path / "x.png", "rb") as file:
        assert np.array_equal(ImageFolderLMDB(store_path).loader(file), pil_loader(tmp_path / "x.png"))


def test_is_valid_file_chooses_records_by_name(store_path, image_folder):
    def is_odd(name):
        return int(os.path.basename(name)[:3]) % 2

    ours, theirs = (
        ImageFolderLMDB(store_path, is_valid_file=is_odd),
        ImageFolder(image_folder, is_valid_file=is_odd),
    )
    assert ours.extensions is theirs.extensions is None
    assert ours.targets == theirs.targets
    assert [name for name, _ in ours.samples] == [
        os.path.relpath(path, image_folder) for path, _ in theirs.samples
    ]
    assert records_of(ours) == records_of(theirs) == [(record, record // 8) for record in range(1, 24, 2)]
    assert record_of(np.asarray(ours[-1][0]).mean()) == 23
    assert records_of(pickle.loads(pickle.dumps(ours))) == records_of(theirs)
    with pytest.raises(SourceError, match="class 'bee' has no valid record; give allow_empty=True"):
        ImageFolderLMDB(store_path, is_valid_file=lambda name: not name.startswith("bee"))
    kept = ImageFolderLMDB(store_path, is_valid_file=lambda name: not name.startswith("bee"), allow_empty=True)
    assert (kept.classes, set(kept.targets)) == (["ant", "bee", "cat"], {0, 2})


class WithoutAnts(ImageFolderLMDB):
    def find_classes(self, directory):
        return ["cat", "bee"], {"cat": 0, "bee": 1}


def test_a_subclass_may_find_other_classes(store_path):
    data = WithoutAnts(store_path)
    assert data.classes == ["cat", "bee"]
    assert records_of(data) == [(record, 1) for record in range(8, 16)] + [(record, 0) for record in range(16, 24)]
    assert data.targets == [1] * 8 + [0] * 8
    assert data.samples[0] == ("bee/008.jpg", 1)
    assert records_of(pickle.loads(pickle.dumps(data))) == records_of(data)


def test_samples_and_targets_are_lists_made_once(store_path):
    data = ImageFolderLMDB(store_path)
    assert data.samples is data.samples is data.imgs
    assert data.targets is data.targets
    expected = records_of(data)
    assert expected == [(record, record // 8) for record in range(24)]
    data.targets = [9] * 24  # as for an ImageFolder: only samples makes items
    assert records_of(data) == expected


@pytest.mark.parametrize("is_made", [True, False], ids=["made-before", "assigned-first"])
def test_items_follow_samples(store_path, is_made):
    data, whole = ImageFolderLMDB(store_path), ImageFolderLMDB(store_path).samples
    if is_made:
        assert len(data.samples) == 24
    data.samples = whole[20:3:-4]
    assert len(data) == 5
    assert records_of(data) == [(20, 2), (16, 2), (12, 1), (8, 1), (4, 0)]
    data.samples[1] = ("ant/000.jpg", 77)
    del data.samples[0]
    assert records_of(data) == [(0, 77), (12, 1), (8, 1), (4, 0)]
    assert records_of(pickle.loads(pickle.dumps(data))) == records_of(data)
    data.samples = [("ant/999.jpg", 0)]
    with pytest.raises(RecordError, match=r"samples has 'ant/999.jpg', expected the name of one of its records"):
        data[0]
    with pytest.raises(IndexError):
        data[1]


def test_what_was_only_looked_at_is_not_pickled(store_path):
    data = ImageFolderLMDB(store_path)
    small = len(pickle.dumps(data))
    assert data.samples
    assert data.imgs
    assert data.targets
    assert len(pickle.dumps(data)) == small
    data.targets[3] = 55
    assert pickle.loads(pickle.dumps(data)).targets[3] == 55


def test_the_data_set_that_gives_paths_asks_for_all_names_once(store_path):
    class WithPaths(ImageFolderLMDB):
        def __getitem__(self, index):
            return (*super().__getitem__(index), self.imgs[index][0])

    data, listed = WithPaths(store_path), []
    names = data.store.names
    data.store.names = lambda: listed.append(1) or names()
    assert [name for _, _, name in data] == [data.store.name(record) for record in range(24)]
    assert len(listed) == 1
