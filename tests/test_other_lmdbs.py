"""LMDB files of layouts that nobody here reads: said what they hold, and never sent to `convert` in a circle."""

import shutil
import subprocess
import sys

import lmdb
import pytest

from dali_lmdb.convert.sources import open_source
from dali_lmdb.errors import StoreFormatError
from dali_lmdb.inspect import info, verify
from dali_lmdb.store import open_store


def make(path, keys):
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as transaction:
        for key in keys:
            transaction.put(key, b"value")
    return path


@pytest.mark.parametrize(
    ("keys", "described"),
    [
        ([], "with 0 keys; expected"),
        ([b"only"], "with 1 key: 'only'; expected"),
        ([b"num-samples", b"label-1", b"image-1"], "with 3 keys: 'image-1', 'label-1', 'num-samples'; expected"),
        (
            [b"%d\n\xff" % i for i in range(2000)],
            r"with 2,000 keys: '0\n\xff', '1\n\xff', '10\n\xff', ...; expected",
        ),
    ],
    ids=["none", "one", "of text recognition", "many"],
)
def test_the_keys_of_another_layout_are_shown_with_those_that_are_read(keys, described, tmp_path):
    path = make(tmp_path / "x.lmdb", keys)
    for use in (open_source, open_store):
        with pytest.raises(StoreFormatError) as caught:
            use(path)
        assert described in str(caught.value)
        assert "__meta__ as in a store, or __len__ or __keys__ as in a classic database" in str(caught.value)
    with pytest.raises(StoreFormatError) as caught:
        open_source(path, kind="classic")
    assert described in str(caught.value)


def test_a_file_of_named_databases_is_another_layout(tmp_path):
    with lmdb.open(str(tmp_path / "x.lmdb"), subdir=False, lock=False, max_dbs=1) as env:
        env.open_db(b"images")
    with pytest.raises(StoreFormatError, match="with 1 key: 'images'; expected"):
        open_source(tmp_path / "x.lmdb")


@pytest.mark.parametrize(
    ("names", "values", "described"),
    [
        ([b"images", b"labels", b"__len__"], [], "with 3 keys: '__len__', 'images', 'labels'; expected"),
        ([b"__meta__", b"__len__", b"__keys__"], [], "with 3 keys: '__keys__', '__len__', '__meta__'; expected"),
        ([b"images", b"labels"], [b"__len__"], "with 3 keys: '__len__', 'images', 'labels'; expected"),
    ],
    ids=["as the length", "as all", "beside a length"],
)
def test_databases_named_as_keys_of_ours_are_another_layout(names, values, described, tmp_path):
    with lmdb.open(str(tmp_path / "x.lmdb"), subdir=False, lock=False, max_dbs=4) as env:
        with env.begin(write=True) as transaction:
            for key in values:
                transaction.put(key, b"\x02")
        for name in names:
            database = env.open_db(name)
            with env.begin(write=True) as transaction:
                for key in (b"0", b"1", b"__len__"):
                    transaction.put(key, b"value", db=database)
    for use in (open_source, open_store, info, verify):
        with pytest.raises(StoreFormatError, match="an LMDB file of another layout") as caught:
            use(tmp_path / "x.lmdb")
        assert described in str(caught.value)


def test_a_named_database_beside_the_records_of_a_classic_database_is_passed_over(tmp_path):
    with lmdb.open(str(tmp_path / "x.lmdb"), subdir=False, lock=False, max_dbs=1) as env:
        with env.begin(write=True) as transaction:
            transaction.put(b"0", b"\x92\xc4\x01x\x00")  # msgpack of (b"x", 0)
            transaction.put(b"__len__", b"\x01")
        env.open_db(b"extra")
    with open_store(tmp_path / "x.lmdb") as store:
        assert store.labels.tolist() == [0]
        assert bytes(store.read(0)) == b"x"


@pytest.mark.parametrize("use", [open_source, open_store, info, verify])
def test_a_folder_made_by_lmdb_is_the_file_in_it(use, tmp_path):
    with lmdb.open(str(tmp_path / "folder")) as env, env.begin(write=True) as transaction:
        transaction.put(b"image-1", b"value")
    with pytest.raises(StoreFormatError, match="an LMDB file of another layout, with 1 key: 'image-1'") as caught:
        use(tmp_path / "folder")
    assert str(caught.value).startswith(f"{tmp_path}/folder/data.mdb: ")


def test_a_store_in_a_folder_made_by_lmdb_opens_as_a_store(store_path, tmp_path):
    (tmp_path / "folder").mkdir()
    shutil.copy(store_path, tmp_path / "folder" / "data.mdb")
    with open_store(store_path) as store:
        number, fingerprint = len(store), store.fingerprint
    assert info(tmp_path / "folder").fingerprint == fingerprint
    assert open_source(tmp_path / "folder").count() == number
    checked = verify(tmp_path / "folder")
    assert (checked.clean, checked.records) == (True, number)


@pytest.mark.parametrize(
    "words", [["convert", "x.lmdb", "y.lmdb"], ["convert", "x.lmdb", "y.lmdb", "--source", "classic"]]
)
def test_convert_does_not_advise_convert_for_what_it_does_not_read(words, tmp_path):
    make(tmp_path / "x.lmdb", [b"image-1"])
    words = [sys.executable, "-m", "dali_lmdb", *words]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "dali-lmdb convert" not in done.stderr
    assert "unpack its images into class folders" in done.stderr
