"""Tars of one class each: names with several dots, and tars that hold the class's folder."""

import subprocess

import pytest
from image_sets import save_grey
from packing import items_of, pack, pack_folder

from dali_lmdb.convert.sources import open_source
from dali_lmdb.errors import SourceError

SYNSETS = ["n01440764", "n01443537"]


def test_two_photos_with_one_name_up_to_the_first_dot_are_no_webdataset_record(tmp_path):
    for record, name in enumerate(["cat/photo.jpg", "cat/photo.1.jpg", "dog/photo.jpg"]):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        save_grey(tmp_path / "images" / name, record)
    source = open_source(pack_folder(tmp_path / "x.tar", tmp_path / "images"))
    assert source.kind == "tar"
    assert items_of(source) == items_of(open_source(tmp_path / "images"))


def test_two_photos_with_one_name_up_to_the_first_dot_are_those_of_a_class(tmp_path):
    (tmp_path / "tars").mkdir()
    for name in SYNSETS:
        pack(tmp_path / "tars" / f"{name}.tar", [("a.jpg", b"x"), ("a.1.jpg", b"y")])
    source = open_source(tmp_path / "tars")
    assert (source.kind, source.classes, source.count()) == ("imagenet-tar", SYNSETS, 4)


def test_images_and_masks_in_tars_of_other_names_are_not_taken_for_classes(tmp_path):
    (tmp_path / "tars").mkdir()
    for name in ("0", "1"):
        pack(tmp_path / "tars" / f"{name}.tar", [("a.jpg", b"x"), ("a.seg.png", b"y")])
    with pytest.raises(SourceError, match=r"images without \.cls labels"):
        open_source(tmp_path / "tars")


@pytest.fixture
def folders(tmp_path):
    """A folder for each of two classes, one with a folder in it."""
    names = [f"{SYNSETS[0]}/0.JPEG", f"{SYNSETS[0]}/more/1.JPEG", f"{SYNSETS[1]}/2.JPEG"]
    for record, name in enumerate(names):
        (tmp_path / "folders" / name).parent.mkdir(parents=True, exist_ok=True)
        save_grey(tmp_path / "folders" / name, record)
    return tmp_path / "folders"


@pytest.mark.parametrize("prefix", ["", "./"])
def test_a_tar_that_holds_its_classs_folder_is_that_class(prefix, folders, tmp_path):
    (tmp_path / "tars").mkdir()
    first, second = (tmp_path / "tars" / f"{name}.tar" for name in SYNSETS)
    subprocess.run(["tar", "cf", first, "-C", folders, prefix + SYNSETS[0]], check=True)
    subprocess.run(["tar", "cf", second, "-C", folders / SYNSETS[1], "2.JPEG"], check=True)
    subprocess.run(["tar", "cf", "all.tar", "-C", "tars", first.name, second.name], check=True, cwd=tmp_path)
    for path in (tmp_path / "tars", tmp_path / "all.tar"):
        source = open_source(path)
        assert source.kind == "imagenet-tar"
        assert items_of(source) == items_of(open_source(folders))


@pytest.mark.parametrize(
    ("members", "found"),
    [
        (["n01443537/0.JPEG"], "holds folders (n01443537)"),
        (["n01440764/0.JPEG", "1.JPEG"], "holds folders (n01440764)"),
        (["n01440764/0.JPEG", "n01443537/1.JPEG"], "holds folders (n01440764, n01443537)"),
        (["n01440764/0.JPEG", "n01440764/list.txt"], "holds n01440764/list.txt"),
    ],
    ids=["another class", "beside images", "two classes", "another file"],
)
def test_a_tar_whose_content_and_name_do_not_agree_is_refused(members, found, tmp_path):
    (tmp_path / "tars").mkdir()
    pack(tmp_path / "tars" / "n01440764.tar", [(name, b"x") for name in members])
    with pytest.raises(SourceError) as caught:
        open_source(tmp_path / "tars")
    assert found in str(caught.value)
    assert "--source imagenet-tar" in str(caught.value)
