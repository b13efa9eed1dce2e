import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import tracemalloc
from pathlib import Path
from threading import Thread

import lmdb
import numpy as np
import pytest
from click.testing import CliRunner
from image_sets import make_image_folder, save_grey, save_noise
from PIL import Image
from torchvision.datasets import ImageFolder

from dali_lmdb.convert import ConvertSettings, convert, converter, job
from dali_lmdb.convert.__main__ import main
from dali_lmdb.convert.journal import Journal
from dali_lmdb.convert.sources import FolderSource, Item, Source
from dali_lmdb.errors import ConversionError, DaliLmdbError, SourceError, StoreFormatError
from dali_lmdb.store import Kind, layout, open_store, writer
from dali_lmdb.store.writer import StoreWriter

SKIP_BAD = ConvertSettings(on_bad="skip")


@pytest.fixture
def target(tmp_path):
    """A name for a store in a folder that holds nothing else."""
    (tmp_path / "stores").mkdir()
    return tmp_path / "stores" / "x.lmdb"


@pytest.fixture
def images(tmp_path):
    """A folder of 24 images that a test may change."""
    return make_image_folder(tmp_path / "images")


@pytest.fixture
def small_commits(monkeypatch):
    """Commits of five images and an index in pieces of seven, so that a small conversion has several."""
    monkeypatch.setattr(job, "_COMMIT_RECORDS", 5)
    monkeypatch.setattr(layout, "PIECE_RECORDS", 7)


def left_beside(target):
    return sorted(path.name for path in target.parent.iterdir())


def content(path):
    """All that two conversions of the same source have in common."""
    with open_store(path) as store:
        columns = ("label", "height", "width", "num_bytes", "crc32", "kind", "change")
        return (
            [bytes(store.read(i)) for i in range(len(store))],
            [store.name(i) for i in range(len(store))],
            store.classes,
            store.fingerprint,
            {name: store.column(name).tolist() for name in columns},
        )


def refusal(source, target, error=ConversionError, **options):
    with pytest.raises(error) as info:
        convert(source, target, **options)
    message = str(info.value)
    assert "\n" not in message
    return message


# --- what is found, and in which order


def assert_as_image_folder(folder, target):
    convert(folder, target)
    expected = ImageFolder(str(folder))
    with open_store(target) as store:
        assert store.classes == expected.classes
        assert [store.name(i) for i in range(len(store))] == [
            os.path.relpath(path, folder) for path, _ in expected.samples
        ]
        assert store.labels.tolist() == expected.targets
        for i, (path, _) in enumerate(expected.samples):
            with open(path, "rb") as file:
                assert bytes(store.read(i)) == file.read()


def test_records_are_image_folders_in_order(images, target):
    assert_as_image_folder(images, target)


def test_nested_odd_and_hidden_names_come_in_image_folders_order(tmp_path, target):
    names = [
        "b/10.jpg 9.jpg 01.JPG Z.JPEG a.Jpg é.png _.bmp -.webp .hidden.jpg",
        "b/sub/1.jpg sub/deep/er/2.png sub-a/3.jpg sub.a/4.tif Sub/5.tiff s/6.jpg",
        "B/1.jpg",
        "a b/one two.jpg",
        "é/1.ppm 2.pgm",
        ".dot/1.jpg",
        "10/1.jpg",
        "9/1.jpg",
    ]
    number = 0
    for line in names:
        folder, _, files = line.partition("/")
        for name in [files] if " " in folder or files.startswith("one") else files.split(" "):
            path = tmp_path / "images" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            save_noise(path, seed=number, size=(8, 8 + number)) if path.suffix.lower() != ".pgm" else Image.new(
                "L", (5, 6)
            ).save(path)
            number += 1
    assert_as_image_folder(tmp_path / "images", target)


def test_files_that_are_not_images_and_files_beside_the_classes_are_ignored(images, target):
    save_grey(images / "stray.jpg", 3)
    for name in ("notes.txt", "Thumbs.db", "no_extension", "image.jpg.bak", "image.gif", "image.npy"):
        (images / "ant" / name).write_text("not an image")
    (images / "ant" / "folder.txt").mkdir()
    assert_as_image_folder(images, target)


def test_equal_images_under_two_names_are_two_records(images, target):
    shutil.copy(images / "ant" / "000.jpg", images / "cat" / "zzz.jpg")
    assert convert(images, target).records == 25
    with open_store(target) as store:
        assert bytes(store.read(0)) == bytes(store.read(24))


def test_links_inside_the_folder_are_followed(images, target):
    (images / "bee" / "link.jpg").symlink_to(images / "ant" / "000.jpg")
    (images / "dog").symlink_to(images / "ant", target_is_directory=True)
    assert_as_image_folder(images, target)


def test_a_file_name_that_is_not_utf8_is_converted_with_its_bytes_spelt_out(images, target):
    path = os.path.join(os.fsencode(images), b"ant", b"\xff\n.jpg")
    shutil.copy(images / "ant" / "000.jpg", path)
    assert convert(images, target).records == 25
    with open_store(target) as store:
        names = [store.name(i) for i in range(25)]
    assert len(set(names)) == 25
    assert "ant/\\xff\n.jpg" in names


# --- what is said about each image


def test_kinds_and_sizes_are_what_the_bytes_say_not_the_name(tmp_path, target):
    folder = tmp_path / "images" / "one"
    folder.mkdir(parents=True)
    save_noise(folder / "00.jpg", seed=0, size=(21, 34))
    save_noise(folder / "01.jpg", seed=0, size=(22, 35), progressive=True)
    Image.new("L", (36, 23), 90).save(folder / "02.jpg")
    Image.new("CMYK", (37, 24)).save(folder / "03.jpg")
    for number, (format_, height) in enumerate(
        [("PNG", 25), ("WEBP", 26), ("BMP", 27), ("TIFF", 28), ("PPM", 29)]
    ):
        save_noise(folder / f"{4 + number:02}.jpg", seed=1, size=(height, 40), format=format_)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    save_noise(folder / "09.jpg", seed=2, size=(30, 50), exif=exif)
    summary = convert(tmp_path / "images", target)
    with open_store(target) as store:
        kinds = " ".join(Kind(kind).name.removeprefix("JPEG_") for kind in store.column("kind"))
        assert kinds == "BASELINE PROGRESSIVE GRAYSCALE CMYK PNG WEBP BMP TIFF PNM BASELINE"
        assert store.column("height").tolist() == list(range(21, 31))
        assert store.column("width").tolist() == [34, 35, 36, 37, 40, 40, 40, 40, 40, 50]
    assert (summary.gpu, summary.cpu, summary.none) == (5, 5, 0)


def test_unchecked_images_are_of_unknown_kind_and_size(images, target):
    (images / "ant" / "bad.jpg").write_text("not an image")
    summary = convert(images, target, settings=ConvertSettings(check="none"))
    assert (summary.records, summary.none) == (25, 25)
    with open_store(target) as store:
        assert set(store.column("kind").tolist()) == {Kind.UNKNOWN}
        assert not store.column("height").any()


def add_bad(images):
    """Three files that are no images, first, middle and last; returns their names."""
    (images / "ant" / "!.jpg").write_text("hello\tthere")
    (images / "bee" / "zero.jpg").touch()
    (images / "cat" / "~.jpg").write_bytes((images / "cat" / "020.jpg").read_bytes()[:100])
    return ["ant/!.jpg", "bee/zero.jpg", "cat/~.jpg"]


def report_of(target):
    lines = target.with_name(target.name + ".bad.tsv").read_text().splitlines()
    assert lines[0] == "name\treason"
    rows = [line.split("\t") for line in lines[1:]]
    assert all(len(row) == 2 and row[1] for row in rows)
    return [name for name, _ in rows]


def test_bad_images_are_all_reported_and_nothing_is_published(images, target):
    bad = add_bad(images)
    message = refusal(images, target)
    assert "3 of 27 images are bad" in message
    assert report_of(target) == bad
    assert not target.exists()


def test_bad_images_are_skipped_when_asked(images, target, image_folder, tmp_path):
    bad = add_bad(images)
    summary = convert(images, target, settings=SKIP_BAD)
    assert (summary.records, summary.skipped) == (24, 3)
    assert report_of(target) == bad
    assert left_beside(target) == ["x.lmdb", "x.lmdb.bad.tsv"]
    convert(image_folder, tmp_path / "good.lmdb")
    assert content(target) == content(tmp_path / "good.lmdb")


def test_after_a_refusal_skipping_reads_no_image_again(images, target):
    add_bad(images)
    refusal(images, target)
    source = CountedSource(images)
    summary = convert(source, target, settings=SKIP_BAD)
    assert (summary.records, summary.skipped) == (24, 3)
    assert source.read == []


def test_after_a_refusal_mended_images_are_converted_with_restart(images, target):
    for name in add_bad(images):
        save_grey(images / name, 5)
        os.utime(images / name, ns=(1, 1))
    (images / "ant" / "!.jpg").write_text("bad")
    refusal(images, target)
    save_grey(images / "ant" / "!.jpg", 5)
    assert "changed since" in refusal(images, target)
    summary = convert(images, target, restart=True)
    assert (summary.records, summary.skipped) == (27, 0)
    assert left_beside(target) == ["x.lmdb"]


@pytest.mark.parametrize("shards", [None, 3])
def test_files_that_are_not_taken_are_listed_with_the_reason_and_stop_nothing(images, target, shards):
    (images / "bee" / "deep").mkdir()
    by_name = "left out: its name does not end as an image's"
    in_no_class = "left out: in no class folder"
    others = {
        "ant/Thumbs.db": by_name,
        "bee/deep/notes": by_name,
        "cat/000.jpg.tmp": by_name,
        "labels.csv": in_no_class,
        "stray.jpg": in_no_class,
    }
    for name in others:
        (images / name).write_text("no image")
    summary = convert(images, target, shards=shards)
    assert (summary.records, summary.skipped, summary.left_out) == (24, 0, 5)
    (report,) = summary.reports
    rows = [tuple(line.split("\t")) for line in Path(report).read_text().splitlines()]
    assert rows == [("name", "reason"), *others.items()]


def test_bad_images_and_files_that_are_none_are_listed_in_one_report(images, target):
    bad = add_bad(images)
    (images / "ant" / "Thumbs.db").write_text("no image")
    summary = convert(images, target, settings=SKIP_BAD)
    assert (summary.records, summary.skipped, summary.left_out) == (24, 3, 1)
    assert report_of(target) == [*bad, "ant/Thumbs.db"]
    code, out, _ = run_main(images, target.with_name("y.lmdb"), "--on-bad", "skip")
    assert code == 0
    assert "3 bad images and 1 other files left out, listed in" in out


def test_a_source_of_bad_images_only_makes_no_store(tmp_path, target):
    (tmp_path / "images" / "one").mkdir(parents=True)
    (tmp_path / "images" / "one" / "1.jpg").write_text("bad")
    assert "all 1 images are bad" in refusal(tmp_path / "images", target, settings=SKIP_BAD)
    assert not target.exists()


def test_images_over_the_pixel_limit_are_bad(images, target):
    refusal(images, target, settings=ConvertSettings(max_pixels=60 * 50))
    expected = ImageFolder(str(images))
    too_large = []
    for path, _ in expected.samples:
        with Image.open(path) as image:
            if image.size[0] * image.size[1] > 3000:
                too_large.append(os.path.relpath(path, images))
    assert report_of(target) == too_large
    assert 0 < len(too_large) < 24


def test_a_header_that_claims_a_giant_is_bad_and_not_decoded(images, target):
    raw = bytearray((images / "ant" / "000.jpg").read_bytes())
    at = raw.index(b"\xff\xc0") + 5
    raw[at : at + 4] = (65_500).to_bytes(2, "big") * 2
    (images / "ant" / "giant.jpg").write_bytes(raw)
    summary = convert(images, target, settings=SKIP_BAD)
    assert (summary.records, summary.skipped) == (24, 1)
    assert report_of(target) == ["ant/giant.jpg"]


@pytest.mark.parametrize(
    "settings",
    [{"check": "look"}, {"on_bad": "ignore"}, {"max_pixels": 0}],
    ids=str,
)
def test_wrong_settings_are_value_errors(settings):
    with pytest.raises(ValueError, match="expected"):
        ConvertSettings(**settings)


# --- what is refused


def test_a_missing_source_is_refused(tmp_path, target):
    assert "no such" in refusal(tmp_path / "nothing", target, SourceError)
    assert left_beside(target) == []


def test_a_source_that_is_a_text_file_is_refused(tmp_path, target):
    (tmp_path / "notes.txt").write_text("notes\n")
    refusal(tmp_path / "notes.txt", target, SourceError)
    assert left_beside(target) == []


def test_a_folder_without_class_folders_is_refused(tmp_path, target):
    (tmp_path / "images").mkdir()
    refusal(tmp_path / "images", target, SourceError)
    assert left_beside(target) == []


def test_a_class_without_images_is_refused_by_name(images, target):
    (images / "dog").mkdir()
    (images / "dog" / "notes.txt").touch()
    assert "dog" in refusal(images, target, SourceError)
    assert left_beside(target) == []


def test_a_link_that_leads_nowhere_is_refused_by_name(images, target):
    (images / "ant" / "gone.jpg").symlink_to(images / "nothing.jpg")
    assert "gone.jpg" in refusal(images, target, SourceError)
    assert not target.exists()


def test_a_link_out_of_the_folder_is_refused(images, tmp_path, target):
    save_grey(tmp_path / "outside.jpg", 1)
    (images / "ant" / "out.jpg").symlink_to(tmp_path / "outside.jpg")
    assert "out.jpg" in refusal(images, target, SourceError)
    assert left_beside(target) == []


def test_a_pipe_named_as_an_image_does_not_hang(images, target):
    os.mkfifo(images / "ant" / "pipe.jpg")
    assert "pipe.jpg" in refusal(images, target, SourceError)


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b"mine"), lambda path: path.mkdir()])
def test_an_existing_target_is_refused_and_left_alone(images, target, make):
    make(target)
    before = target.stat()
    message = refusal(images, target)
    assert str(target) in message
    assert left_beside(target) == ["x.lmdb"]
    assert target.stat() == before


def test_a_target_that_is_a_link_to_nothing_is_refused_and_left_alone(images, target, tmp_path):
    target.symlink_to(tmp_path / "other-disk" / "x.lmdb")
    assert str(tmp_path / "other-disk" / "x.lmdb") in refusal(images, target)
    assert target.is_symlink()
    assert left_beside(target) == ["x.lmdb"]


def test_an_existing_store_is_not_replaced_even_with_restart(images, target):
    convert(images, target)
    before = target.read_bytes()
    assert "already exists" in refusal(images, target, restart=True)
    assert target.read_bytes() == before
    assert left_beside(target) == ["x.lmdb"]


def test_a_target_in_a_missing_folder_is_refused(images, tmp_path):
    assert "does not exist" in refusal(images, tmp_path / "no" / "x.lmdb")
    assert not (tmp_path / "no").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_target_in_a_read_only_folder_is_refused(images, target):
    target.parent.chmod(0o555)
    assert "not writable" in refusal(images, target)
    target.parent.chmod(0o755)
    assert left_beside(target) == []


@pytest.mark.parametrize("length", [240, 250, 300])
def test_names_that_are_too_long_are_refused(images, target, length):
    refusal(images, target.with_name("x" * length))
    refusal(images / ("x" * length) / "y", target, SourceError)
    assert left_beside(target) == []


def test_a_target_without_a_name_is_refused(images):
    with pytest.raises((ConversionError, ValueError)) as info:
        convert(images, "")
    assert "PosixPath" not in str(info.value)


# --- interruptions


class CountedSource(FolderSource):
    """Remembers which images were read."""

    def __init__(self, path):
        super().__init__(path)
        self.read = []

    def items(self):
        for item in super().items():
            yield item._replace(read=lambda item=item: (self.read.append(item.name), item.read())[1])


def in_child(work):
    """Run ``work()`` in a forked process; returns its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Killer:
    """Kills its process at the n-th of the instants that matter."""

    def __init__(self, at):
        self.left = at

    def tick(self):
        self.left -= 1
        if self.left < 0:
            die()

    def wrap(self, owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self.tick()
            result = original(*args, **kwargs)
            self.tick()
            return result

        setattr(owner, name, wrapped)

    def arm(self):
        for owner, name in [
            (os, "fsync"),
            (os, "rename"),
            (StoreWriter, "__init__"),
            (StoreWriter, "commit"),
            (StoreWriter, "add_index"),
            (StoreWriter, "finish"),
            (Journal, "__init__"),
            (Journal, "start"),
            (Journal, "append"),
            (Journal, "cut_to"),
            (Journal, "_write"),
            (Journal, "_cut"),
        ]:
            self.wrap(owner, name)
        sys.addaudithook(
            lambda event, args: self.tick() if event in ("open", "os.remove", "os.truncate") else None
        )


def records_in(partial):
    if not partial.exists() or partial.stat().st_size == 0:
        return 0
    with lmdb.open(str(partial), subdir=False, lock=False, readonly=True) as env, env.begin() as transaction:
        return sum(key < layout.RESERVED_KEY for key in transaction.cursor().iternext(values=False))


KILLS = range(0, 140, 4)


@pytest.mark.parametrize("at", KILLS)
def test_killed_at_any_instant_the_same_call_goes_on(small_commits, image_folder, store_path, target, at):
    def work():
        Killer(at).arm()
        convert(image_folder, target, num_threads=1)

    status = in_child(work)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0
    partial = target.with_name("x.lmdb.partial")
    if target.exists():
        with open_store(target) as store:
            assert len(store) == 24  # whole, or not there
        written = 24
    else:
        written = records_in(partial)
    source = CountedSource(image_folder)
    if killed and left_beside(target) != ["x.lmdb"]:
        summary = convert(source, target)
        assert (summary.records, summary.skipped, summary.classes) == (24, 0, 3)
        assert len(source.read) == 24 - written
    assert content(target) == content(store_path)
    assert left_beside(target) == ["x.lmdb"]


def test_the_kills_above_cover_a_whole_conversion(small_commits, image_folder, target):
    killer = Killer(10**9)

    def work():
        killer.arm()
        convert(image_folder, target, num_threads=1)
        os._exit(min(255, 10**9 - killer.left))

    instants = os.waitstatus_to_exitcode(in_child(work))
    assert 60 < instants < KILLS[-1] + 30


def test_killed_twice_it_goes_on_from_the_later_place(small_commits, image_folder, store_path, target):
    for commits in (2, 3):

        def work(commits=commits):
            original = StoreWriter.commit

            def commit(self, values):
                original(self, values)
                if self.num_records >= 5 * commits:
                    die()

            StoreWriter.commit = commit
            convert(image_folder, target)

        assert os.WIFSIGNALED(in_child(work))
        assert records_in(target.with_name("x.lmdb.partial")) == 5 * commits
    convert(image_folder, target)
    assert content(target) == content(store_path)


@pytest.mark.parametrize("at", range(0, 40, 2))
def test_killed_while_it_goes_on_from_the_middle_of_a_commit_it_goes_on_again(
    monkeypatch, image_folder, store_path, target, at
):
    monkeypatch.setattr(writer, "_TRANSACTION_BYTES", 1)  # a transaction a record; all are journalled together

    def first():
        original = StoreWriter._flush_sometimes

        def after_transaction(self, num_bytes):
            original(self, num_bytes)
            if self.num_records == 7:
                die()

        StoreWriter._flush_sometimes = after_transaction
        convert(image_folder, target)

    def second():
        Killer(at).arm()
        convert(image_folder, target, num_threads=1)

    assert os.WIFSIGNALED(in_child(first))
    assert records_in(target.with_name("x.lmdb.partial")) == 7
    assert os.WIFSIGNALED(in_child(second))
    source = CountedSource(image_folder)
    if left_beside(target) != ["x.lmdb"]:
        convert(source, target)
    assert len(source.read) <= 24 - 7
    assert content(target) == content(store_path)


def test_an_interrupt_while_a_commit_is_handed_over_writes_nothing_twice(
    small_commits, image_folder, store_path, target
):
    def work():
        original = job.ThreadPoolExecutor.submit

        def submit(self, function, *arguments):
            future = original(self, function, *arguments)
            if getattr(function, "__name__", "") == "_commit":
                signal.raise_signal(signal.SIGINT)
            return future

        job.ThreadPoolExecutor.submit = submit
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            convert(image_folder, target)
        except KeyboardInterrupt:
            os._exit(7)

    assert os.waitstatus_to_exitcode(in_child(work)) == 7
    convert(image_folder, target)
    assert content(target) == content(store_path)


def test_an_error_of_the_disk_that_is_told_once_is_not_missed(monkeypatch, image_folder, store_path, target):
    monkeypatch.setattr(writer, "_TRANSACTION_BYTES", 20_000)
    monkeypatch.setattr(writer, "_FLUSH_BYTES", 20_000)
    calls, original = [], os.fdatasync

    def fdatasync(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(descriptor)

    with monkeypatch.context() as broken:
        broken.setattr(writer.os, "fdatasync", fdatasync)
        message = refusal(image_folder, target)
    assert "Input/output error" in message
    convert(image_folder, target)
    assert content(target) == content(store_path)


@pytest.fixture
def interrupted(small_commits, images, target):
    """A conversion of ``images`` to ``target`` that was killed after ten records."""

    def work():
        original = StoreWriter.commit

        def commit(self, values):
            original(self, values)
            if self.num_records == 10:
                die()

        StoreWriter.commit = commit
        convert(images, target)

    assert os.WIFSIGNALED(in_child(work))
    assert records_in(target.with_name("x.lmdb.partial")) == 10
    return target


def test_a_torn_journal_is_cut_to_its_last_whole_entry(interrupted, images, store_path):
    journal = interrupted.with_name("x.lmdb.partial-journal")
    with open(journal, "ab") as file:
        file.write(b"\x50\0\0\0garbage")
    convert(images, interrupted)
    assert content(interrupted) == content(store_path)


def test_a_partial_file_without_its_journal_is_not_trusted(interrupted, images, store_path):
    interrupted.with_name("x.lmdb.partial-journal").unlink()
    convert(images, interrupted)
    assert content(interrupted) == content(store_path)
    assert left_beside(interrupted) == ["x.lmdb"]


def test_a_journal_without_its_partial_file_starts_over(interrupted, images, store_path):
    interrupted.with_name("x.lmdb.partial").unlink()
    convert(images, interrupted)
    assert content(interrupted) == content(store_path)


def test_a_damaged_partial_file_is_refused_in_one_line(interrupted, images):
    partial = interrupted.with_name("x.lmdb.partial")
    partial.write_bytes(b"not lmdb" * 2000)
    assert "restart" in refusal(images, interrupted)
    assert convert(images, interrupted, restart=True).records == 24


def test_damage_to_written_records_is_noticed_before_publishing(interrupted, images):
    partial = interrupted.with_name("x.lmdb.partial")
    image = (images / "ant" / "003.jpg").read_bytes()
    before = partial.read_bytes()
    after = before.replace(image, image[:-3] + bytes([image[-3] ^ 1]) + image[-2:])
    assert after != before
    partial.write_bytes(after)
    assert "checksum" in refusal(images, interrupted)
    assert not interrupted.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda images: os.utime(images / "ant" / "001.jpg", ns=(5, 5)),
        lambda images: save_grey(images / "bee" / "new.jpg", 3),
        lambda images: (images / "cat" / "023.jpg").unlink(),
        lambda images: (images / "ant" / "000.jpg").rename(images / "ant" / "zzz.jpg"),
        lambda images: (images / "ant").rename(images / "zebra"),
    ],
    ids=["touched", "added", "removed", "renamed", "class renamed"],
)
def test_a_source_that_changed_since_is_refused_until_restarted(interrupted, images, change, tmp_path):
    change(images)
    refusal(images, interrupted)
    assert not interrupted.exists()
    convert(images, interrupted, restart=True)
    convert(images, tmp_path / "fresh.lmdb")
    assert content(interrupted) == content(tmp_path / "fresh.lmdb")


def test_another_source_is_refused_and_both_are_named(interrupted, image_folder, images):
    message = refusal(image_folder, interrupted)
    assert str(images) in message
    assert str(image_folder) in message


@pytest.mark.parametrize("settings", [{"check": "none"}, {"max_pixels": 10**6}], ids=str)
def test_other_settings_are_refused_until_restarted(interrupted, images, settings):
    message = refusal(images, interrupted, settings=ConvertSettings(**settings))
    assert "settings" in message
    summary = convert(images, interrupted, settings=ConvertSettings(**settings), restart=True)
    assert summary.records == 24


def test_published_but_not_tidied_up_it_only_tidies_up(images, image_folder, target):
    def work():
        original = os.rename

        def rename(*args):
            original(*args)
            die()

        os.rename = rename
        convert(images, target)

    assert os.WIFSIGNALED(in_child(work))
    assert left_beside(target) == ["x.lmdb", "x.lmdb.partial-journal"]
    assert "already exists" in refusal(image_folder, target)  # another source
    source = CountedSource(images)
    assert convert(source, target).records == 24
    assert source.read == []
    assert left_beside(target) == ["x.lmdb"]


def test_a_second_converter_on_the_same_target_is_refused(images, target):
    class Impatient(FolderSource):
        def items(self):
            for item in super().items():
                yield item._replace(
                    read=lambda item=item: (messages.append(refusal(images, target)), item.read())[1]
                )

    messages = []
    convert(Impatient(images), target, num_threads=1)
    assert len(messages) == 24
    assert all("another converter" in message for message in messages)
    assert left_beside(target) == ["x.lmdb"]


def test_a_target_that_appears_while_the_source_is_counted_is_refused(images, target):
    class Slow(FolderSource):
        def count(self):
            if not target.exists():
                convert(images, target)
            return super().count()

    assert "already exists" in refusal(Slow(images), target)
    assert left_beside(target) == ["x.lmdb"]


@pytest.mark.parametrize("which", ["000", "012", "023"])
def test_an_image_that_vanishes_during_the_conversion_stops_it_by_name(images, target, which):
    (path,) = images.rglob(f"{which}.jpg")

    class Vanishing(FolderSource):
        def items(self):
            for item in super().items():
                yield item._replace(read=lambda item=item: (path.unlink(missing_ok=True), item.read())[1])

    assert f"{which}.jpg" in refusal(Vanishing(images), target, DaliLmdbError)
    assert not target.exists()


@pytest.mark.parametrize("change", ["removed", "added"])
def test_a_source_that_changes_after_it_was_counted_makes_no_store(images, target, change):
    class Changing(FolderSource):
        def count(self):
            number = super().count()
            if change == "removed":
                (images / "bee" / "010.jpg").unlink()
            else:
                save_grey(images / "bee" / "0105.jpg", 3)
            return number

    refusal(Changing(images), target, DaliLmdbError)
    assert not target.exists()


def test_an_image_written_to_while_it_is_read_stops_the_conversion(images, target):
    path = images / "bee" / "010.jpg"
    stop = False

    def grow():
        with open(path, "ab", buffering=0) as file:
            while not stop:
                file.write(b"\0" * 4096)
                file.seek(0)

    thread = Thread(target=grow)
    thread.start()
    try:
        for _ in range(3):
            message = "changed"
            try:
                convert(images, target, restart=True)
                target.unlink()
            except DaliLmdbError as error:
                message = str(error)
            assert "changed" in message
    finally:
        stop = True
        thread.join()


def run_main(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_command_with_a_sentence_and_it_can_go_on(
    small_commits, images, target, store_path, tmp_path, number
):
    def work():
        original = StoreWriter.commit

        def commit(self, values):
            original(self, values)
            if self.num_records == 10:
                os.kill(os.getpid(), number)

        StoreWriter.commit = commit
        with open(tmp_path / "err", "w") as file, contextlib.redirect_stderr(file):
            main([str(images), str(target)], prog_name="convert")

    def exit_code():
        try:
            work()
        except SystemExit as end:
            os._exit(end.code)

    assert os.waitstatus_to_exitcode(in_child(exit_code)) == 130
    assert (tmp_path / "err").read_text() == "Stopped. Run the same command again to go on where it stopped.\n"
    assert not target.exists()
    convert(images, target)
    assert content(target) == content(store_path)


# --- a disk that is full


@pytest.mark.parametrize("limit", [1, 5_000, 9_000, 20_000, 40_000, 45_000])
def test_a_disk_that_refuses_more_bytes_stops_the_conversion_and_it_can_go_on(
    small_commits, image_folder, store_path, target, limit, tmp_path
):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            convert(image_folder, target)
        except ConversionError as error:
            os._exit(7 if "\n" not in str(error) else 8)

    assert os.waitstatus_to_exitcode(in_child(work)) == 7
    assert not target.exists()
    assert convert(image_folder, target).records == 24
    assert content(target) == content(store_path)
    assert left_beside(target) == ["x.lmdb"]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not allowed here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("free", [0, 4096, 16_384, 40_000])
def test_a_full_disk_stops_the_conversion_and_it_can_go_on_with_room(
    small_commits, image_folder, store_path, small_disk, free
):
    filler = small_disk / "filler"
    filler.write_bytes(b"\1" * (256 * 1024 - free - 4096))
    target = small_disk / "x.lmdb"
    message = refusal(image_folder, target)
    assert "make room" in message
    assert not target.exists()
    filler.unlink()
    convert(image_folder, target)
    assert content(target) == content(store_path)
    assert left_beside(target) == ["x.lmdb"]


def test_a_report_that_does_not_fit_on_the_disk_is_one_line(images, small_disk):
    add_bad(images)
    target = small_disk / "x.lmdb"

    def work():
        original = job._write_report

        def write_report(*arguments, **options):
            with open(small_disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"\1" * 1024)
            return original(*arguments, **options)

        job._write_report = write_report
        try:
            convert(images, target)
        except ConversionError as error:
            os._exit(7 if "\n" not in str(error) else 8)

    assert os.waitstatus_to_exitcode(in_child(work)) == 7


def test_memory_is_bounded_by_bytes_also_where_images_grow_of_a_sudden(image_folder, target):
    class Growing(FolderSource):
        def items(self):
            for item in super().items():
                for copy in range(100):
                    size = 100 if item.label == 0 else 200_000
                    name = f"{item.name}-{copy}"
                    yield item._replace(name=name, read=lambda size=size: bytes(size), stamp=lambda: 0)

        def count(self):
            return 100 * super().count()

    tracemalloc.start()
    try:
        convert(Growing(image_folder), target, settings=ConvertSettings(check="none"), num_threads=2)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert target.stat().st_size > 300e6
    assert peak_bytes < 80e6


class ManyRecords(Source):
    """So many records of a few bytes."""

    kind = "folder"

    def __init__(self, num_records):
        self.num_records = num_records

    @property
    def classes(self):
        return ["one"]

    def items(self):
        for record in range(self.num_records):
            yield Item(f"one/{record:040}.jpg", 0, lambda: b"a record", lambda: 0)

    def identity(self):
        return {"images": self.num_records}


def test_memory_does_not_grow_with_the_number_of_records(monkeypatch, target):
    monkeypatch.setattr(layout, "PIECE_RECORDS", 5000)

    original, seen = StoreWriter._flush_sometimes, []

    def after_transaction(self, num_bytes):
        original(self, num_bytes)
        lines = Path("/proc/self/status").read_text().splitlines()
        seen.extend(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def peak_of(num_records):
        seen.clear()
        convert(ManyRecords(num_records), target, settings=ConvertSettings(check="none"))
        target.unlink()
        return max(seen)

    monkeypatch.setattr(StoreWriter, "_flush_sometimes", after_transaction)
    before = peak_of(100_000)  # first, since a process keeps what it once had
    assert peak_of(400_000) - before < 40_000  # kB; 16,000 measured, and 108,000 with an index in one piece


# --- the command


def test_the_command_prints_a_summary(images, target):
    code, out, err = run_main(images, target)
    assert code == 0
    for part in (str(target), "24 records", "3 classes", "images/s", "MB/s"):
        assert part in out
    assert err == ""


def test_the_command_prints_json(images, target):
    add_bad(images)
    code, out, _ = run_main(images, target, "--json", "--on-bad", "skip")
    assert code == 0
    summary = json.loads(out)
    assert {"records": 24, "classes": 3, "skipped": 3}.items() <= summary.items()
    assert summary["bytes"] == sum(len(raw) for raw in content(target)[0])
    assert summary["seconds"] > 0


def test_the_command_turns_refusals_into_one_line_and_exit_code_1(tmp_path, images, target):
    (images / "dog").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for arguments in [
        (tmp_path / "nothing", target),
        (tmp_path / "text.txt", target),
        (tmp_path / "empty", target),
        (images, target),
        (images, tmp_path),
        (images, tmp_path / "text.txt"),
        (images, tmp_path / "no" / "x.lmdb"),
        (images, ""),
        ("", target),
    ]:
        code, out, err = run_main(*arguments)
        assert code == 1, arguments
        assert out == ""
        assert err.startswith("Error: ")
        assert len(err.splitlines()) == 1
    assert left_beside(target) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a"],
        ["a", "b", "c"],
        ["a", "b", "--check", "look"],
        ["a", "b", "--max-pixels", "0"],
        ["a", "b", "--nope"],
    ],
    ids=str,
)
def test_wrong_usage_is_exit_code_2(arguments):
    code, out, err = run_main(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err


def test_the_script_of_the_checkout_is_the_command():
    script = os.path.join(os.path.dirname(__file__), os.pardir, "scripts", "convert.py")
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "SOURCE STORE" in done.stdout


def test_a_store_converted_in_many_transactions_reads_as_one_of_few(small_commits, images, target, store_path):
    convert(images, target, num_threads=3)
    assert content(target) == content(store_path)
    with open_store(target) as store:
        raw = target.read_bytes()
        offsets, lengths = store.extents(np.arange(24))
        for i, (offset, length) in enumerate(zip(offsets.tolist(), lengths.tolist(), strict=True)):
            assert raw[offset : offset + length] == bytes(store.read(i))


def test_the_order_does_not_depend_on_the_threads(images, tmp_path):
    stores = [tmp_path / f"{threads}.lmdb" for threads in (1, 2, 9)]
    for threads, path in zip((1, 2, 9), stores, strict=True):
        convert(images, path, num_threads=threads)
    assert content(stores[0]) == content(stores[1]) == content(stores[2])


def test_progress_ends_at_all_images(small_commits, images, target):
    seen = []
    convert(images, target, progress=seen.append)
    for phase in ("writing", "verifying"):
        done = [progress.done for progress in seen if progress.phase == phase]
        assert done == sorted(done)
        assert done[-1] == 24
    assert {progress.total for progress in seen} == {24}


# --- shards


def test_all_shards_are_looked_at_before_bad_images_stop_anything(images, target):
    for bad in ("ant/000.jpg", "cat/023.jpg"):
        (images / bad).write_bytes(b"no image")
    message = refusal(images, target, ConversionError, shards=3)
    assert "2 of 24 images are bad" in message
    assert convert(images, target, shards=3, settings=ConvertSettings(on_bad="skip")).skipped == 2


def test_shards_of_bad_images_only_make_no_store(tmp_path, target):
    for name in ("one", "two"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.jpg").write_text("bad")
    assert "all 2 images are bad" in refusal(tmp_path / "images", target, shards=2, settings=SKIP_BAD)
    assert not list(target.parent.glob("*.lmdb"))


def test_no_shard_is_left_to_another_converter_before_all_are_published(
    monkeypatch, images, image_folder, store_path, target
):
    messages = []

    def others():
        messages.append(refusal(image_folder, target, shards=2, restart=True))
        messages.append(refusal(images, target, shards=2, restart=True))

    class Slow(FolderSource):
        def items(self):
            for place, item in enumerate(super().items()):
                in_second_shard = place == 20
                yield item._replace(
                    read=lambda item=item, late=in_second_shard: (others() if late else None, item.read())[1]
                )

    publish = converter._publish
    monkeypatch.setattr(converter, "_publish", lambda everything: (others(), publish(everything)))
    source = Slow(images)
    convert(source, target, shards=2)
    assert len(messages) == 4
    assert all("another converter" in message for message in messages)
    assert content(target) == content(store_path)
    assert len(left_beside(target)) == 2


@pytest.fixture
def half_published(images, target):
    """A conversion of ``images`` to two shards, killed when the first had got its name."""

    def work():
        original = os.rename

        def rename(*args):
            original(*args)
            die()

        os.rename = rename
        convert(images, target, shards=2)

    assert os.WIFSIGNALED(in_child(work))
    return target


def test_published_in_part_it_publishes_the_rest_of_the_same(half_published, images, store_path):
    source = CountedSource(images)
    convert(source, half_published, shards=2)
    assert source.read == []
    assert content(half_published) == content(store_path)
    assert len(left_beside(half_published)) == 2


def test_published_in_part_nothing_is_mixed_with_images_that_changed_since(half_published, images):
    save_grey(images / "ant" / "000.jpg", 20)
    os.utime(images / "ant" / "000.jpg", ns=(5, 5))
    assert "changed since" in refusal(images, half_published, shards=2)
    assert "already published" in refusal(images, half_published, shards=2, restart=True)


def test_shards_of_two_conversions_of_the_same_names_are_no_set(images, tmp_path):
    for folder, grey in (("one", 3), ("two", 4)):
        (tmp_path / folder).mkdir()
        save_grey(images / "ant" / "000.jpg", grey)
        convert(images, tmp_path / folder / "x.lmdb", shards=2)
    shutil.copy(tmp_path / "two" / "x-00001-of-00002.lmdb", tmp_path / "one")
    with pytest.raises(StoreFormatError):
        open_store(tmp_path / "one" / "x.lmdb")


def test_killed_while_it_tidies_up_the_same_call_tidies_up(images, store_path, target):
    def work():
        original = os.unlink

        def unlink(*args, **options):
            original(*args, **options)
            if str(args[0]).endswith("-journal"):
                die()

        os.unlink = unlink
        convert(images, target, shards=3)

    assert os.WIFSIGNALED(in_child(work))
    assert len(left_beside(target)) == 5
    source = CountedSource(images)
    assert convert(source, target, shards=3).records == 24
    assert source.read == []
    assert len(left_beside(target)) == 3
    assert content(target) == content(store_path)
    assert "already exists" in refusal(images, target, shards=3)
    assert len(left_beside(target)) == 3


def test_shards_have_the_fingerprint_of_the_same_records_in_one_file(image_folder, store_path, target):
    convert(image_folder, target, shards=5)
    with open_store(target) as shards, open_store(store_path) as whole:
        assert shards.fingerprint == whole.fingerprint


@pytest.mark.parametrize(("first", "then"), [(2, 3), (2, None), (None, 2)])
def test_a_target_that_would_open_as_another_is_refused(image_folder, target, first, then):
    convert(image_folder, target, shards=first)
    before = left_beside(target)
    assert "is there, which opens by the same name; choose another name" in refusal(
        image_folder, target, shards=then
    )
    assert left_beside(target) == before


def test_sharded_images_are_listed_as_often_as_unsharded_ones(image_folder, tmp_path):
    listed = []
    for shards in (1, 12):

        class Counted(FolderSource):
            def items(self):
                for item in super().items():
                    listed.append(item.name)
                    yield item

        listed.clear()
        convert(Counted(image_folder), tmp_path / f"{shards}.lmdb", shards=shards)
        assert len(listed) == 2 * 24  # once to count them, once to write them


def test_an_image_too_wide_for_jpeg_is_bad_when_it_would_be_transcoded(images, target):
    Image.new("L", (70_000, 3)).save(images / "ant" / "wide.png")
    settings = ConvertSettings(transcode=True, on_bad="skip")
    assert convert(images, target, settings=settings).skipped == 1


def test_names_that_are_spelt_the_same_in_utf8_are_refused(images, target):
    data = (images / "ant" / "000.jpg").read_bytes()
    for name in (b"\xff.jpg", b"\\xff.jpg"):
        with open(os.path.join(os.fsencode(images / "ant"), name), "wb") as file:
            file.write(data)
    assert r"ant/\xff.jpg" in refusal(images, target, SourceError)


def test_killed_between_transactions_of_a_journalled_run_it_goes_on_from_the_last(
    small_commits, images, store_path, target
):
    (images / "ant" / "0035.jpg").write_bytes(b"no image")
    settings = ConvertSettings(on_bad="skip")

    def work():
        writer._TRANSACTION_BYTES = 1
        original, ended = writer._Transaction.__exit__, []

        def leave(self, *arguments):
            original(self, *arguments)
            ended.append(1)
            if len(ended) == 7:
                die()

        writer._Transaction.__exit__ = leave
        convert(images, target, settings=settings)

    assert os.WIFSIGNALED(in_child(work))
    assert records_in(target.with_name("x.lmdb.partial")) == 7
    source = CountedSource(images)
    assert convert(source, target, settings=settings).skipped == 1
    assert len(source.read) == 24 - 7
    assert content(target) == content(store_path)
