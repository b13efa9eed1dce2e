"""Sources and targets that look right and are not: the message says what they are, and what to do."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from classic_databases import make_classic
from click.testing import CliRunner
from image_sets import make_image_folder

from dali_lmdb.cli import main
from dali_lmdb.convert import convert
from dali_lmdb.convert.sources import open_source
from dali_lmdb.errors import ConversionError, SourceError, StoreError, StoreFormatError, StoreNotFoundError
from dali_lmdb.inspect import export
from dali_lmdb.loaders.dataset import ImageFolderLMDB
from dali_lmdb.store import open_store


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_store_that_does_not_exist_is_a_file_that_is_not_found(tmp_path):
    for use in (open_store, ImageFolderLMDB):
        with pytest.raises(FileNotFoundError, match=r"^no store at .*x\.lmdb; make one with: ") as caught:
            use(tmp_path / "x.lmdb")
        assert isinstance(caught.value, StoreNotFoundError)
        assert isinstance(caught.value, StoreError)
    result = run("export", tmp_path / "x.lmdb", tmp_path / "out")
    assert (result.exit_code, result.output.splitlines()[0][:18]) == (1, "Error: no store at")


def test_a_target_that_ends_in_a_slash_is_no_file(image_folder, tmp_path):
    result = run("convert", image_folder, f"{tmp_path}/out/")
    assert (result.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert (
        f"{tmp_path}/out/: a folder, expected the name of the file to make, as in {tmp_path}/out/t"
        in result.output
    )
    with pytest.raises(ConversionError, match="a folder, expected the name of the file"):
        convert(image_folder, f"{tmp_path}/out/")


def test_the_kind_of_source_is_printed(image_folder, tmp_path):
    result = run("convert", image_folder, tmp_path / "x.lmdb")
    assert result.output.splitlines()[1] == "read as folder"
    again = run("convert", tmp_path / "x.lmdb", tmp_path / "y.lmdb", "--json")
    assert json.loads(again.output)["source"] == "store"


def test_a_parent_of_splits_says_how_to_convert_each(tmp_path):
    for split in ("train", "val"):
        make_image_folder(tmp_path / split, num_records=3)
    expected = f"; convert {tmp_path}/train to train.lmdb and {tmp_path}/val to val.lmdb, or give --source folder"
    with pytest.raises(SourceError, match=expected):
        open_source(tmp_path)


@pytest.mark.parametrize("image", ["a/1.jpg", {"path": "a/1.jpg"}], ids=["text", "struct"])
def test_parquet_with_paths_alone_says_so(image, tmp_path):
    pq.write_table(pa.table({"image": [image], "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="paths without the images' bytes; embed them with datasets"):
        open_source(tmp_path / "x.parquet")


def test_what_save_to_disk_wrote_is_named(tmp_path):
    saved = tmp_path / "saved"
    for folder in (saved, saved / "train"):
        folder.mkdir()
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        (saved / "train" / name).write_text("{}")
    for source in (saved / "train", saved / "train" / "data-00000-of-00001.arrow"):
        with pytest.raises(SourceError, match=r"save_to_disk .*load_from_disk\('[^']*/train'\).to_parquet\("):
            open_source(source)
    (saved / "dataset_dict.json").write_text("{}")
    with pytest.raises(SourceError, match=r"save_to_disk .*load_from_disk\('[^']*/saved'\)\['train'\].to_parquet"):
        open_source(saved)


def test_tensorpacks_databases_are_named(tmp_path):
    keys = [b"%08d" % record for record in range(3)]
    pixels = {b"nd": True, b"type": "|u1", b"kind": b"", b"shape": [3], b"data": b"abc"}  # msgpack-numpy's array
    path = make_classic(tmp_path / "x.lmdb", [(pixels, 0)] * 3, keys=keys, __len__=None)
    for use in (open_store, open_source):
        with pytest.raises(StoreFormatError, match=r"a tensorpack database \(LMDBSerializer\)"):
            use(path)
    usable = make_classic(tmp_path / "y.lmdb", [(b"abc", 0)] * 3, keys=keys, __len__=None)
    assert len(open_store(usable)) == 3


def test_empty_classes_may_be_kept(images, tmp_path):
    (images / "bug").mkdir()
    assert "give --allow-empty" in run("convert", images, tmp_path / "x.lmdb").output
    assert run("convert", images, tmp_path / "x.lmdb", "--allow-empty").exit_code == 0
    with open_store(tmp_path / "x.lmdb") as store:
        assert store.classes == ["ant", "bee", "bug", "cat"]
        assert sorted(set(store.labels.tolist())) == [0, 1, 3]
    export(tmp_path / "x.lmdb", tmp_path / "out")
    convert(open_source(tmp_path / "out", allow_empty=True), tmp_path / "y.lmdb")
    with open_store(tmp_path / "x.lmdb") as one, open_store(tmp_path / "y.lmdb") as two:
        assert (one.classes, one.fingerprint) == (two.classes, two.fingerprint)
    with pytest.raises(ValueError, match="allow_empty with kind 'store'"):
        open_source(tmp_path / "x.lmdb", allow_empty=True)


def test_classes_of_a_classic_database_may_be_named(image_folder, tmp_path):
    records = [((image_folder / "ant" / "000.jpg").read_bytes(), label) for label in (0, 2, 2, 1)]
    source, names = make_classic(tmp_path / "old.lmdb", records), tmp_path / "names.txt"
    names.write_text("tench\ngoldfish\n")
    result = run("convert", source, tmp_path / "x.lmdb", "--class-names", names)
    assert result.exit_code == 1
    assert "2 class names, but labels up to 2" in result.output
    names.write_text("tench\ngoldfish, red\nshark\nray\n")
    assert run("convert", source, tmp_path / "x.lmdb", "--class-names", names, "--restart").exit_code == 0
    with open_store(tmp_path / "x.lmdb") as store:
        assert store.classes == ["tench", "goldfish, red", "shark", "ray"]
        assert store.labels.tolist() == [0, 2, 2, 1]
        assert [store.name(record) for record in range(4)] == [
            "tench/0.jpg",
            "shark/1.jpg",
            "shark/2.jpg",
            "goldfish, red/3.jpg",
        ]
    result = run("convert", image_folder, tmp_path / "y.lmdb", "--class-names", names)
    assert "names for classes that have names, such as 'ant'; leave out --class-names" in result.output
    names.write_text("a\na\nb\n")
    assert (
        "two classes are named 'a'" in run("convert", source, tmp_path / "z.lmdb", "--class-names", names).output
    )


def test_webdataset_readers_find_every_jpeg(tmp_path):
    """As with to_tuple("jpg", "cls"), which asks for the exact extension."""
    folder = make_image_folder(tmp_path / "images", num_records=3)
    for path in list(folder.rglob("*.jpg")):
        path.rename(path.with_suffix(".JPEG"))
    convert(folder, tmp_path / "x.lmdb")
    done = subprocess.run(
        [sys.executable, "-m", "dali_lmdb", "export", "x.lmdb", "out", "--tar"], cwd=tmp_path, check=False
    )
    assert done.returncode == 0
    listed = subprocess.run(
        ["tar", "tf", tmp_path / "out" / "out-000000.tar"], capture_output=True, text=True, check=True
    )
    members = [f"{record:09d}.{extension}" for record in range(3) for extension in ("jpg", "cls", "json")]
    assert listed.stdout.split() == members
