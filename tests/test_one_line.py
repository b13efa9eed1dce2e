"""Messages stay on one line, whatever characters are in the names that they cite."""

import json
import os
import pickle
import subprocess
import sys

import lmdb
import pytest
from image_sets import make_image_folder, save_grey

from dali_lmdb import ImageFolderLMDB, RecordError, TorchLoader, TrainTransform
from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.errors import DaliLmdbError, StoreError, one_line
from dali_lmdb.store import open_store

HOSTILE = "a\nb\tc\x1b[31md\u202ee\u2028f\x85g\rh"
SPELT = r"a\nb\tc\x1b[31md\u202ee\u2028f\x85g\rh"


def command(*words, **options):
    return subprocess.run([sys.executable, "-m", "dali_lmdb", *words], capture_output=True, check=False, **options)


def test_what_is_not_printable_is_spelt_out_on_one_line():
    assert one_line(HOSTILE) == SPELT
    assert one_line("tench, Tinca tinca/日本 é.jpg") == "tench, Tinca tinca/日本 é.jpg"
    assert one_line(os.fsdecode(b"x\xff.jpg")) == r"x\xff.jpg"
    assert str(StoreError(f"{HOSTILE}: damaged")) == f"{SPELT}: damaged"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A store called, with a class and records called, by control characters; record 1 is no image."""
    root = tmp_path_factory.mktemp("hostile")
    for folder in (HOSTILE, "ok"):
        (root / "images" / folder).mkdir(parents=True)
        save_grey(root / "images" / folder / f"{HOSTILE}.jpg", 1)
    (root / "images" / HOSTILE / "z\n\x1b.jpg").write_bytes(b"no image")
    convert(root / "images", root / f"{HOSTILE}.lmdb", settings=ConvertSettings(check="none"))
    return root


@pytest.mark.parametrize(
    "words",
    [
        ["info", "STORE"],
        ["info", "no\n\x1bstore"],
        ["verify", "STORE", "--decode"],
        ["export", "STORE", "out\n\x1bhere"],
        ["convert", "STORE", "new\n\x1b.lmdb", "--on-bad", "skip"],
        ["convert", "STORE", "new.lmdb", "--classes", "no\n\x1bclass"],
        ["convert", "images", "new.lmdb", "--source", "folder"],
        ["convert", "images", "new.lmdb", "--classes", "no\n\x1bclass"],
        ["convert", "no\n\x1bsource", "new.lmdb"],
        ["convert", "images", "no\n\x1bfolder/new.lmdb"],
        ["compare", "no\n\x1bstore"],
    ],
    ids=ascii,
)
def test_no_line_of_a_command_is_broken_by_a_name(words, hostile, tmp_path):
    (tmp_path / "images").symlink_to(hostile / "images")
    words = [str(hostile / f"{HOSTILE}.lmdb") if word == "STORE" else word for word in words]
    done = command(*words, cwd=tmp_path, text=True)
    said = done.stdout + done.stderr
    assert said
    lines = said.rstrip("\n").split("\n")
    assert all(line.isprintable() for line in lines), ascii(said)  # what follows a line break in a name is not
    if done.returncode and words[0] != "verify":
        assert len(lines) == 1


def test_the_list_of_bad_images_has_a_line_for_each(hostile, tmp_path):
    with pytest.raises(DaliLmdbError):
        convert(hostile / "images", tmp_path / "x.lmdb")
    lines = (tmp_path / "x.lmdb.bad.tsv").read_text().split("\n")
    assert lines[0] == "name\treason"
    assert lines[1].startswith(rf"{SPELT}/z\n\x1b.jpg" + "\t")
    assert lines[2:] == [""]


def test_the_list_of_bad_images_names_them_as_they_are(tmp_path):
    root = make_image_folder(tmp_path / "images", num_records=3)
    (root / "ant" / "two  blanks .jpg").write_bytes(b"no image")
    with pytest.raises(DaliLmdbError):
        convert(root, tmp_path / "x.lmdb")
    assert "\nant/two  blanks .jpg\t" in (tmp_path / "x.lmdb.bad.tsv").read_text()


@pytest.mark.parametrize("on_bad", ["raise", "substitute"])
def test_a_bad_record_is_named_on_one_line_in_errors_logs_and_quarantine(on_bad, hostile, tmp_path, caplog):
    loader = TorchLoader(
        hostile / f"{HOSTILE}.lmdb",
        transform=TrainTransform(size=32),
        batch_size=3,
        num_workers=0,
        on_bad=on_bad,
        quarantine=tmp_path / "bad.jsonl",
    )
    where = rf"record 1 ({SPELT}/z\n\x1b.jpg)"
    if on_bad == "raise":
        with pytest.raises(RecordError) as caught:
            list(loader)
        said = str(caught.value)
    else:
        assert len(list(loader)) == 1
        (said,) = [record.getMessage() for record in caplog.records]
    assert where in said
    assert said.isprintable()
    (line,) = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert line.isprintable()
    assert json.loads(line)["name"] == f"{HOSTILE}/z\n\x1b.jpg"


def test_a_training_rank_logs_a_name_on_one_line():
    code = "import logging, dali_lmdb.train.rank as rank; rank.show_progress(rank=0); "
    code += "logging.getLogger('dali_lmdb.x').info('going on from %s', 'a\\n\\x1bb')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == r"going on from a\n\x1bb" + "\n"


def test_a_data_set_error_names_a_record_on_one_line(hostile):
    with pytest.raises(RecordError) as caught:
        ImageFolderLMDB(hostile / f"{HOSTILE}.lmdb")[1]
    assert SPELT in str(caught.value)
    assert str(caught.value).isprintable()


def test_keys_of_a_classic_database_do_not_break_a_line(tmp_path):
    path = tmp_path / "x\ny.lmdb"
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as put:
        put.put(b"k\n\x1b", b"no record")
        put.put(b"__keys__", pickle.dumps([b"k\n\x1b"]))
        put.put(b"__len__", pickle.dumps(1))
    store = open_store(path)
    assert store.where(0).isprintable()
    with pytest.raises(DaliLmdbError) as caught:
        store.read(0)
    assert str(caught.value).isprintable()
