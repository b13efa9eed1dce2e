"""Which files a name, a folder or a pattern stands for, where several data sets lie side by side."""

import itertools
import os
import shutil

import pytest
from click.testing import CliRunner
from image_sets import make_image_folder

from dali_lmdb.convert import convert
from dali_lmdb.convert.__main__ import main as convert_command
from dali_lmdb.convert.sources import FolderSource
from dali_lmdb.errors import ConversionError, StoreError, StoreFormatError, StoreNotFoundError
from dali_lmdb.inspect import verify
from dali_lmdb.store import open_store
from dali_lmdb.store.shards import shard_files, shard_name

NAMES = ("train.lmdb", "train-small.lmdb", "Train.lmdb", "train", "train.small.lmdb", "train-00000-of-00009.lmdb")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Image folders of 3, 4, ... images, so that the number of records says which set was opened."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        make_image_folder(folder / str(number), num_records=number, classes=("one",))
        for number in range(3, 3 + len(NAMES))
    ]


def num_records(path):
    with open_store(path) as store:
        return len(store)


def refused(error, path):
    with pytest.raises(error) as info:
        open_store(path)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(NAMES[:4], 2)))
@pytest.mark.parametrize("shards", [2, None])
def test_sets_and_files_of_different_names_do_not_touch_each_other(tmp_path, sources, first, second, shards):
    convert(sources[0], tmp_path / first, shards=3)
    assert refused(StoreNotFoundError, tmp_path / second).startswith(f"no store at {tmp_path / second}; make one")
    convert(sources[1], tmp_path / second, shards=shards)
    assert num_records(tmp_path / first) == 3
    assert num_records(tmp_path / second) == 4


def test_a_name_that_ends_like_a_shards_is_a_name_like_others(tmp_path, sources):
    for source, name in zip(sources, NAMES, strict=True):
        convert(source, tmp_path / name, shards=2)
    assert [num_records(tmp_path / name) for name in NAMES] == [3, 4, 5, 6, 7, 8]
    assert not verify(tmp_path / "train.lmdb").damage


def test_glob_characters_in_a_name_are_letters(tmp_path, sources):
    names = ["train[12].lmdb", "train1.lmdb", "train?.lmdb", "train*.lmdb"]
    for source, name in zip(sources, names, strict=False):
        convert(source, tmp_path / name, shards=2)
    assert [num_records(tmp_path / name) for name in names] == [3, 4, 5, 6]
    convert(sources[4], tmp_path / "t[r]ain1.lmdb")  # as a pattern it would match train1.lmdb
    assert num_records(tmp_path / "t[r]ain1.lmdb") == 7


@pytest.mark.parametrize(
    "stray",
    [
        "train-1-of-2.lmdb",
        "train-00000-of-000002.lmdb",
        "train-a-of-b.lmdb",
        "train-00002-of-00002.lmdb",
        "train-००००१-of-००००२.lmdb",
        "train-00000-of-00002.lmdb.bak",
        "old-train-00000-of-00002.lmdb",
        "train-00000-of-00002.lmdb.partial",
        "train-00000-of-00002.lmdb.partial-journal",
        "train-00000-of-00002.lmdb.bad.tsv",
        "train-00000-of-00002.lmdb.dali-index",
    ],
)
def test_what_is_not_named_exactly_like_a_shard_is_none(tmp_path, sources, stray):
    convert(sources[0], tmp_path / "x.lmdb")
    shutil.copy(tmp_path / "x.lmdb", tmp_path / stray)
    refused(StoreNotFoundError, tmp_path / "train.lmdb")
    convert(sources[1], tmp_path / "train.lmdb", shards=3)
    assert num_records(tmp_path / "train.lmdb") == 4


def test_parquet_shards_of_a_name_do_not_stand_in_the_way_of_a_store(tmp_path, sources):
    (tmp_path / "train-00000-of-00001").write_bytes(b"PAR1 and more")
    refused(StoreNotFoundError, tmp_path / "train")
    convert(sources[0], tmp_path / "train")
    assert num_records(tmp_path / "train") == 3


@pytest.fixture
def two_totals(tmp_path, sources):
    """A folder with train.lmdb in 2 shards of 3 records together and in 3 shards of 4, as copying leaves it."""
    both = tmp_path / "both"
    both.mkdir()
    for source, shards in zip(sources, (2, 3), strict=False):
        alone = tmp_path / str(shards)
        alone.mkdir()
        convert(source, alone / "train.lmdb", shards=shards)
        for file in alone.iterdir():
            shutil.copy(file, both)
    return both


@pytest.mark.parametrize("name", ["train.lmdb", "", "train-*.lmdb"], ids=["name", "folder", "pattern"])
def test_sets_of_different_totals_are_refused_by_name_and_open_by_the_pattern_that_is_told(two_totals, name):
    message = refused(StoreFormatError, two_totals / name)
    assert "train-00000-of-00002.lmdb and train-00000-of-00003.lmdb" in message
    told = message.split("give ")[-1].split(" or ")
    assert [num_records(path.strip("'")) for path in told] == [3, 4]


def test_verify_refuses_sets_of_different_totals_too(two_totals):
    with pytest.raises(StoreFormatError, match="expected the shards of one set"):
        verify(two_totals / "train.lmdb")


def test_a_folder_with_two_sets_is_refused_and_each_opens_by_its_name(tmp_path, sources):
    convert(sources[0], tmp_path / "train.lmdb", shards=2)
    convert(sources[1], tmp_path / "val.lmdb", shards=2)
    message = refused(StoreFormatError, tmp_path)
    assert "train-00000-of-00002.lmdb and val-00000-of-00002.lmdb" in message
    result = CliRunner().invoke(convert_command, [str(tmp_path), str(tmp_path / "out" / "x.lmdb")])
    assert (result.exit_code, result.output) == (1, f"Error: {message}\n")
    assert num_records(tmp_path / "val.lmdb") == 4


def test_a_folder_with_a_set_and_another_store_is_refused(tmp_path, sources):
    convert(sources[0], tmp_path / "train.lmdb", shards=2)
    convert(sources[1], tmp_path / "val.lmdb")
    assert "train-00000-of-00002.lmdb and val.lmdb" in refused(StoreFormatError, tmp_path)


def test_a_folder_with_one_set_and_other_files_opens_as_the_set(tmp_path, sources):
    convert(sources[0], tmp_path / "train.lmdb", shards=2)
    for name in ("notes.txt", "notes.lmdb", "a-00000-of-00001.parquet", "train-00000-of-00002.lmdb.bad.tsv"):
        (tmp_path / name).write_text("something else")
    assert num_records(tmp_path) == 3


@pytest.mark.parametrize("ending", [".partial", ".partial-journal", ".dali-index"])
def test_an_interrupted_conversion_to_names_without_suffix_is_no_set(tmp_path, sources, ending):
    convert(sources[0], tmp_path / "train.lmdb", shards=2)
    shutil.copy(tmp_path / "train-00000-of-00002.lmdb", tmp_path / f"other-00000-of-00002{ending}")
    assert num_records(tmp_path) == 3
    (tmp_path / "alone").mkdir()
    shutil.move(tmp_path / f"other-00000-of-00002{ending}", tmp_path / "alone")
    assert shard_files(tmp_path / "alone") is None


def test_a_pattern_passes_over_what_is_kept_beside_its_shards(tmp_path, sources):
    convert(sources[0], tmp_path / "train.lmdb", shards=2)
    for ending in (".partial", ".partial-journal", ".bad.tsv", ".dali-index"):
        (tmp_path / f"train-00001-of-00002.lmdb{ending}").write_text("something else")
    assert num_records(tmp_path / "train-*") == 3


def test_a_pattern_finds_the_shards_of_one_set_in_several_folders(tmp_path, sources):
    convert(sources[0], tmp_path / "train.lmdb", shards=3)
    for folder, shard in (("a", 1), ("b", 2), ("c", 0)):
        (tmp_path / folder).mkdir()
        shutil.move(tmp_path / f"train-{shard:05}-of-00003.lmdb", tmp_path / folder)
    with open_store(tmp_path / "?" / "train-*.lmdb") as store:
        assert [store.name(i) for i in range(3)] == ["one/000.jpg", "one/001.jpg", "one/002.jpg"]


def test_a_part_of_a_pattern_that_stands_for_a_set_and_a_store_can_be_converted_by_name(tmp_path, sources):
    convert(sources[0], tmp_path / "train.lmdb", shards=2)
    convert(sources[1], tmp_path / "train-small.lmdb")
    pattern = str(tmp_path / "train-*.lmdb")
    target = tmp_path / "out.lmdb"
    result = CliRunner().invoke(convert_command, [pattern, str(target), "--source", "store"])
    assert result.exit_code == 1
    assert "train-00000-of-00002.lmdb" in result.output
    assert "train-small.lmdb" in result.output
    source = str(tmp_path / "train-?????-of-?????.lmdb")
    result = CliRunner().invoke(convert_command, [source, str(target), "--source", "store"])
    assert result.exit_code == 0, result.output
    assert num_records(target) == 3


def test_a_shard_alone_names_its_set(tmp_path, sources):
    convert(sources[0], tmp_path / "train.lmdb", shards=2)
    message = refused(StoreFormatError, tmp_path / "train-00001-of-00002.lmdb")
    assert num_records(message.split("open the set: ")[1]) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_a_set_beside_a_store_of_its_name_is_refused_however_few_its_shards(tmp_path, sources, count):
    convert(sources[0], tmp_path / "train.lmdb")
    with pytest.raises(ConversionError) as caught:
        convert(sources[1], tmp_path / "train.lmdb", shards=count)
    said = "exists, and its shards would open under the same name; choose another name"
    assert str(caught.value) == f"{tmp_path}/train.lmdb: {said}"
    assert num_records(tmp_path / "train.lmdb") == 3


def test_a_store_named_like_a_shard_of_a_set_that_is_there_is_refused(tmp_path, sources):
    convert(sources[0], tmp_path / "train.lmdb", shards=2)
    with pytest.raises(ConversionError, match="would open under the same name; choose another name"):
        convert(sources[1], tmp_path / "train-00000-of-00003.lmdb")
    assert num_records(tmp_path / "train.lmdb") == 3


def test_stores_named_like_shards_of_no_set_are_stores(tmp_path, sources):
    for index in range(2):
        convert(sources[index], tmp_path / f"train-{index:05}-of-00002.lmdb")
    assert [num_records(tmp_path / f"train-{index:05}-of-00002.lmdb") for index in range(2)] == [3, 4]
    assert "a store of its own, not a shard" in refused(StoreFormatError, tmp_path / "train.lmdb")


@pytest.mark.parametrize("ending", [".partial", ".partial-journal", ".bad.tsv", ".dali-index"])
def test_a_name_for_files_beside_a_store_is_refused_and_the_file_is_kept(tmp_path, sources, ending):
    with pytest.raises(ConversionError, match="are reserved for files beside a store; choose another"):
        convert(sources[0], tmp_path / f"train.lmdb{ending}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("first", "second"), [(3, 2), (None, 2), (2, None)])
def test_of_two_conversions_to_one_name_the_later_to_end_is_not_published(tmp_path, sources, first, second):
    target = tmp_path / "train.lmdb"

    class Overtaken(FolderSource):
        def items(self):
            convert(sources[1], target, shards=second)
            return super().items()

    with pytest.raises(ConversionError, match="would open under the same name; choose another name"):
        convert(Overtaken(sources[0]), target, shards=first)
    assert num_records(target) == 4


def test_no_refusal_of_a_name_advises_to_remove_what_is_there(tmp_path, sources):
    convert(sources[0], tmp_path / "set.lmdb", shards=2)
    convert(sources[0], tmp_path / "file.lmdb")
    tried = [("set.lmdb", 3), ("set.lmdb", 2), ("set.lmdb", None), ("file.lmdb", None), ("file.lmdb", 2)]
    for name, shards in tried:
        with pytest.raises(ConversionError) as info:
            convert(sources[1], tmp_path / name, shards=shards)
        assert str(info.value).endswith("; choose another name")
        assert "remove" not in str(info.value)


def test_a_missing_shard_and_a_renamed_one_are_told_apart(tmp_path, sources):
    convert(sources[0], tmp_path / "train.lmdb", shards=3)
    second, third = (tmp_path / f"train-{index:05}-of-00003.lmdb" for index in (1, 2))
    second.rename(tmp_path / "kept")
    assert "2 shards, expected 3 in order; missing: [1]" in refused(StoreFormatError, tmp_path / "train.lmdb")
    third.rename(second)
    (tmp_path / "kept").rename(third)
    assert "names do not match their contents" in refused(StoreFormatError, tmp_path / "train.lmdb")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_shard_that_cannot_be_read_is_not_called_missing(tmp_path, sources):
    convert(sources[0], tmp_path / "train.lmdb", shards=2)
    (tmp_path / "train-00000-of-00002.lmdb").chmod(0)
    assert "cannot be read: Permission denied" in refused(StoreError, tmp_path)


def test_file_names_and_set_names_are_each_others_inverse():
    for name in ("a-00001-of-00010.lmdb", "a.b-00001-of-00010.lmdb", "a-00001-of-00010", ".a-00009-of-00010"):
        shard = shard_name(name)
        assert (shard.num_shards, shard.position) in ((10, 1), (10, 9))
    assert shard_name("a-00001-of-00010.lmdb").set_name == "a.lmdb"
    assert shard_name("a-00001-of-00010-00000-of-00001.lmdb").set_name == "a-00001-of-00010.lmdb"
    for name in ("-00000-of-00001", ".-00000-of-00001", "a-00001-of-00001", "a-0000-of-00001", "a_00000-of-00001"):
        assert shard_name(name) is None


def test_a_pattern_without_a_match_does_not_advise_to_make_a_store_of_its_name(tmp_path):
    assert "no file matches that pattern" in refused(StoreNotFoundError, tmp_path / "train-*.lmdb")
