"""A folder with one folder, such as a clone's ``data``: what lies below is named, whatever its kind."""

import tarfile

import pytest
from packing import items_of

from dali_lmdb.convert.sources import open_source
from dali_lmdb.errors import SourceError


def message_of(root, *files):
    """The message with which the detection refuses a folder of these empty files."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    with pytest.raises(SourceError) as caught:
        items_of(open_source(root))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("clone", [[], [".git/HEAD", "README.md"]], ids=["plain", "clone"])
@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["data/train-00000-of-00001.parquet"], "c/data has .parquet files, give that"),
        (["data/train-0.tar"], "c/data has .tar files, give that"),
        (["train/0.tar", "train/1.tar"], "c/train has .tar files, give that"),
        (["data/train.lmdb/data.mdb"], "c/data/train.lmdb has .mdb files, give that"),
        (["data/train/0.parquet", "data/val/0.parquet"], "c/data/train has .parquet files, give that"),
        (["labels.csv", "shards/0.tar"], "c/shards has .tar files, give that"),
    ],
)
def test_files_of_data_below_a_single_folder_are_named(clone, files, found, tmp_path):
    message = message_of(tmp_path / "c", *clone, *files)
    assert message.startswith(f"{tmp_path}/c: one folder, ")
    assert found in message
    assert "--val-labels" not in message
    assert "--source" not in message  # which would find no image


@pytest.mark.parametrize(
    ("top", "found"),
    [("data/train", "data/train"), ("data", "data"), ("cars", "cars")],
    ids=["two", "one", "a name"],
)
def test_class_folders_below_a_single_folder_are_named(top, found, tmp_path):
    message = message_of(tmp_path / "c", ".git/HEAD", f"{top}/cat/0.jpg", f"{top}/dog/0.jpg")
    assert f"c/{found} has 2 folders of images, give that if they are the classes" in message
    assert "--source folder" in message
    assert "--val-labels" not in message


@pytest.mark.parametrize("folder", ["data/", "data/more/"])
def test_labels_are_not_asked_for_where_there_are_no_images(folder, tmp_path):
    (tmp_path / "r" / "data").mkdir(parents=True)
    (tmp_path / "r" / folder).mkdir(exist_ok=True)
    message = message_of(tmp_path / "r", ".git/HEAD")
    assert "one folder, data, without images in it or below" in message
    assert "--val-labels" not in message


def test_labels_are_not_asked_for_where_a_tar_has_no_images(tmp_path):
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "r.tar", "w") as tar:
        tar.add(tmp_path / "data", "data")
    with pytest.raises(SourceError, match="no image in this class") as caught:
        items_of(open_source(tmp_path / "r.tar"))
    assert "--val-labels" not in str(caught.value)
