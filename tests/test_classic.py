import contextlib
import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import threading
import zlib
from itertools import islice

import lmdb
import numpy as np
import pytest
from classic_databases import PACKINGS, RunsACommand, make_classic
from image_sets import make_image_folder

from dali_lmdb.convert import convert
from dali_lmdb.convert.sources.classic import ClassicSource
from dali_lmdb.convert.sources.store import StoreSource
from dali_lmdb.errors import (
    DaliLmdbError,
    RecordError,
    SourceError,
    StoreDamagedError,
    StoreFormatError,
    StoreNotFoundError,
)
from dali_lmdb.images.kinds import Kind
from dali_lmdb.store import layout, open_store
from dali_lmdb.store.classic import ClassicStore
from dali_lmdb.store.sidecar import sidecar_path

GENUINE = {
    "pa-0.9.0": "pyarrow",
    "pa-0.15.1": "pyarrow",
    "pa-11.0.0": "pyarrow",
    "pickle-protocol2": "pickle-msgpack",
    "pickle-protocol4": "pickle-msgpack",
    "msgpack": "pickle-msgpack",
}
MAKING = "reading it once"

packings = pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS)


def read_all(store):
    return [(bytes(store.read(index)), int(store.labels[index])) for index in range(len(store))]


@pytest.fixture(scope="module")
def records(image_folder):
    """(bytes, label) of every image of ``image_folder``, in its order."""
    classes = sorted(path for path in image_folder.iterdir() if path.is_dir())
    files = [(file, label) for label, folder in enumerate(classes) for file in sorted(folder.iterdir())]
    return [(file.read_bytes(), label) for file, label in files]


@pytest.fixture
def database(records, tmp_path):
    return make_classic(tmp_path / "classic.lmdb", records)


@pytest.mark.parametrize("name", GENUINE)
def test_genuine_databases_read_as_they_were_written(test_data, tmp_path, name):
    path = tmp_path / "classic.lmdb"
    shutil.copyfile(test_data / "classic-lmdb" / f"{name}.lmdb", path)
    truth = json.loads((test_data / "classic-lmdb" / f"TRUTH-{GENUINE[name]}.json").read_text())
    store = open_store(path)
    before = [hashlib.sha256(store.read(index)).hexdigest() for index in range(len(store))]
    labels = store.labels.tolist()
    after = [hashlib.sha256(store.read(index)).hexdigest() for index in range(len(store))]
    assert before == after == [record["sha256"] for record in truth]
    assert labels == [record["label"] for record in truth]
    assert store.classes == [str(label) for label in range(max(labels) + 1)]
    assert (store.column("kind") == Kind.JPEG_BASELINE).sum() > 15
    assert store.column("height").min() > 60


@packings
def test_every_packing_reads_before_and_after_the_index_is_made(records, tmp_path, pack):
    store = open_store(make_classic(tmp_path / "classic.lmdb", records, pack=pack))
    assert [bytes(store.read(index)) for index in range(len(store))] == [data for data, _ in records]
    assert read_all(store) == records


def test_a_folder_with_data_mdb_opens_like_a_file(records, tmp_path):
    path = make_classic(tmp_path / "classic", records, subdir=True)
    assert (path / "data.mdb").is_file()
    store = open_store(path)
    assert read_all(store) == records
    assert read_all(pickle.loads(pickle.dumps(store))) == records
    assert sidecar_path(path / "data.mdb").is_file()


def test_columns_and_fingerprint_equal_those_of_the_converted_images(database, store_path):
    classic, store = open_store(database), open_store(store_path)
    for name in set(layout.INDEX_SCHEMA.names) - {"file_offset"}:
        np.testing.assert_array_equal(classic.column(name), store.column(name), err_msg=name)
        assert classic.column(name).dtype == store.column(name).dtype
    assert classic.fingerprint == store.fingerprint
    assert classic.classes == ["0", "1", "2"]


@packings
def test_file_offsets_say_where_the_images_lie_in_the_file(records, tmp_path, pack):
    path = make_classic(tmp_path / "classic.lmdb", records, pack=pack)
    store, raw = open_store(path), path.read_bytes()
    [(file, offsets, lengths)] = store.byte_ranges(np.arange(len(store)))
    assert file == path
    for index, (image, _) in enumerate(records):
        at, length = int(offsets[index]), int(lengths[index])
        if pack is PACKINGS["pickle-2"]:  # kept as text: the value's place, for readahead
            assert store.column("file_offset")[index] == 0
            assert image.decode("latin-1") in raw[at : at + length].decode("utf-8", "ignore")
        else:
            assert store.column("file_offset")[index] == at
            assert raw[at : at + length] == image


def test_reading_one_record_makes_no_index(database):
    store = open_store(database)
    assert len(store) == 24
    store.read(3)
    assert store.name(3) == "0/3.jpg"
    assert not sidecar_path(database).exists()


def test_names_end_as_the_image_does(tmp_path, image_folder):
    from PIL import Image

    records = []
    for label, format_ in enumerate(["PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG"]):
        file = tmp_path / format_
        Image.new("RGB", (9, 9)).save(file, format=format_)
        records.append((file.read_bytes(), label))
    for pack in (PACKINGS["msgpack"], PACKINGS["pickle-2"]):
        store = open_store(make_classic(tmp_path / f"{id(pack)}.lmdb", records, pack=pack))
        names = [store.name(index) for index in range(6)]
        assert names == ["0/0.png", "1/1.webp", "2/2.bmp", "3/3.tif", "4/4.ppm", "5/5.jpg"]


def test_the_index_is_made_once_and_found_again(database, caplog):
    caplog.set_level(logging.INFO)
    first = open_store(database).column("crc32").tolist()
    assert caplog.text.count(MAKING) == 1
    assert open_store(database).column("crc32").tolist() == first
    assert caplog.text.count(MAKING) == 1


def test_stores_that_want_the_index_at_once_make_it_once(database, caplog):
    caplog.set_level(logging.INFO)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(open_store(database).labels.tolist())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(labels == found[0] for labels in found)
    assert len(found) == 4
    assert caplog.text.count(MAKING) == 1


def test_the_index_of_another_database_of_the_same_name_is_not_used(records, tmp_path):
    path = make_classic(tmp_path / "classic.lmdb", records)
    assert open_store(path).labels.tolist() == [label for _, label in records]
    path.unlink()
    make_classic(path, [(data, 2 - label) for data, label in records])
    assert open_store(path).labels.tolist() == [2 - label for _, label in records]


def test_a_damaged_index_is_made_again(database, records):
    kept = sidecar_path(database)
    open_store(database).labels  # noqa: B018
    good = kept.read_bytes()
    chance = random.Random(3)
    broken = [b"", b"x", good[: len(good) // 2], good[:-100], b"\x00" * len(good)]
    for _ in range(60):
        flipped = bytearray(good)
        flipped[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        broken.append(bytes(flipped))
    for data in broken:
        kept.write_bytes(data)
        assert read_all(open_store(database)) == records


def test_an_index_that_cannot_be_kept_stays_in_memory_and_goes_along_to_workers(database, records, caplog):
    caplog.set_level(logging.INFO)
    sidecar_path(database).mkdir()  # where root, too, cannot write a file
    store = open_store(database)
    assert read_all(store) == records
    assert read_all(pickle.loads(pickle.dumps(store))) == records
    assert caplog.text.count(MAKING) == 1
    assert sorted(path.name for path in database.parent.iterdir()) == [
        "classic.lmdb",
        "classic.lmdb.dali-index",
    ]


def test_keys_of_other_spelling_and_order_are_followed(records, tmp_path):
    keys = [b"%05d.jpg" % (7 * index % 24) for index in range(24)]
    store = open_store(make_classic(tmp_path / "classic.lmdb", records, keys=keys))
    assert [bytes(store.read(index)) for index in range(24)] == [data for data, _ in records]
    assert read_all(store) == records
    assert store.name(1) == "0/00007.jpg.jpg"


def test_a_database_without_a_list_of_keys_is_read_in_the_order_of_its_numbers(records, tmp_path):
    store = open_store(make_classic(tmp_path / "classic.lmdb", records, __keys__=None))
    assert read_all(store) == records


def test_a_database_without_a_length_counts_its_keys(records, tmp_path):
    store = open_store(make_classic(tmp_path / "classic.lmdb", records, __len__=None))
    assert read_all(store) == records


def test_an_empty_database_opens(tmp_path):
    store = open_store(make_classic(tmp_path / "classic.lmdb", []))
    assert (len(store), store.classes, store.labels.tolist()) == (0, [], [])


def test_what_is_no_image_has_no_size(tmp_path, records):
    store = open_store(make_classic(tmp_path / "classic.lmdb", [(b"<html>", 0), (b"", 1), records[0]]))
    assert store.column("height").tolist()[:2] == [0, 0]
    assert store.column("kind").tolist() == [Kind.UNKNOWN, Kind.UNKNOWN, Kind.JPEG_BASELINE]
    assert [bytes(store.read(index)) for index in range(2)] == [b"<html>", b""]


def refused_in_one_line(error, action, *words):
    with pytest.raises(error) as caught:
        action()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_record_that_would_run_a_command_is_refused_wherever_it_is_read(tmp_path, records, protocol):
    marker = tmp_path / "was-run"
    bomb = pickle.dumps((RunsACommand(marker), 1), protocol=protocol)
    path = make_classic(tmp_path / "classic.lmdb", records, pack=PACKINGS[f"pickle-{protocol}"], values={5: bomb})
    store = open_store(path)
    words = ("record 5 (key '5')", "refused: a pickle that calls posix.system")
    refused_in_one_line(RecordError, lambda: store.read(5), *words)
    refused_in_one_line(RecordError, lambda: store.name(5), *words)
    refused_in_one_line(RecordError, lambda: store.labels, *words)
    refused_in_one_line(DaliLmdbError, lambda: convert(ClassicSource(path), tmp_path / "out.lmdb"), *words)
    assert not (tmp_path / "out.lmdb").exists()
    assert not marker.exists()


@pytest.mark.parametrize("key", ["__len__", "__keys__"])
def test_a_length_or_key_list_that_would_run_a_command_is_refused(tmp_path, records, key):
    marker = tmp_path / "was-run"
    path = make_classic(tmp_path / "classic.lmdb", records, **{key: pickle.dumps(RunsACommand(marker))})
    refused_in_one_line(StoreFormatError, lambda: open_store(path).labels, key, "posix.system")
    assert not marker.exists()


MALFORMED = {
    "a record is missing": ({"7": None}, StoreDamagedError, "record 7"),
    "the length is too large": ({"__len__": PACKINGS["msgpack"](10**6)}, StoreDamagedError, "1000000 records"),
    "the length is huge": ({"__len__": PACKINGS["pickle-4"](1 << 62)}, StoreDamagedError, "__len__"),
    "the length is too small": ({"__len__": PACKINGS["msgpack"](23)}, StoreDamagedError, "says 23"),
    "the length is negative": ({"__len__": PACKINGS["msgpack"](-1)}, StoreFormatError, "__len__"),
    "the length is text": ({"__len__": b"\xa224"}, StoreFormatError, "__len__"),
    "the length is empty": ({"__len__": b""}, StoreFormatError, "__len__"),
    "the keys are a number": ({"__keys__": b"\x07"}, StoreFormatError, "__keys__"),
    "a key is there twice": (
        {"__keys__": PACKINGS["msgpack"]([b"1", *(b"%d" % index for index in range(1, 24))])},
        StoreDamagedError,
        "lists 23 keys",
    ),
    "a key that is not there": (
        {"__keys__": PACKINGS["msgpack"]([b"x", *(b"%d" % index for index in range(1, 24))])},
        StoreDamagedError,
        "key 'x'",
    ),
    "a label that would need a billion classes": (
        {"3": PACKINGS["msgpack"]((b"x", 10**9))},
        RecordError,
        "its label is 1000000000",
    ),
    "a record of another kind": ({"3": b"raw bytes"}, RecordError, "record 3 (key '3')"),
}


@pytest.mark.parametrize(("changes", "error", "words"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_database_is_refused(records, tmp_path, changes, error, words):
    path = make_classic(tmp_path / "classic.lmdb", records, **changes)
    refused_in_one_line(error, lambda: open_store(path).labels, words, str(path))


def test_other_files_are_refused(tmp_path, database):
    refused_in_one_line(StoreNotFoundError, lambda: ClassicStore(tmp_path / "none"))
    refused_in_one_line(StoreFormatError, lambda: ClassicStore(tmp_path), "a folder")
    with lmdb.open(str(tmp_path / "other.lmdb"), subdir=False, lock=False) as env, env.begin(write=True) as put:
        put.put(b"a", b"b")
    refused_in_one_line(StoreFormatError, lambda: ClassicStore(tmp_path / "other.lmdb"), "__len__")
    refused_in_one_line(StoreFormatError, lambda: open_store(tmp_path / "other.lmdb"))
    os.truncate(database, database.stat().st_size - 4096)
    refused_in_one_line(StoreDamagedError, lambda: open_store(database), "truncated")


def test_record_numbers_outside_the_database_are_index_errors(database):
    store = open_store(database)
    for index in (-1, 24):
        for action in (store.read, store.name, store.copy):
            with pytest.raises(IndexError):
                action(index)


@pytest.mark.parametrize("name", ["pickle-2", "pickle-4", "msgpack", "pa-0.9", "pa-1.0"])
def test_flipped_bits_anywhere_end_in_a_result_or_one_of_our_errors(tmp_path, name):
    small = [(b"\xff\xd8" + bytes([index]) * 30 * (1 + index % 90), index % 3) for index in range(40)]
    path = make_classic(tmp_path / "classic.lmdb", small, pack=PACKINGS[name])
    good, chance = path.read_bytes(), random.Random(11)
    for _ in range(60):
        flipped = bytearray(good)
        for _ in range(chance.choice([1, 4, 40])):
            flipped[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        path.unlink()
        path.write_bytes(flipped)
        sidecar_path(path).unlink(missing_ok=True)
        with contextlib.suppress(DaliLmdbError):
            store = open_store(path)
            for index in range(min(len(store), 60)):
                with contextlib.suppress(DaliLmdbError):
                    store.read(index)
            read_all(store)


def test_image_folder_lmdb_gives_the_images_of_the_database(database, image_folder):
    from torchvision.datasets import ImageFolder

    from dali_lmdb import ImageFolderLMDB

    classic, folder = ImageFolderLMDB(database), ImageFolder(str(image_folder))
    assert len(classic) == len(folder)
    for (ours, our_label), (theirs, their_label) in zip((classic[i] for i in range(24)), folder, strict=True):
        assert (ours.tobytes(), our_label) == (theirs.tobytes(), their_label)


@pytest.mark.parametrize("pack", ["msgpack", "pickle-2"])
def test_both_loaders_take_a_database_as_it_is(records, store_path, tmp_path, pack):
    import torch

    from dali_lmdb import DaliLoader, EvalTransform, TorchLoader

    path = make_classic(tmp_path / "classic.lmdb", records, pack=PACKINGS[pack])
    settings = {"transform": EvalTransform(size=32, resize=36), "batch_size": 10, "device": "cpu"}
    for make in (DaliLoader, TorchLoader):
        extra = {"num_threads": 1} if make is DaliLoader else {"num_workers": 0}
        with make(path, **settings, **extra) as classic, make(store_path, **settings, **extra) as converted:
            assert classic.state_dict() == converted.state_dict()
            for ours, theirs in zip(classic, converted, strict=True):
                assert torch.equal(ours[0], theirs[0])
                assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("subdir", [False, True])
def test_training_takes_a_database_as_it_is(records, tmp_path, subdir):
    from dali_lmdb.train import TrainSettings, train

    path = str(make_classic(tmp_path / "classic", records, subdir=subdir))
    log = tmp_path / "log.jsonl"
    settings = TrainSettings(
        train=path,
        val=path,
        arch="squeezenet1_1",
        epochs=1,
        batch_size=12,
        size=32,
        workers=1,
        device="cpu",
        output=str(tmp_path / "run"),
        log_json=str(log),
    )
    train(settings)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1]["val_records"] == 24


@packings
def test_converting_a_database_gives_its_records(records, tmp_path, pack):
    path = make_classic(tmp_path / "classic.lmdb", records, pack=pack)
    summary = convert(ClassicSource(path), tmp_path / "out.lmdb")
    store = open_store(tmp_path / "out.lmdb")
    assert summary.records == 24
    assert read_all(store) == records
    assert store.classes == ["0", "1", "2"]
    assert [store.name(index) for index in (0, 10, 23)] == ["0/0.jpg", "1/10.jpg", "2/23.jpg"]
    assert store.fingerprint == open_store(path).fingerprint


def test_converting_makes_no_index_beside_the_database(database, tmp_path):
    convert(ClassicSource(database), tmp_path / "out.lmdb")
    assert not sidecar_path(database).exists()


def test_a_source_knows_its_classes_before_its_items_are_listed(database):
    assert ClassicSource(database).classes == ["0", "1", "2"]


@pytest.mark.parametrize("num_listed", [0, 1, 20, 24])
def test_classes_are_the_same_however_many_items_were_listed_before(num_listed, records, tmp_path):
    source = ClassicSource(make_classic(tmp_path / "classic.lmdb", records[::-1]))
    for _ in range(2):
        assert len(list(islice(source.items(), num_listed))) == num_listed
    assert source.classes == ["0", "1", "2"]


def test_a_source_is_another_one_when_the_database_changed(database, records):
    before = ClassicSource(database).identity()
    assert ClassicSource(database).identity() == before
    json.dumps(before)
    database.unlink()
    make_classic(database, records[::-1])
    assert ClassicSource(database).identity() != before


def test_a_store_converts_to_an_equal_store(store_path, tmp_path):
    convert(StoreSource(store_path), tmp_path / "out.lmdb")
    old, new = open_store(store_path), open_store(tmp_path / "out.lmdb")
    assert read_all(new) == read_all(old)
    assert new.classes == old.classes
    assert [new.name(index) for index in range(24)] == [old.name(index) for index in range(24)]
    assert new.fingerprint == old.fingerprint


def test_a_subset_keeps_order_names_and_bytes_and_numbers_its_classes_anew(store_path, tmp_path):
    source = StoreSource(store_path, classes=["cat", "ant"], per_class=3)
    assert source.classes == ["ant", "cat"]
    assert source.count() == 6
    convert(source, tmp_path / "out.lmdb")
    old, new = open_store(store_path), open_store(tmp_path / "out.lmdb")
    wanted = [0, 1, 2, 16, 17, 18]
    assert [new.name(index) for index in range(6)] == [old.name(index) for index in wanted]
    assert read_all(new) == [(bytes(old.read(i)), label) for i, label in zip(wanted, [0, 0, 0, 1, 1, 1])]  # noqa: B905
    assert new.classes == ["ant", "cat"]


def test_the_first_of_each_class_are_taken_where_classes_are_mixed(records, tmp_path):
    mixed = [records[8 * (index % 3) + index // 3] for index in range(24)]
    source = StoreSource(make_classic(tmp_path / "classic.lmdb", mixed), per_class=2)
    assert [(item.read(), item.label) for item in source.items()] == mixed[:6]


def test_the_same_records_are_taken_however_many_are_looked_at_together(store_path):
    def all_taken(**how):
        for options in ({}, {"classes": ["cat", "ant"]}, {"per_class": 3}, {"classes": ["bee"], "per_class": 5}):
            source = StoreSource(store_path, **options, **how)
            yield [(item.name, item.label) for item in source.items()], source.count(), source.identity()

    expected = list(all_taken())
    assert [count for _, count, _ in expected] == [24, 16, 9, 5]
    for at_a_time in (1, 2, 7, 24):
        assert list(all_taken(records_at_a_time=at_a_time)) == expected


def test_more_of_a_class_than_there_are_means_all(store_path):
    assert StoreSource(store_path, per_class=1000).count() == 24


def test_the_identity_of_a_store_source_tells_what_is_taken(store_path):
    identities = [
        StoreSource(store_path, **options).identity()
        for options in ({}, {"classes": ["ant"]}, {"per_class": 2}, {"classes": ["bee"], "per_class": 2})
    ]
    assert len({json.dumps(identity) for identity in identities}) == 4
    assert StoreSource(store_path, classes=["cat", "bee", "ant"]).identity() == identities[0]


def test_a_subset_of_nothing_is_refused(store_path):
    refused_in_one_line(SourceError, lambda: StoreSource(store_path, classes=["dog"]), "'dog'", "ant")
    refused_in_one_line(SourceError, lambda: StoreSource(store_path, classes=[]), "no records")
    refused_in_one_line(ValueError, lambda: StoreSource(store_path, per_class=0), "per_class is 0")


def test_a_damaged_record_of_a_store_is_not_converted(tmp_path):
    convert(make_image_folder(tmp_path / "images"), tmp_path / "in.lmdb")
    store = open_store(tmp_path / "in.lmdb")
    at = int(store.column("file_offset")[4]) + 200
    with open(tmp_path / "in.lmdb", "r+b") as file:
        file.seek(at)
        file.write(bytes([255 - store.read(4)[200]]))
    items = list(StoreSource(tmp_path / "in.lmdb").items())
    assert zlib.crc32(items[3].read()) == store.column("crc32")[3]
    refused_in_one_line(SourceError, items[4].read, "record 4", "wrong checksum")
