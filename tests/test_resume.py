"""What an interrupted conversion left is checked before it is continued, and its target before success is said."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conversions import die, in_child, left_beside, refusal
from image_sets import save_grey

from dali_lmdb.convert import _journal, convert
from dali_lmdb.convert._journal import Journal
from dali_lmdb.errors import ConversionError
from dali_lmdb.store.writer import StoreWriter

TESTS = Path(__file__).parent
CASES = int(os.environ.get("DALI_LMDB_FUZZ_CASES", "250"))


def test_whatever_is_damaged_a_resumed_conversion_is_refused_or_whole(tmp_path):
    done = subprocess.run(
        [sys.executable, TESTS / "fuzz_resume.py", tmp_path, str(CASES)],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["failures"] == []
    assert sum(result["outcomes"].values()) == CASES
    assert {"refused", "resumed"} == {outcome.rpartition(": ")[2] for outcome in result["outcomes"]}


def test_a_count_of_entries_that_a_partial_file_has_no_room_for_is_refused(tmp_path):
    path = tmp_path / "x.partial"
    with StoreWriter(path) as writer:
        writer.commit([b"value"] * 3)
    data = bytearray(path.read_bytes())
    for meta in (0, 4096):
        struct.pack_into("<Q", data, meta + 120, 10**17)  # entries of the main database
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=r"100,000,000,000,000,000 keys in 12,288 bytes.*--restart"):
        StoreWriter(path)


def _killed_before(owner, name, images, target, **options):
    """Convert in a process that is killed when it calls a function."""

    def work():
        setattr(owner, name, die)
        convert(images, target, num_threads=1, commit_records=5, **options)

    assert os.WIFSIGNALED(in_child(work))


def test_a_finished_partial_file_is_verified_again(images, target):
    _killed_before(os, "rename", images, target)
    partial = target.with_name("x.lmdb.partial")
    image = (images / "ant" / "003.jpg").read_bytes()
    partial.write_bytes(partial.read_bytes().replace(image, image[:-3] + bytes(3)))
    assert "record 3 reads back with a wrong checksum" in refusal(images, target)
    assert not target.exists()


def test_an_empty_journal_does_not_make_the_store_of_another_source_a_success(images, image_folder, target):
    convert(image_folder, target)
    before = target.read_bytes()
    target.with_name("x.lmdb.partial-journal").touch()
    assert "already exists" in refusal(images, target)
    target.with_name("x.lmdb.partial-journal").touch()
    assert "already exists" in refusal(image_folder, target)  # whose images may be others by now
    assert target.read_bytes() == before
    assert left_beside(target) == ["x.lmdb"]


def test_a_store_in_the_place_of_an_interrupted_one_is_not_taken_for_it(images, image_folder, target):
    _killed_before(StoreWriter, "finish", images, target)
    target.with_name("x.lmdb.partial").unlink()
    convert(image_folder, target.with_name("other.lmdb"))
    target.with_name("other.lmdb").rename(target)
    assert "already exists" in refusal(images, target)


def test_a_published_store_is_not_taken_for_that_of_changed_images(images, target, tmp_path):
    """Such a store has the same source and settings, so only its fingerprint tells."""
    _killed_before(StoreWriter, "finish", images, target)
    target.with_name("x.lmdb.partial").unlink()
    images.rename(tmp_path / "before")
    shutil.copytree(tmp_path / "before", images)
    save_grey(images / "ant" / "000.jpg", 5)
    convert(images, target.with_name("other.lmdb"))
    target.with_name("other.lmdb").rename(target)
    shutil.rmtree(images)
    (tmp_path / "before").rename(images)
    assert "its journal is of other images" in refusal(images, target)


def test_a_set_whose_journals_are_partly_removed_is_only_tidied_up(images, tmp_path):
    target = tmp_path / "sets" / "x.lmdb"
    target.parent.mkdir()

    def work():
        original = Path.unlink

        def unlink(path, **options):
            original(path, **options)
            if path.name.endswith(".partial-journal"):
                die()

        Path.unlink = unlink
        convert(images, target, shards=3)

    assert os.WIFSIGNALED(in_child(work))
    assert len([name for name in left_beside(target) if name.endswith("journal")]) == 2
    assert convert(images, target, shards=3).records == 24
    assert len(left_beside(target)) == 3


@pytest.mark.parametrize("version", [None, 2], ids=["none", "later"])
def test_a_journal_of_another_version_is_refused_until_restarted(version, images, target, monkeypatch):
    with monkeypatch.context() as other:
        other.setattr(_journal, "_VERSION", version)
        _killed_before(StoreWriter, "finish", images, target)
    assert f"journal version {version!r}, this dali_lmdb continues 1; use --restart" in refusal(images, target)
    assert left_beside(target) == ["x.lmdb.partial", "x.lmdb.partial-journal"]
    assert convert(images, target, restart=True).records == 24


@pytest.mark.parametrize("found", [b"my notes\n", bytes(5000)], ids=["text", "zeros"])
def test_a_file_that_is_no_journal_is_neither_continued_nor_removed(found, images, target):
    journal = target.with_name("x.lmdb.partial-journal")
    journal.write_bytes(found)
    assert "damaged, or not the journal of a conversion; use --restart" in refusal(images, target)
    assert journal.read_bytes() == found
    assert convert(images, target, restart=True).records == 24


def test_a_lock_on_a_journal_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    path, lock = tmp_path / "x.partial-journal", _journal._lock
    removed = []

    def remove_first(file, path):
        lock(file, path)
        if not removed:
            removed.append(path.unlink())  # as a converter does that ends between opening and locking

    monkeypatch.setattr(_journal, "_lock", remove_first)
    journal = Journal(path)
    with pytest.raises(ConversionError, match="another converter"):
        Journal(path)
    journal.close()
    assert removed == [None]
    assert not path.exists()
