import contextlib
import gzip
import io
import tarfile
import tracemalloc

import pytest
from image_sets import make_image_folder
from packing import items_of, pack, pack_folder

from dali_lmdb.convert.sources import open_source
from dali_lmdb.convert.sources._archive import Archive
from dali_lmdb.errors import SourceError


def names_of(source):
    return [name for name, _, _ in items_of(source)[1]]


def member(name, **values):
    info = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(info, key, value)
    return info


def refused(path, match, **options):
    """The message with which the source is refused, in one line that names the archive."""
    with pytest.raises(SourceError, match=match) as caught:
        items_of(open_source(path, **options))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Names and members that are refused.


@pytest.mark.parametrize("name", ["../a.jpg", "ant/../../a.jpg", "ant/../a.jpg", "../notes.txt", "..", "ant/.."])
def test_a_member_that_leaves_the_folder_is_refused(name, tmp_path):
    path = pack(tmp_path / "x.tar", [("ant/good.jpg", b"x"), (name, b"evil")])
    assert repr(name) in refused(path, r"leaves its folder with '\.\.'", kind="tar")


def test_an_absolute_member_is_refused(tmp_path):
    path = pack(tmp_path / "x.tar", [("ant/good.jpg", b"x"), ("/etc/evil.jpg", b"evil")])
    refused(path, r"'/etc/evil.jpg': an absolute name", kind="tar")


def test_a_name_with_a_nul_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member("ant/evil.jpg", pax_headers={"path": "ant/a\0b.jpg"}))
    refused(tmp_path / "x.tar", "a name with a NUL", kind="tar")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "symbolic link to '/etc/passwd'.*--dereference"),
        ({"type": tarfile.LNKTYPE, "linkname": "ant/good.jpg"}, "hard link to 'ant/good.jpg'.*--hard-dereference"),
        ({"type": tarfile.CHRTYPE}, "not a regular file"),
        ({"type": tarfile.FIFOTYPE}, "not a regular file"),
    ],
    ids=["symlink", "hard link", "device", "pipe"],
)
def test_an_image_that_is_no_file_is_refused(values, message, tmp_path):
    path = pack(tmp_path / "x.tar", [("ant/good.jpg", b"x"), member("ant/evil.jpg", **values)])
    assert "'ant/evil.jpg'" in refused(path, message, kind="tar")


def test_a_link_that_is_no_image_is_ignored_like_other_files(tmp_path):
    link = member("ant/notes.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    path = pack(tmp_path / "x.tar", [("ant/good.jpg", b"x"), link])
    assert names_of(open_source(path)) == ["ant/good.jpg"]


@pytest.mark.parametrize("name", ["...tar", "..tar", ".tar"])
def test_a_class_tar_whose_class_would_leave_the_folder_is_refused(name, tmp_path):
    inner = pack(tmp_path / "inner.tar", [("a.jpg", b"x")]).read_bytes()
    path = pack(tmp_path / "x.tar", [("ant.tar", inner), (name, inner)])
    refused(path, "leaves its folder|as a class name", kind="imagenet-tar")


def test_names_inside_a_class_tar_are_checked_too(tmp_path):
    inner = pack(tmp_path / "inner.tar", [("../../a.jpg", b"x")]).read_bytes()
    path = pack(tmp_path / "x.tar", [("ant.tar", inner)])
    assert "ant.tar" in refused(path, r"leaves its folder", kind="imagenet-tar")


@pytest.mark.parametrize("name", ["ant/a.jpg", "./ant/a.jpg"])
def test_a_member_that_comes_twice_is_refused(name, tmp_path):
    path = pack(tmp_path / "x.tar", [("ant/a.jpg", b"x"), (name, b"y")])
    refused(path, "two images are named 'ant/a.jpg'")


# Damaged archives.


def headers_of(path):
    with tarfile.open(path) as tar:
        return tar.getmembers()


@pytest.fixture
def whole(tmp_path):
    folder = make_image_folder(tmp_path / "images", num_records=6)
    return pack_folder(tmp_path / "whole.tar", folder)


def test_an_archive_cut_off_anywhere_is_refused_naming_where(whole, tmp_path):
    data = whole.read_bytes()
    content = max(info.offset_data + info.size for info in headers_of(whole))
    path = tmp_path / "cut.tar"
    for length in [*range(512, content, 331), *range(512, content, 512), content]:
        path.write_bytes(data[:length])
        message = refused(path, "cut off|not a readable tar|damaged header", kind="tar")
        assert ".jpg" in message


def test_a_damaged_header_is_refused_and_does_not_end_the_archive(whole, tmp_path):
    data = bytearray(whole.read_bytes())
    third = headers_of(whole)[2]
    data[third.offset + 150] ^= 0xFF  # in its checksum
    path = tmp_path / "damaged.tar"
    path.write_bytes(data)
    refused(path, "a damaged header after 'cat/004.jpg'|a damaged header after", kind="tar")


def test_archives_joined_with_cat_are_refused(whole, tmp_path):
    path = tmp_path / "joined.tar"
    path.write_bytes(whole.read_bytes() * 2)
    refused(path, "more data after its end-of-archive mark; .*tar -A", kind="tar")


@pytest.mark.parametrize("position", [0, 124, 136, 148, 156, 257])
def test_random_damage_to_headers_ends_in_records_or_one_of_our_errors(position, whole, tmp_path):
    data = whole.read_bytes()
    path = tmp_path / "damaged.tar"
    offsets = [info.offset for info in headers_of(whole)]
    for offset in offsets:
        for value in (0x00, 0x2F, 0x37, 0x4C, 0x78, 0x80, 0xFF):
            block = bytearray(data[offset : offset + 512])
            block[position] = value
            block[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
            path.write_bytes(data[:offset] + block + data[offset + 512 :])
            with contextlib.suppress(SourceError):
                items_of(open_source(path, kind="tar"))


def test_a_header_that_claims_gigabytes_of_name_is_refused_without_taking_them(tmp_path):
    long_name = member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=2**33)
    path = tmp_path / "x.tar"
    path.write_bytes(long_name.tobuf(tarfile.GNU_FORMAT) + b"a.jpg\0".ljust(1024, b"\0"))
    refused(path, "header of 8589934592 bytes", kind="tar")


@pytest.mark.parametrize("start", [b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_a_compressed_archive_says_how_to_decompress_it(start, tmp_path):
    path = tmp_path / "x.tar.z"
    path.write_bytes(start + b"\0" * 600)
    refused(path, r"compressed; .*decompress it first: \w+ -dk")


def test_a_real_tar_gz_is_recognised(whole, tmp_path):
    path = tmp_path / "x.tgz"
    path.write_bytes(gzip.compress(whole.read_bytes()))
    refused(path, "compressed; .*gzip -dk")


def test_an_archive_that_changes_while_it_is_converted_is_noticed(whole):
    items = list(open_source(whole).items())
    with open(whole, "ab") as stream:
        stream.write(b"\0" * 512)
    with pytest.raises(SourceError, match="changed while it was read"):
        items[0].read()
    whole.unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        items[0].read()


# What archives may hold.


@pytest.mark.parametrize("archive_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_in_every_tar_format(archive_format, tmp_path):
    long_name = "ant/" + "é" * (40 if archive_format == tarfile.USTAR_FORMAT else 100) + ".jpg"
    with tarfile.open(tmp_path / "x.tar", "w", format=archive_format) as tar:
        for name, data in ((long_name, b"one"), ("bee/b.jpg", b"two")):
            info = member(name, size=3)
            tar.addfile(info, io.BytesIO(data))
    assert items_of(open_source(tmp_path / "x.tar"))[1] == [(long_name, 0, b"one"), ("bee/b.jpg", 1, b"two")]


@pytest.mark.parametrize("prefix", ["", "./", "train/", "./ILSVRC/Data/CLS-LOC/train/"])
def test_folders_above_the_class_folders_are_taken_off(prefix, tmp_path):
    folder = make_image_folder(tmp_path / "images", num_records=6)
    path = pack_folder(tmp_path / "x.tar", folder, prefix=prefix)
    assert items_of(open_source(path)) == items_of(open_source(folder))


def test_a_tar_made_by_the_tar_command_has_the_records_of_the_folder(tmp_path):
    folder = make_image_folder(tmp_path / "images", num_records=6)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(folder, arcname="images")
    assert items_of(open_source(tmp_path / "x.tar")) == items_of(open_source(folder))


def test_a_folder_that_holds_images_is_a_class_and_is_not_taken_off(tmp_path):
    path = pack(tmp_path / "x.tar", [("ant/a.jpg", b"x"), ("ant/more/b.jpg", b"y")])
    assert items_of(open_source(path)) == (["ant"], [("ant/a.jpg", 0, b"x"), ("ant/more/b.jpg", 0, b"y")])


def test_a_class_folder_without_images_is_refused(tmp_path):
    path = pack(tmp_path / "x.tar", [("ant/a.jpg", b"x"), member("bee", type=tarfile.DIRTYPE)])
    refused(path, "bee: no image in this class")


def test_a_folder_of_class_tars_is_the_nested_tar_unpacked(tmp_path):
    folder = make_image_folder(tmp_path / "images", num_records=6)
    (tmp_path / "tars").mkdir()
    for name in ("ant", "bee", "cat"):
        pack_folder(tmp_path / "tars" / f"{name}.tar", folder / name)
    source = open_source(tmp_path / "tars", kind="imagenet-tar")
    assert items_of(source) == items_of(open_source(folder))


def test_a_name_that_is_not_utf_8_is_kept_readable(tmp_path):
    path = pack(tmp_path / "x.tar", [("ant/caf\udce9.jpg", b"x")])
    assert names_of(open_source(path)) == [r"ant/caf\xe9.jpg"]


def test_listing_an_archive_keeps_no_objects_of_its_members(tmp_path):
    path = pack(tmp_path / "x.tar", [(f"ant/{i}.jpg", b"x") for i in range(2000)])
    tracemalloc.start()
    try:
        count = sum(1 for _ in Archive(path).members(lambda name: True))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 2000
    assert peak_bytes < 200 * count  # a TarInfo alone takes more than 1,000


# WebDataset.


def shard(path, records):
    """Records of (key, image bytes or None, label bytes or None)."""
    members = []
    for key, image, label in records:
        members += [(f"{key}.jpg", image)] if image is not None else []
        members += [(f"{key}.cls", label)] if label is not None else []
    return pack(path, members)


def test_shards_are_named_by_folder_pattern_or_braces_and_sorted(tmp_path):
    for number in (2, 0, 1):
        shard(tmp_path / f"s-{number:02}.tar", [(f"{number}a", b"x", b"1"), (f"{number}b", b"y", b"0\n")])
    expected = ["1/0a.jpg", "0/0b.jpg", "1/1a.jpg", "0/1b.jpg", "1/2a.jpg", "0/2b.jpg"]
    assert names_of(open_source(tmp_path)) == expected
    assert names_of(open_source(tmp_path / "s-*.tar")) == expected
    assert names_of(open_source(tmp_path / "s-{00..02}.tar")) == expected
    assert names_of(open_source(tmp_path / "s-{02,01}.tar")) == expected[2:]
    assert names_of(open_source(tmp_path / "s-01.tar")) == expected[2:4]


def test_a_shard_that_braces_name_must_be_there(tmp_path):
    shard(tmp_path / "s-00.tar", [("a", b"x", b"0")])
    with pytest.raises(SourceError, match=r"s-01.tar: no such file, but the braces name it"):
        open_source(tmp_path / "s-{00..01}.tar")


def test_a_range_of_braces_that_names_too_many_files_is_refused(tmp_path):
    with pytest.raises(SourceError, match="expected an ascending one"):
        open_source(tmp_path / "s-{0..99999999999}.tar", kind="webdataset")
    with pytest.raises(SourceError, match="the braces name 10000000000 files"):
        open_source(tmp_path / "s-{0..99999}{0..99999}.tar", kind="webdataset")


def test_keys_end_at_the_first_dot_and_other_members_are_ignored(tmp_path):
    members = [
        ("x/1.seg.png", b"no"),
        ("x/1.json", b"{}"),
        ("x/1.JPG", b"image"),
        ("x/1.cls", b" 0 "),
        ("x/2.cls", b"1"),
        ("x/2.txt", b"no"),
        ("x/2.png", b"other"),
    ]
    path = pack(tmp_path / "s.tar", members)
    expected = [("0/x/1.JPG", 0, b"image"), ("1/x/2.png", 1, b"other")]
    assert items_of(open_source(path)) == (["0", "1"], expected)


def test_keys_that_shards_repeat_get_the_shard_in_their_name(tmp_path):
    for number in range(2):
        shard(tmp_path / f"s-{number}.tar", [("000", b"%d" % number, b"0")])
    assert items_of(open_source(tmp_path))[1] == [("0/s-0/000.jpg", 0, b"0"), ("0/s-1/000.jpg", 0, b"1")]


def test_classes_of_which_shards_have_no_record_keep_their_number(tmp_path):
    path = shard(tmp_path / "s.tar", [("a", b"x", b"3")])
    assert items_of(open_source(path)) == (["0", "1", "2", "3"], [("3/a.jpg", 3, b"x")])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([("a", b"x", b"0"), ("b", b"x", None)], "record 'b' has no label"),
        ([("a", b"x", b"0"), ("b", None, b"0")], "record 'b' has no image"),
        ([("a", b"x", b"0"), ("a", b"y", b"0")], "two images are named '0/s/a.jpg'"),
        ([("a", b"x", b"dog")], "'a.cls': label 'dog', expected an integer"),
        ([("a", b"x", b"-1")], "label '-1', expected an integer of at least 0"),
        ([("a", b"x", b"")], "label '', expected an integer"),
        ([("a", b"x", b"1" * 100)], "label '1111.*expected an integer"),
        ([("a", b"x", b"2147483647")], "label 2147483647, expected 0 to"),
        ([("", b"x", b"0")], "'.jpg': nothing before the dot"),
    ],
)
def test_a_shard_with_a_record_that_is_not_whole_is_refused(records, message, tmp_path):
    refused(shard(tmp_path / "s.tar", records), message, kind="webdataset")


def test_a_record_with_two_images_is_refused(tmp_path):
    path = pack(tmp_path / "s.tar", [("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"0")])
    refused(path, "record 'a': two images")


def test_a_shard_without_records_is_refused(tmp_path):
    refused(pack(tmp_path / "s.tar", [("a.txt", b"x")]), "no records in it", kind="webdataset")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("ant\n", "1 class names, but the labels need 2"),
        ("ant\n\n", "'' as a class name"),
        ("ant\n../bee\n", r"'\.\./bee'"),
        ("ant\nant\n", "two classes are named 'ant'"),
    ],
)
def test_a_list_of_class_names_that_does_not_fit_is_refused(lines, message, tmp_path):
    shard(tmp_path / "s.tar", [("a", b"x", b"1")])
    (tmp_path / "classes.txt").write_text(lines)
    with pytest.raises(SourceError, match=message):
        items_of(open_source(tmp_path / "s.tar"))
