"""Hidden folders beside class folders, and data below a clone of its repository."""

import subprocess
import sys

import pytest
from image_sets import make_image_folder, save_grey
from packing import items_of

from dali_lmdb.convert.sources import open_source
from dali_lmdb.errors import SourceError
from dali_lmdb.loaders.folder import FolderStore
from dali_lmdb.store import open_store


def command(*words, **options):
    return subprocess.run([sys.executable, "-m", "dali_lmdb", *words], capture_output=True, check=False, **options)


def classes_of(path):
    with open_store(path) as store:
        return store.classes


@pytest.fixture
def clone(tmp_path):
    """A data set with what a version control system keeps beside it."""
    root = make_image_folder(tmp_path / "clone", num_records=6)
    (root / ".git" / "objects").mkdir(parents=True)
    (root / ".git" / "HEAD").touch()
    return root


def test_hidden_folders_without_images_are_no_classes_and_are_reported(clone, tmp_path):
    done = command("convert", clone, "x.lmdb", cwd=tmp_path, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert classes_of(tmp_path / "x.lmdb") == ["ant", "bee", "cat"]
    assert (
        tmp_path / "x.lmdb.bad.tsv"
    ).read_text() == "name\treason\n.git/\tleft out: a hidden folder without images\n"


@pytest.mark.parametrize("hidden_image", [False, True])
def test_a_tar_and_a_folder_that_is_trained_on_have_the_same_classes(hidden_image, clone, tmp_path):
    if hidden_image:
        save_grey(clone / ".git" / "objects" / "0.jpg", 9)
    source = open_source(clone)
    assert source.classes == [*([".git"] if hidden_image else []), "ant", "bee", "cat"]
    for top in (".", "clone"):
        inside = clone if top == "." else clone.parent
        subprocess.run(["tar", "cf", tmp_path / "x.tar", "-C", inside, top], check=True)
        assert items_of(open_source(tmp_path / "x.tar")) == items_of(source)
    store = FolderStore(clone)
    assert (store.classes, store.labels.tolist()) == (source.classes, [item.label for item in source.items()])


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["data/train-00000-of-00001.parquet"], "clone/data has .parquet files, give that"),
        (["docs/README.md", "data/train/0.tar"], "clone/data/train has .tar files, give that"),
        (
            ["docs/x.md", "data/train/ant/0.jpg", "data/train/bee/0.jpg"],
            "clone/data/train has 2 folders of images",
        ),
        (["docs/x.md", "data/ant/0.jpg", "data/bee/0.jpg"], "clone/data has 2 folders of images"),
        (["docs/x.md", ".git/ant/0.jpg", ".git/bee/0.jpg"], "clone/docs: no image in this class folder"),
    ],
)
def test_a_clone_of_a_repository_is_searched_for_its_data(files, found, tmp_path):
    for file in [".git/HEAD", *files]:
        (tmp_path / "clone" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / file).touch()
    with pytest.raises(SourceError) as caught:
        items_of(open_source(tmp_path / "clone", kind="folder"))
    assert found in str(caught.value)
    assert ".git" not in str(caught.value)
