import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from conversions import write_with
from damage import NO_IMAGE
from image_sets import make_image_folder, save_noise
from PIL import Image

from dali_lmdb.cli import main
from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.errors import ConversionError, DaliLmdbError, RecordError, StoreError
from dali_lmdb.images.gpu_decoder import gpu_decoder
from dali_lmdb.images.kinds import Kind
from dali_lmdb.inspect import Spread, export, info, verify
from dali_lmdb.inspect.paths import record_paths
from dali_lmdb.store import Meta, layout, open_store
from dali_lmdb.store.pages import PageFile
from dali_lmdb.store.writer import StoreWriter

TESTS = Path(__file__).resolve().parent


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def write_store(path, names, *, values=None, classes=("ant", "bee"), **columns):
    """A store of any names and columns, as no converter would write it; labels are 0, 1, 0, 1 ..."""
    values = values or [f"value {index}".encode() * 10 for index in range(len(names))]
    with StoreWriter(path) as writer:
        if values:
            writer.commit(values)
        number = len(names)
        offsets, lengths = writer.record_extents(0, number)
        defaults = {
            "label": np.arange(number, dtype=np.int32) % len(classes),
            "height": np.zeros(number, np.int32),
            "width": np.zeros(number, np.int32),
            "num_bytes": lengths,
            "crc32": np.array([zlib.crc32(value) for value in values], np.uint32),
            "file_offset": offsets,
            "kind": np.zeros(number, np.uint8),
            "change": np.zeros(number, np.uint8),
        }
        writer.add_index({**defaults, **columns}, pa.array(names, pa.string()))
        writer.finish(classes=list(classes), made={})
    return path


def change_key(path, key, value):
    """Put or, with None, delete one key of a store's file."""
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as transaction:
        assert transaction.delete(key) if value is None else transaction.put(key, value)


def flip(path, *offsets):
    with open(path, "r+b") as file:
        for offset in offsets:
            byte = os.pread(file.fileno(), 1, offset)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 0x10]), offset)


def offset_of(path, key):
    offset, length = PageFile(path).find(key)
    return offset + length // 2


def files_in(folder):
    """Path inside the folder -> bytes; None for folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


@pytest.fixture
def copy(store_path, tmp_path):
    """A store to damage: 24 grey images in 3 classes."""
    return Path(shutil.copy(store_path, tmp_path / "copy.lmdb"))


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory):
    """Images of many kinds: class a has four, class b two."""
    folder = tmp_path_factory.mktemp("mixed") / "images"
    (folder / "a" / "deep").mkdir(parents=True)
    (folder / "b").mkdir()
    save_noise(folder / "a" / "baseline.jpg", seed=0, size=(50, 60))
    save_noise(folder / "a" / "deep" / "PROGRESSIVE.JPEG", seed=1, size=(70, 20), progressive=True)
    save_noise(folder / "a" / "lossless.png", seed=2, size=(10, 90))
    Image.new("L", (31, 33)).save(folder / "a" / "grey.jpg")
    Image.new("CMYK", (40, 40)).save(folder / "b" / "four.jpg")
    save_noise(folder / "b" / "other.webp", seed=3, size=(50, 60))
    return folder


@pytest.fixture(scope="module")
def mixed_store(mixed_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("mixed") / "mixed.lmdb"
    convert(mixed_folder, path)
    return path


# info


def test_info_counts_records_classes_sizes_and_kinds(mixed_store, mixed_folder):
    found = info(mixed_store)
    assert (found.records, found.classes) == (6, 2)
    assert found.class_records == {"a": 4, "b": 2}
    assert found.per_class == Spread(min=2, median=3.0, max=4)
    assert found.height == Spread(min=10, median=45.0, max=70)
    assert found.width == Spread(min=20, median=50.0, max=90)
    sizes = [path.stat().st_size for path in mixed_folder.rglob("*.*")]
    assert found.num_bytes == sum(sizes)
    assert found.record_bytes == Spread(min=min(sizes), median=float(np.median(sizes)), max=max(sizes))
    assert found.file_bytes == mixed_store.stat().st_size
    kinds = ("JPEG_BASELINE", "JPEG_PROGRESSIVE", "JPEG_GRAYSCALE", "JPEG_CMYK", "PNG", "WEBP")
    assert found.kinds == dict.fromkeys(kinds, 1)
    assert (found.decoders.gpu, found.decoders.cpu, found.decoders.none) == (3, 3, 0)
    with open_store(mixed_store) as store:
        assert found.fingerprint == store.fingerprint
    assert found.made["source"]["kind"] == "folder"


def test_info_counts_what_the_converter_changed(mixed_folder, tmp_path):
    settings = ConvertSettings(transcode=True, resize=40)
    convert(mixed_folder, tmp_path / "changed.lmdb", settings=settings)
    found = info(tmp_path / "changed.lmdb")
    assert (found.transcoded, found.resized) == (3, 2)  # PNG, CMYK, WebP; the 50 x 60 JPEG and WebP
    assert found.decoders.gpu == 6


def test_info_says_that_nothing_was_looked_at(mixed_folder, tmp_path):
    convert(mixed_folder, tmp_path / "unseen.lmdb", settings=ConvertSettings(check="none"))
    found = info(tmp_path / "unseen.lmdb")
    assert (found.not_looked_at, found.decoders.none, found.height) == (6, 6, None)
    assert "6 of them not inspected" in run("info", tmp_path / "unseen.lmdb").output


def test_info_reads_no_record(copy):
    expected = info(copy)
    flip(copy, *(offset_of(copy, layout.record_key(record)) for record in range(24)))
    assert info(copy) == expected


def test_info_of_a_store_without_records_says_so(tmp_path):
    found = info(write_store(tmp_path / "empty.lmdb", []))
    assert (found.records, found.per_class, found.height) == (0, Spread(min=0, median=0.0, max=0), None)
    assert run("info", tmp_path / "empty.lmdb").exit_code == 0


def test_info_names_an_unknown_kind_by_its_number(tmp_path):
    write_store(tmp_path / "new.lmdb", ["ant/0", "bee/1"], kind=np.array([99, 1], np.uint8))
    assert info(tmp_path / "new.lmdb").kinds == {"JPEG_BASELINE": 1, "kind 99": 1}


def test_info_of_shards_is_that_of_all_of_them(image_folder, store_path, tmp_path):
    convert(image_folder, tmp_path / "set.lmdb", shards=3)
    found, one = info(tmp_path / "set.lmdb"), info(store_path)
    assert [shard.records for shard in found.shards] == [8, 8, 8]
    assert (found.records, found.class_records, found.kinds) == (one.records, one.class_records, one.kinds)


def test_info_command_prints_a_table_or_json(mixed_store):
    table = run("info", mixed_store)
    assert table.exit_code == 0
    assert "on the GPU" in table.output
    assert f"{gpu_decoder()} decodes 3 with --decode-device gpu" in table.output
    printed = json.loads(run("info", mixed_store, "--json").output)
    assert (printed["records"], printed["decoders"]) == (6, {"gpu": 3, "cpu": 3, "none": 0})


@pytest.mark.parametrize("command", ["info", "verify", "export"])
def test_command_says_in_one_line_that_there_is_no_store(command, tmp_path):
    more = [tmp_path / "out"] if command == "export" else []
    result = run(command, tmp_path / "none.lmdb", *more)
    assert result.exit_code == 1
    assert result.output.startswith("Error: no store at ")
    assert len(result.output.splitlines()) == 1


# verify


def test_verify_finds_nothing_in_a_whole_store(store_path):
    found = verify(store_path, decode=True)
    assert found.clean
    assert (found.damage, found.notes) == ((), ())
    assert found.records == 24
    assert found.num_bytes == info(store_path).num_bytes


def test_verify_command_has_exit_code_1_for_damage_and_lists_it(copy):
    result = run("verify", copy)
    assert (result.exit_code, result.output.count("\n")) == (0, 1)
    assert "clean: 24 records" in result.output
    flip(copy, offset_of(copy, layout.record_key(9)))
    result = run("verify", copy)
    assert result.exit_code == 1
    assert result.output.splitlines()[0] == f"{copy}: record 9 (bee/009.jpg): wrong checksum"
    printed = json.loads(run("verify", copy, "--json").output)
    assert (printed["clean"], printed["num_damage"]) == (False, 1)


def test_verify_goes_on_after_the_first_damage(copy):
    flip(copy, *(offset_of(copy, layout.record_key(record)) for record in (3, 17)))
    assert verify(copy).damage == (
        f"{copy}: record 3 (ant/003.jpg): wrong checksum",
        f"{copy}: record 17 (cat/017.jpg): wrong checksum",
    )


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (layout.index_key(0), "__index__ has a wrong checksum"),
        (layout.names_key(0), "__names__ is not readable"),
    ],
)
def test_verify_names_the_damaged_part(copy, key, expected):
    flip(copy, offset_of(copy, key))
    found = verify(copy)
    assert len(found.damage) == 1
    assert expected in found.damage[0]


def test_verify_names_damaged_metadata(copy):
    flip(copy, PageFile(copy).find(layout.META_KEY).offset)
    assert ["__meta__ is not JSON" in line for line in verify(copy).damage] == [True]


def test_verify_checks_records_without_names(copy):
    flip(copy, offset_of(copy, layout.names_key(0)), offset_of(copy, layout.record_key(9)))
    assert f"{copy}: record 9: wrong checksum" in verify(copy).damage


def test_verify_finds_the_records_beside_a_damaged_key(copy):
    with open(copy, "r+b") as file:
        content = file.read()
        place = content.index(layout.record_key(5) + b"\xff\xd8")  # the key, then the JPEG itself
        os.pwrite(file.fileno(), layout.record_key(6), place)
    found = verify(copy)
    assert any("structure" in line for line in found.damage)
    assert f"{copy}: record 5 (ant/005.jpg): missing" in found.damage
    assert found.records >= 22
    assert not any("record 20 " in line for line in found.damage)


def test_verify_reports_a_truncated_store(copy):
    os.truncate(copy, copy.stat().st_size - 4096)
    assert any("truncated" in line for line in verify(copy).damage)
    assert run("verify", copy).exit_code == 1


def test_verify_reports_missing_and_foreign_keys(copy):
    change_key(copy, layout.record_key(4), None)
    change_key(copy, b"zoo", b"")
    change_key(copy, b"zoo2", b"")
    damage = verify(copy).damage
    assert f"{copy}: record 4 (ant/004.jpg): missing" in damage
    assert f"{copy}: 28 keys, expected 27" in damage


def test_verify_reports_a_record_of_another_length(copy):
    change_key(copy, layout.record_key(4), b"short")
    assert any("record 4 (ant/004.jpg): 5 bytes, the index says" in line for line in verify(copy).damage)


def test_verify_reports_a_fingerprint_of_other_data(copy):
    pages = PageFile(copy)
    meta = Meta.from_bytes(bytes(pages.view(pages.find(layout.META_KEY))), path=copy)
    change_key(copy, layout.META_KEY, replace(meta, fingerprint="0" * 32).to_bytes())
    assert any(f"fingerprint {'0' * 32}, the index has " in line for line in verify(copy).damage)


def test_verify_compares_sizes_and_kinds_with_the_images(mixed_folder, tmp_path):
    values = [(mixed_folder / name).read_bytes() for name in ("a/baseline.jpg", "a/lossless.png", "a/grey.jpg")]
    path = write_store(
        tmp_path / "wrong.lmdb",
        ["ant/0.jpg", "bee/1.png", "ant/2.jpg", "bee/3.jpg"],
        values=[*values, b"no image"],
        height=np.array([50, 10, 33, 5], np.int32),
        width=np.array([60, 91, 31, 5], np.int32),
        kind=np.array([Kind.JPEG_BASELINE, Kind.PNG, Kind.JPEG_BASELINE, Kind.BMP], np.uint8),
    )
    assert [line.split(": ", 1)[1] for line in verify(path).damage] == [
        "record 1 (bee/1.png): PNG, 90 x 10 pixels, the index says PNG, 91 x 10 pixels",
        "record 2 (ant/2.jpg): JPEG_GRAYSCALE, 31 x 33 pixels, the index says JPEG_BASELINE, 31 x 33 pixels",
        f"record 3 (bee/3.jpg): {NO_IMAGE}, the index says BMP, 5 x 5 pixels",
    ]


def test_verify_reports_labels_out_of_range(tmp_path):
    path = write_store(tmp_path / "wild.lmdb", ["a", "b", "c"], label=np.array([0, -1, 2], np.int32))
    assert [line.split(": ", 1)[1] for line in verify(path).damage] == [
        "record 1 (b): label -1, expected 0 to 1",
        "record 2 (c): label 2, expected 0 to 1",
    ]


def test_verify_reports_names_that_occur_twice(tmp_path):
    path = write_store(tmp_path / "twice.lmdb", ["ant/0", "bee/0", "ant/0", "ant/0"], classes=("ant", "ant"))
    assert [line.split(": ", 1)[1] for line in verify(path).damage] == [
        "duplicate class names",
        "record 2 (ant/0): the same name as record 0",
        "record 3 (ant/0): the same name as record 0",
    ]


def test_verify_keeps_to_one_line_a_record_whatever_its_name(tmp_path):
    path = write_store(tmp_path / "lines.lmdb", ["a\nb\x1b[2J"], label=np.array([7], np.int32))
    assert verify(path).damage[0].endswith(r"record 0 (a\nb\x1b[2J): label 7, expected 0 to 1")


def test_verify_reports_offsets_that_readers_would_trust(tmp_path):
    """Readers look at the first and last record only to see whether a file was rewritten."""
    values = [bytes([record]) * 5000 for record in range(4)]
    good = write_store(tmp_path / "good.lmdb", list("abcd"), values=values)
    with open_store(good) as store:
        offsets = store.column("file_offset").copy()
    offsets[1] = offsets[2]
    bad = write_store(tmp_path / "bad.lmdb", list("abcd"), values=values, file_offset=offsets)
    assert any("record 1 (b): is at offset " in line for line in verify(bad).damage)


def test_a_compacted_copy_is_clean_with_a_note(tmp_path):
    values = [bytes([record]) * 5000 for record in range(4)]
    path = write_store(tmp_path / "one.lmdb", list("abcd"), values=values)
    two = tmp_path / "two.lmdb"
    with lmdb.open(str(path), subdir=False, lock=False, readonly=True) as env, open(two, "wb") as file:
        env.copyfd(file.fileno(), compact=True)
    found = verify(two)
    assert found.clean
    assert found.records == 4
    assert "4 file offsets are stale" in found.notes[0]


def test_verify_with_decode_finds_what_headers_do_not_show(tmp_path):
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    save_noise(folder / "a" / "0.jpg", seed=0)
    save_noise(folder / "a" / "1.jpg", seed=1)
    os.truncate(folder / "a" / "1.jpg", (folder / "a" / "1.jpg").stat().st_size // 2)
    convert(folder, tmp_path / "cut.lmdb")
    assert verify(tmp_path / "cut.lmdb").clean
    found = verify(tmp_path / "cut.lmdb", decode=True)
    assert ["record 1 (a/1.jpg): " in line for line in found.damage] == [True]


def test_verify_takes_records_that_nobody_looked_at(image_folder, tmp_path):
    convert(image_folder, tmp_path / "unseen.lmdb", settings=ConvertSettings(check="none"))
    found = verify(tmp_path / "unseen.lmdb")
    assert found.clean
    assert "24 records were stored uninspected" in found.notes[0]


def test_verify_checks_every_shard(image_folder, tmp_path):
    convert(image_folder, tmp_path / "set.lmdb", shards=3)
    shards = sorted(tmp_path.glob("set-*.lmdb"))
    assert verify(tmp_path / "set.lmdb").records == 24
    flip(shards[0], offset_of(shards[0], layout.index_key(0)))
    flip(shards[2], offset_of(shards[2], layout.record_key(7)))
    first, second = verify(tmp_path / "set.lmdb").damage
    assert first.startswith(f"{shards[0]}: damaged: __index__")
    assert second == f"{shards[2]}: record 7 (cat/023.jpg): wrong checksum"


def test_verify_of_a_classic_database_names_what_cannot_be_read(image_folder, tmp_path):
    image = (image_folder / "ant" / "000.jpg").read_bytes()
    with lmdb.open(str(tmp_path / "classic.lmdb"), subdir=False, lock=False) as env, env.begin(write=True) as put:
        for index, value in enumerate([pickle.dumps((image, 0)), b"\x80\x04oops", pickle.dumps((b"no image", 1))]):
            put.put(b"%d" % index, value)
        put.put(b"__len__", pickle.dumps(3))
    found = verify(tmp_path / "classic.lmdb")
    assert found.records == 2
    assert ["record 1 " in line for line in found.damage] == [True]
    found = verify(tmp_path / "classic.lmdb", decode=True)
    assert [line.split("record ")[1][0] for line in found.damage] == ["1", "2"]


def test_odd_images_are_stored_checked_and_exported_as_they_are(test_data, tmp_path):
    folder = tmp_path / "images" / "odd"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted((test_data / "odd-images").iterdir())):
        shutil.copyfile(path, folder / f"{number:03}.jpg")
    convert(folder.parent, tmp_path / "odd.lmdb", settings=ConvertSettings(check="none"))
    assert verify(tmp_path / "odd.lmdb").clean
    assert verify(tmp_path / "odd.lmdb", decode=True).num_damage > 100
    assert info(tmp_path / "odd.lmdb").records == len(list(folder.iterdir()))
    export(tmp_path / "odd.lmdb", tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(folder.parent)


def test_each_odd_file_is_stored_and_decodes_or_is_named_in_the_report(test_data, tmp_path):
    folder = tmp_path / "images" / "odd"
    folder.mkdir(parents=True)
    for path in (test_data / "odd-images").iterdir():
        if path.name != "MANIFEST.tsv":
            shutil.copyfile(path, folder / path.name)
    summary = convert(
        folder.parent, tmp_path / "odd.lmdb", settings=ConvertSettings(check="decode", on_bad="skip")
    )
    (report,) = summary.reports
    named = [line.split("\t")[0] for line in Path(report).read_text().splitlines()[1:]]
    with open_store(tmp_path / "odd.lmdb") as store:
        stored = [store.name(record) for record in range(len(store))]
        for record in range(len(store)):
            with Image.open(io.BytesIO(store.read(record))) as image:
                image.convert("RGB")
    assert sorted(stored + named) == sorted(f"odd/{path.name}" for path in folder.iterdir())
    assert summary.records > 100 < len(named)
    assert verify(tmp_path / "odd.lmdb", decode=True).clean
    assert info(tmp_path / "odd.lmdb").records == summary.records


# export


def test_export_gives_the_source_back_byte_for_byte(mixed_store, mixed_folder, tmp_path):
    done = export(mixed_store, tmp_path / "out")
    assert (done.records, done.classes, done.tars) == (6, 2, 0)
    assert files_in(tmp_path / "out") == files_in(mixed_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_export_of_shards_is_that_of_one_store(image_folder, tmp_path):
    convert(image_folder, tmp_path / "set.lmdb", shards=3)
    export(tmp_path / "set.lmdb", tmp_path / "out")
    assert files_in(tmp_path / "out") == files_in(image_folder)


def test_export_of_a_classic_database_sorts_images_by_label(image_folder, tmp_path):
    image = (image_folder / "ant" / "000.jpg").read_bytes()
    with lmdb.open(str(tmp_path / "classic.lmdb"), subdir=False, lock=False) as env, env.begin(write=True) as put:
        put.put(b"0", pickle.dumps((image, 1)))
        put.put(b"__len__", pickle.dumps(1))
    export(tmp_path / "classic.lmdb", tmp_path / "out")
    assert files_in(tmp_path / "out") == {"0": None, "1": None, "1/0.jpg": image}


def test_export_makes_folders_of_classes_without_records(tmp_path):
    write_store(tmp_path / "one.lmdb", ["bee/x.jpg"], classes=("ant", "bee"), label=np.array([1], np.int32))
    export(tmp_path / "one.lmdb", tmp_path / "out")
    assert files_in(tmp_path / "out") == {"ant": None, "bee": None, "bee/x.jpg": b"value 0" * 10}


def test_export_puts_a_name_without_class_into_its_classs_folder(tmp_path):
    write_store(tmp_path / "flat.lmdb", ["x.jpg", "x.jpg", "antler/y.jpg"])
    export(tmp_path / "flat.lmdb", tmp_path / "out")
    written = [name for name, data in files_in(tmp_path / "out").items() if data]
    assert written == ["ant/antler/y.jpg", "ant/x.jpg", "bee/x.jpg"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../x", "leaves the folder"),
        ("ant/../../x", "leaves the folder"),
        ("ant/..", "leaves the folder"),
        ("/tmp/x", "is absolute"),
        ("ant/x\0.jpg", "has a NUL"),
        ("", "is not a plain path"),
        ("ant//x", "is not a plain path"),
        ("ant/./x", "is not a plain path"),
        ("ant/", "is not a plain path"),
    ],
    ids=ascii,
)
def test_export_refuses_names_that_are_not_paths_inside_the_folder(name, expected, tmp_path):
    write_store(tmp_path / "hostile.lmdb", ["ant/good", "bee/good", name])
    with pytest.raises(RecordError, match=f"record 2: its name .* {expected}"):
        export(tmp_path / "hostile.lmdb", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.lmdb"]


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc", "a\0", "\ud800"], ids=ascii)
def test_export_refuses_class_names_that_are_not_a_folders(name, tmp_path):
    write_store(tmp_path / "hostile.lmdb", ["x"], classes=("ant", "bee"))
    pages = PageFile(tmp_path / "hostile.lmdb")
    meta = json.loads(bytes(pages.view(pages.find(layout.META_KEY))))
    changed = json.dumps({**meta, "classes": ["ant", name]}).encode()
    change_key(tmp_path / "hostile.lmdb", layout.META_KEY, changed)
    with pytest.raises(DaliLmdbError, match="class"):
        export(tmp_path / "hostile.lmdb", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.lmdb"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["ant/x", "bee/x", "ant/x"], "is also that of record 0"),
        (["ant/x", "bee/x", "ant/x/y"], "is also a folder"),
        (["ant/x/y/z", "bee/x", "ant/x"], "is also a folder"),
        (["x", "bee/x", "ant/x"], "is also that of record 0"),
    ],
)
def test_export_refuses_names_of_one_file(names, expected, tmp_path):
    write_store(tmp_path / "one.lmdb", names)
    with pytest.raises(RecordError, match=expected):
        export(tmp_path / "one.lmdb", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["one.lmdb"]


@pytest.mark.parametrize(
    ("names", "classes"),
    [(["ant/x.jpg", "bee/y", "ant/X.JPG"], ("ant", "bee")), (["Ant/x", "ant/y"], ("Ant", "ant"))],
)
def test_names_that_differ_in_case_only_are_refused_where_they_are_one(names, classes, tmp_path):
    with open_store(write_store(tmp_path / "case.lmdb", names, classes=classes)) as store:
        assert record_paths(store, fold_case=False).to_pylist() == names
        with pytest.raises(DaliLmdbError, match=r"the same on this file system|is also that of record 0"):
            record_paths(store, fold_case=True)


def test_export_replaces_an_empty_folder_only(store_path, tmp_path):
    (tmp_path / "out").mkdir()
    export(store_path, tmp_path / "out")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        export(store_path, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match="not a folder"):
        export(store_path, tmp_path / "file")
    with pytest.raises(ConversionError, match="does not exist"):
        export(store_path, tmp_path / "none" / "out")


def test_export_into_a_link_to_an_empty_folder_fills_that_folder(store_path, image_folder, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export(store_path, tmp_path / "link")
    assert files_in(tmp_path / "real") == files_in(image_folder)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("tar", [False, True])
def test_export_of_a_damaged_record_leaves_nothing(tar, copy, tmp_path):
    flip(copy, offset_of(copy, layout.record_key(9)))
    with pytest.raises(RecordError, match=r"record 9 \(bee/009.jpg\): wrong checksum"):
        export(copy, tmp_path / "out", tar=tar)
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]


@pytest.mark.parametrize("tar", [False, True])
def test_interrupted_export_leaves_nothing(tar, store_path, tmp_path):
    seen = []

    def interrupt(progress):
        seen.extend(path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(store_path, tmp_path / "out", tar=tar, progress=interrupt)
    assert seen == ["out.partial"]
    assert list(tmp_path.iterdir()) == []


def test_terminated_export_command_leaves_nothing(store_path, tmp_path):
    code = (
        "import os, signal, sys; from dali_lmdb import cli; "
        "cli.ProgressBar.show = lambda *_: os.kill(os.getpid(), signal.SIGTERM); cli.main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "export", store_path, tmp_path / "out"],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("Stopped.")
    assert list(tmp_path.iterdir()) == []


def test_export_to_a_full_disk_leaves_nothing(store_path, tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))  # bytes; the images are larger

    done = subprocess.run(
        [sys.executable, "-m", "dali_lmdb", "export", store_path, tmp_path / "out"],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {tmp_path / 'out'}: cannot be written: ")
    assert list(tmp_path.iterdir()) == []


def tar_members(folder):
    """[(tar, member, bytes)] of all tars in a folder."""
    found = []
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [(path.name, member.name, tar.extractfile(member).read()) for member in tar]
    return found


def test_export_to_tars_writes_an_image_and_a_label_for_each_record(mixed_store, tmp_path):
    done = export(mixed_store, tmp_path / "wds", tar=True, per_shard=4)
    assert done.tars == 2
    members = tar_members(tmp_path / "wds")
    with open_store(mixed_store) as store:
        extensions = [".jpg", ".jpg", ".png", ".jpg", ".jpg", ".webp"]  # one is named x.JPEG
        expected = []
        for record, extension in enumerate(extensions):
            tar = f"wds-{record // 4:06d}.tar"
            expected.append((tar, f"{record:09d}{extension}", bytes(store.read(record))))
            expected.append((tar, f"{record:09d}.cls", str(store.labels[record]).encode()))
            expected.append((tar, f"{record:09d}.json", json.dumps({"name": store.name(record)}).encode()))
    assert members == expected
    assert (tmp_path / "wds" / "classes.txt").read_text() == "a\nb\n"


def test_tars_stay_below_the_size_asked_for(store_path, tmp_path):
    done = export(store_path, tmp_path / "wds", tar=True, shard_size_bytes=20_480)
    sizes = [path.stat().st_size for path in (tmp_path / "wds").glob("*.tar")]
    assert max(sizes) == 20_480
    assert done.tars == len(sizes) < 8
    assert len(tar_members(tmp_path / "wds")) == 3 * 24


@pytest.mark.parametrize("shards", [None, 3])
def test_equal_records_give_equal_tars(shards, image_folder, store_path, tmp_path):
    convert(image_folder, tmp_path / "again.lmdb", shards=shards)
    export(store_path, tmp_path / "one", tar=True)
    (tmp_path / "two").mkdir()
    export(tmp_path / "again.lmdb", tmp_path / "two" / "one", tar=True)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two" / "one")


def test_tars_convert_back_to_the_same_records_and_classes(tmp_path):
    images = make_image_folder(tmp_path / "images", num_records=6)
    convert(images, tmp_path / "images.lmdb")
    export(tmp_path / "images.lmdb", tmp_path / "wds", tar=True, per_shard=2)
    convert(tmp_path / "wds", tmp_path / "again.lmdb")
    with open_store(tmp_path / "images.lmdb") as one, open_store(tmp_path / "again.lmdb") as two:
        assert (one.fingerprint, one.classes) == (two.fingerprint, two.classes)


@pytest.mark.parametrize(
    ("name", "kind", "extension"),
    [
        ("x", Kind.PNG, ".png"),
        ("x.cls", Kind.UNKNOWN, ".jpg"),
        ("x.a b", Kind.UNKNOWN, ".jpg"),
        ("x.GIF", 99, ".gif"),
        ("x.JPEG", Kind.UNKNOWN, ".jpg"),
        ("x.jpeg", Kind.PNG, ".jpg"),
        ("x.png", Kind.JPEG_BASELINE, ".jpg"),
    ],
)
def test_tar_members_have_an_extension_that_readers_know(name, kind, extension, tmp_path):
    write_store(tmp_path / "one.lmdb", [name], kind=np.array([kind], np.uint8))
    export(tmp_path / "one.lmdb", tmp_path / "wds", tar=True)
    assert tar_members(tmp_path / "wds")[0][1] == "000000000" + extension


def test_tars_refuse_class_names_that_are_not_one_line(tmp_path):
    write_store(tmp_path / "one.lmdb", ["x"], classes=("a\nb",))
    with pytest.raises(ConversionError, match=r"cannot be a line of classes\.txt"):
        export(tmp_path / "one.lmdb", tmp_path / "wds", tar=True)


def test_export_refuses_labels_without_class(tmp_path):
    write_store(tmp_path / "wild.lmdb", ["ant/x"], label=np.array([5], np.int32))
    with pytest.raises(RecordError, match="label 5, expected 0 to 1"):
        export(tmp_path / "wild.lmdb", tmp_path / "out")


def test_limits_of_tars_without_tars_are_refused(store_path, tmp_path):
    result = run("export", store_path, tmp_path / "out", "--per-shard", "5")
    assert (result.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert "given without tar" in result.output


# damage of any kind


@pytest.mark.parametrize("piece_records", [layout.PIECE_RECORDS, 5])
def test_a_damaged_store_never_crashes_the_process(tmp_path, monkeypatch, piece_records):
    write_with(monkeypatch, piece_records=piece_records)
    folder = make_image_folder(tmp_path / "images", num_records=9)
    for seed in range(3):
        save_noise(folder / "bee" / f"noise{seed}.jpg", seed=seed)  # large enough for pages of its own
    convert(folder, tmp_path / "small.lmdb")
    (tmp_path / "cases").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            TESTS / "fuzz_store.py",
            tmp_path / "small.lmdb",
            tmp_path / "cases",
            "2000",
        ],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert sum(result["outcomes"].values()) == 2000
    assert {"truncated: refused, found by verify", "flipped anywhere: read, found by verify"} <= set(
        result["outcomes"]
    )


def test_every_command_of_this_layer_raises_our_errors_only(tmp_path):
    (tmp_path / "text.lmdb").write_text("not a database " * 1000)
    for function in (info, verify, lambda path: export(path, tmp_path / "out")):
        with pytest.raises(StoreError, match="not an LMDB file"):
            function(tmp_path / "text.lmdb")


INTERRUPTED_COMMAND = """
import os, signal, sys
from dali_lmdb import cli

moment, arguments = tuple(sys.argv[1:3]), sys.argv[3:]

def press_ctrl_c(event, details):
    if moment == (event, str(details[0]) if details else ""):
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(press_ctrl_c)
cli.main(arguments)
"""


@pytest.mark.parametrize(
    ("when", "arguments"),
    [
        # (an audit event of Python and its first detail, the command); STORE stands for a store
        *(
            (f"import dali_lmdb.{module}", [name])
            for name, module in {
                "compare": "compare.throughput",
                "convert": "convert.settings",
                "export": "inspect.export",
                "info": "inspect.export",
                "train": "train.settings",
                "verify": "inspect.export",
            }.items()
        ),
        ("open STORE", ["info", "STORE"]),
        ("open STORE", ["verify", "STORE"]),
        ("open STORE", ["compare", "STORE"]),
        ("open STORE", ["train", "--train", "STORE", "--val", "STORE", "--device", "cpu"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_a_command_that_is_interrupted_says_so_with_exit_code_130(store_path, when, arguments):
    event, where = (word.replace("STORE", str(store_path)) for word in when.split())
    arguments = [word.replace("STORE", str(store_path)) for word in arguments]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_COMMAND, event, where, *arguments],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Stopped.\n")
