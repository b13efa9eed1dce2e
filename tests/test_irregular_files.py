"""Pipes, devices and sockets in the place of files: refused at once, and never waited for."""

import json
import os
import socket
import subprocess
import sys

import lmdb
import numpy as np
import pytest
from image_sets import make_image_folder
from packing import pack, write_parquet

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.convert.sources import KINDS, open_source
from dali_lmdb.errors import ConversionError, RecordError, SourceError, StateError, StoreFormatError
from dali_lmdb.loaders.bad import BadRecords
from dali_lmdb.loaders.folder import FolderStore
from dali_lmdb.store import open_store, sidecar
from dali_lmdb.store.layout import INDEX_DTYPES
from dali_lmdb.train.checkpoint import load
from dali_lmdb.train.metrics import JsonLog

LIMIT_S = 60  # a command that waits for a pipe is killed, and fails the test


def command(*words, **options):
    words = [sys.executable, "-m", "dali_lmdb", *words]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT_S, **options)


def refused_in_one_line(done, found):
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f": {found}, expected a file; " in done.stderr


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize("kind", [None, *(kind for kind in KINDS if kind not in ("folder", "flat"))])
def test_a_pipe_is_no_source_of_any_kind(kind, pipe, tmp_path):
    words = [] if kind is None else ["--source", kind]
    refused_in_one_line(command("convert", pipe, tmp_path / "x.lmdb", *words), "a pipe")


@pytest.mark.parametrize(
    "words",
    [
        ["info", "PIPE"],
        ["verify", "PIPE"],
        ["export", "PIPE", "out"],
        ["compare", "PIPE"],
        ["train", "--train", "PIPE", "--val", "PIPE"],
        ["convert", "IMAGES", "x.lmdb", "--val-labels", "PIPE"],
        ["convert", "PIPE", "x.lmdb", "--val-labels", "LABELS"],
        ["convert", "STORE", "x.lmdb", "--classes-file", "PIPE"],
    ],
    ids=" ".join,
)
def test_no_command_waits_for_a_pipe(words, pipe, tmp_path, image_folder, store_path):
    (tmp_path / "labels.txt").write_text("ant\n")
    places = {"PIPE": pipe, "IMAGES": image_folder, "STORE": store_path, "LABELS": tmp_path / "labels.txt"}
    refused_in_one_line(command(*(places.get(word, word) for word in words), cwd=tmp_path), "a pipe")


def test_standard_input_is_a_source_if_it_is_a_file(tmp_path, image_folder):
    subprocess.run(["tar", "cf", tmp_path / "x.tar", "-C", image_folder, "."], check=True)
    with subprocess.Popen(["cat", tmp_path / "x.tar"], stdout=subprocess.PIPE) as cat:
        done = command("convert", "/dev/stdin", tmp_path / "x.lmdb", stdin=cat.stdout)
    refused_in_one_line(done, "a pipe")
    with open(tmp_path / "x.tar", "rb") as tar:
        assert command("convert", "/dev/stdin", tmp_path / "x.lmdb", stdin=tar).returncode == 0
    assert len(open_store(tmp_path / "x.lmdb")) == 24


def test_devices_sockets_and_folders_are_called_what_they_are(tmp_path, image_folder):
    with pytest.raises(SourceError, match="/dev/zero: a device, expected a file; save its output"):
        open_source("/dev/zero")
    with pytest.raises(StoreFormatError, match="/dev/zero: a device, expected a file; save its output"):
        open_store("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(SourceError, match="socket: a socket, expected a file"):
            open_source(tmp_path / "socket")
    with pytest.raises(SourceError, match="a folder, expected a file; give a file in it"):
        open_source(image_folder, val_labels=tmp_path)


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("gone")], ids=["pipe", "link to nothing"]
)
@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_shard_of_a_folder_that_is_no_file_is_not_left_out(make, kind, tmp_path):
    if kind == "webdataset":
        pack(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.cls", b"0")])
        make(tmp_path / "1.tar")
    else:
        write_parquet(tmp_path / "0.parquet", [("a.jpg", b"x", 0)])
        make(tmp_path / "1.parquet")
    with pytest.raises(
        SourceError, match=r"1\.(tar|parquet): (a pipe, expected a file|cannot be read: No such file)"
    ):
        open_source(tmp_path)


# What is opened without being named.


def test_names_of_classes_beside_shards_are_not_waited_for(tmp_path):
    pack(tmp_path / "0.tar", [("a.jpg", b"x"), ("a.cls", b"0")])
    os.mkfifo(tmp_path / "classes.txt")
    with pytest.raises(SourceError, match=r"classes\.txt: a pipe, expected a file"):
        _ = open_source(tmp_path).classes


def test_a_pipe_in_the_place_of_the_index_of_a_classic_database_is_not_waited_for(tmp_path):
    path = tmp_path / "classic.lmdb"
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as put:
        put.put(b"0", b"\x92\xc4\x01x\x00")  # msgpack of (b"x", 0)
        put.put(b"__len__", b"\x01")
    os.mkfifo(tmp_path / "classic.lmdb.dali-index")
    assert open_store(path).labels.tolist() == [0]


def test_a_pipe_named_as_a_shard_of_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x-00000-of-00001.lmdb")
    with pytest.raises(StoreFormatError, match="a folder, expected an LMDB file"):
        open_store(tmp_path)


def test_a_checkpoint_that_is_a_pipe_is_not_waited_for(pipe):
    with pytest.raises(StateError, match="a pipe, expected a file"):
        load(pipe)


def test_an_image_that_becomes_a_pipe_is_not_waited_for_when_a_folder_is_trained_on(tmp_path):
    root = make_image_folder(tmp_path / "images", num_records=3)
    store = FolderStore(root)
    (root / "ant" / "000.jpg").unlink()
    os.mkfifo(root / "ant" / "000.jpg")
    with pytest.raises(RecordError, match=r"000\.jpg: a pipe, expected a file"):
        store.read(0)


# What is written beside the target, or where the user says.


def _link(path):
    path.with_name("victim").write_text("precious")
    path.symlink_to(path.with_name("victim"))


def _socket(path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


PLANTED = {
    "a pipe": os.mkfifo,
    "a symbolic link": _link,
    "a socket": _socket,
    "a folder": os.mkdir,
}


@pytest.mark.parametrize("restart", [False, True], ids=["resume", "restart"])
@pytest.mark.parametrize("ending", [".partial", ".partial-journal", ".bad.tsv"])
@pytest.mark.parametrize("found", PLANTED)
def test_what_is_planted_beside_the_target_is_neither_used_nor_removed(found, ending, restart, target, images):
    (images / "ant" / "bad.jpg").write_bytes(b"no image")
    planted = target.with_name(target.name + ending)
    PLANTED[found](planted)
    before = os.lstat(planted)
    with pytest.raises(
        ConversionError, match=rf"x\.lmdb{ending}: {found}, expected none or a file that dali_lmdb"
    ):
        convert(images, target, settings=ConvertSettings(on_bad="skip"), restart=restart)
    assert os.path.samestat(os.lstat(planted), before)
    if found == "a symbolic link":
        assert target.with_name("victim").read_text() == "precious"
    assert not target.exists()


def test_a_report_of_bad_images_replaces_the_earlier_one_and_not_another_name_of_it(target, images):
    (images / "ant" / "bad.jpg").write_bytes(b"no image")
    report = target.with_name("x.lmdb.bad.tsv")
    report.write_text("precious")
    os.link(report, target.with_name("victim"))
    convert(images, target, settings=ConvertSettings(on_bad="skip"))
    assert "ant/bad.jpg" in report.read_text()
    assert target.with_name("victim").read_text() == "precious"


def test_a_shard_that_is_a_dangling_link_is_not_replaced(target, images):
    shard = target.with_name("x-00001-of-00002.lmdb")
    shard.symlink_to("gone")
    with pytest.raises(ConversionError, match="a dangling link, which would be replaced; give gone"):
        convert(images, target, shards=2)
    assert shard.is_symlink()


def test_a_link_in_the_place_of_a_new_index_of_a_classic_database_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    partial = tmp_path / f"x.lmdb.dali-index.{os.getpid()}.partial"
    partial.symlink_to("victim")
    columns = {name: np.zeros(1, dtype) for name, dtype in INDEX_DTYPES.items()}
    assert sidecar.save(tmp_path / "x.lmdb", sidecar.Stamp(1, 1, 1), columns)
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_log_that_is_a_pipe_needs_a_reader_from_the_start(pipe):
    with pytest.raises(StateError, match="pipe: cannot be written: No such device or address"):
        JsonLog(pipe, append=False)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with JsonLog(pipe, append=False) as log:
        log.write(step=1)
        assert json.loads(os.read(reader, 100))["step"] == 1
    os.close(reader)
    with JsonLog("/dev/null", append=True) as log:
        log.write(step=1)


def test_a_quarantine_is_no_pipe(pipe, store_path):
    with pytest.raises(ValueError, match=r"quarantine .*pipe: a pipe, expected a file"):
        BadRecords(open_store(store_path), on_bad="substitute", quarantine=pipe)
