"""Sources whose lists are too large for memory, which lowered limits make of small ones."""

import os
import resource
import shutil
import tempfile
import tracemalloc

import pytest

from dali_lmdb.convert.sources._digest import digest_of
from dali_lmdb.convert.sources._scratch import MemberTable, Spool
from dali_lmdb.convert.sources.folder import FolderSource
from dali_lmdb.errors import SourceError

NAMES = [f"ant/{number}.jpg" for number in range(50)]


@pytest.fixture
def temporary_folder(tmp_path, monkeypatch):
    """An empty folder that temporary files go to."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def open_files_in(folder):
    """How many files this process has open there, with and without a name."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the listing's own
            continue
    return sum(link.startswith(f"{folder}/") for link in links)


# Names.


@pytest.mark.parametrize("kept", [1, 7, 25, 49, 50, 51])
def test_names_beyond_what_memory_keeps_have_the_same_digest(kept, temporary_folder):
    expected = digest_of(lambda: NAMES, kept_bytes=8 * 1000)
    assert (expected.num_names, expected.repeated) == (50, None)
    assert digest_of(lambda: NAMES, kept_bytes=8 * kept) == expected
    assert digest_of(lambda: NAMES[::-1], kept_bytes=8 * kept).hexdigest != expected.hexdigest


@pytest.mark.parametrize("kept", [1, 7, 25, 50, 53, 54, 1000])
def test_the_first_name_to_come_again_is_found_wherever_it_is(kept, temporary_folder):
    for first in (0, 24, 49):
        names = [*NAMES, "last.jpg", NAMES[first], "last.jpg", NAMES[3]]
        assert digest_of(lambda names=names: names, kept_bytes=8 * kept).repeated == NAMES[first]


@pytest.mark.parametrize("kept", [3, 1000])
def test_different_names_of_the_same_hash_are_not_a_repetition(kept, temporary_folder):
    def repeated_of(names):
        return digest_of(
            lambda: names, kept_bytes=8 * kept, hash_of=lambda raw: len(raw).to_bytes(8, "little")
        ).repeated

    assert repeated_of(NAMES) is None
    assert repeated_of([*NAMES, NAMES[7], NAMES[2]]) == NAMES[7]


def test_when_very_many_names_repeat_one_of_them_is_named(temporary_folder):
    assert digest_of(lambda: NAMES * 2, kept_bytes=8 * 16, max_suspects=3).repeated in NAMES


def test_hashes_in_a_file_take_little_memory_to_compare(temporary_folder):
    tracemalloc.start()
    try:
        digest_of(lambda: map(str, range(30_000)), kept_bytes=1 << 14)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 200_000  # the hashes take 240,000


# Members of archives.

ODD_NAMES = ["", "a", "two\nlines", "caf\udce9.jpg", "é" * 300, "1", " "]


@pytest.mark.parametrize("kept", [0, 40, 1000, 10**9], ids=lambda kept: f"kept {kept}")
@pytest.mark.parametrize("piece", [1, 2, 50, 10**9], ids=lambda piece: f"piece {piece}")
def test_tables_that_share_a_spool_give_back_their_own_rows(kept, piece, temporary_folder):
    spool = Spool(kept, piece_bytes=piece)
    tables = [MemberTable(spool) for _ in range(5)]
    expected = [[] for _ in tables]
    for number in range(60):
        at = number * number % 4  # two tables take no row
        row = (ODD_NAMES[number % 7], number, 2**62 - number, 2**31 - number)
        tables[at].add(*row)
        expected[at].append(row)
    assert [list(table.rows()) for table in tables] == expected
    assert [len(table) for table in tables] == [30, 30, 0, 0, 0]
    assert list(zip(tables[0].rows(), tables[1].rows(), strict=True)) == list(zip(*expected[:2], strict=True))
    assert open_files_in(temporary_folder) == (1 if kept < 10**9 else 0)


def test_what_all_tables_together_hold_in_memory_is_limited(temporary_folder):
    spool = Spool(500)
    tables = [MemberTable(spool) for _ in range(100)]
    held = []
    for number in range(1000):
        tables[number * 37 % 100].add(f"{number}.jpg", number, 1)
        held.append(sum(map(len, spool._kept)))
    assert max(held) <= 500
    assert max(held[-100:]) > 400  # and used, each time
    assert sum(len(list(table.rows())) for table in tables) == 1000


# Temporary files.


def test_a_temporary_file_has_no_name_and_is_closed_with_its_owner(temporary_folder):
    spool = Spool(3)
    assert spool.new(b"one") == 0
    assert open_files_in(temporary_folder) == 0
    spool.append(0, b"two")
    assert open_files_in(temporary_folder) == 1
    assert list(temporary_folder.iterdir()) == []
    assert spool.whole(0) == b"onetwo"
    del spool
    assert open_files_in(temporary_folder) == 0


def test_few_names_need_no_temporary_file(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    assert digest_of(lambda: NAMES, kept_bytes=8 * 50).num_names == 50


def refused(work):
    """The message with which ``work`` is refused, in one line."""
    with pytest.raises(SourceError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_full_temporary_folder_is_named_with_what_to_do(temporary_folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))  # bytes; the hashes take 400
    try:
        message = refused(lambda: digest_of(lambda: NAMES, kept_bytes=8 * 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.startswith(f"{temporary_folder}: the list of images, 200 bytes so far, cannot be written: ")
    assert message.endswith("; make room there, or set TMPDIR to a folder on another disk")


def test_a_missing_temporary_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    message = refused(lambda: digest_of(lambda: NAMES, kept_bytes=8 * 20))
    assert message.startswith(
        f"{tmp_path / 'nothing'}: the list of images, 0 bytes so far, cannot be written: No such"
    )


def test_names_of_class_folders_go_to_a_temporary_file_beyond_what_memory_keeps(
    temporary_folder, image_folder, tmp_path
):
    folder = shutil.copytree(image_folder, tmp_path / "copy")
    (folder / "bee" / "notes.txt").write_text("no image")

    def listing(kept_bytes):
        source = FolderSource(folder)
        source.kept_bytes = kept_bytes
        rows = [(item.name, item.label) for item in source.items()]
        return source.count(), source.identity(), rows, list(source.left_out()), source

    expected = listing(10_000)[:-1]
    *found, source = listing(20)
    assert tuple(found) == expected
    assert open_files_in(temporary_folder) == 1
    (folder / "bee" / "more.jpg").write_bytes(b"")
    with pytest.raises(SourceError, match=r"more\.jpg appeared"):
        list(source.items())
