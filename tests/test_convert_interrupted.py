import contextlib
import errno
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Thread

import pytest
from conversions import CountedSource, Killer, content, die, in_child, left_beside, records_in, refusal, write_with
from image_sets import save_grey

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.convert import __main__ as command
from dali_lmdb.convert.__main__ import main
from dali_lmdb.convert.sources import FolderSource
from dali_lmdb.errors import DaliLmdbError
from dali_lmdb.store import open_store
from dali_lmdb.store.writer import StoreWriter

KILLS = range(0, 140, 4)


@pytest.mark.parametrize("at", KILLS)
def test_killed_at_any_instant_the_same_call_goes_on(small_pieces, image_folder, store_path, target, at):
    def work():
        Killer(at).arm()
        convert(image_folder, target, num_threads=1, commit_records=5)

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


def test_the_kills_above_cover_a_whole_conversion(small_pieces, image_folder, target):
    killer = Killer(10**9)

    def work():
        killer.arm()
        convert(image_folder, target, num_threads=1, commit_records=5)
        os._exit(min(255, 10**9 - killer.left))

    instants = os.waitstatus_to_exitcode(in_child(work))
    assert 60 < instants < KILLS[-1] + 30


def test_killed_twice_it_goes_on_from_the_later_place(small_pieces, image_folder, store_path, target):
    for commits in (2, 3):

        def work(commits=commits):
            original = StoreWriter.commit

            def commit(self, values):
                original(self, values)
                if self.num_records >= 5 * commits:
                    die()

            StoreWriter.commit = commit
            convert(image_folder, target, commit_records=5)

        assert os.WIFSIGNALED(in_child(work))
        assert records_in(target.with_name("x.lmdb.partial")) == 5 * commits
    convert(image_folder, target)
    assert content(target) == content(store_path)


@pytest.mark.parametrize("at", range(0, 40, 2))
def test_killed_while_it_goes_on_from_the_middle_of_a_commit_it_goes_on_again(
    monkeypatch, image_folder, store_path, target, at
):
    write_with(monkeypatch, transaction_bytes=1)  # a transaction a record; all are journalled together

    def first():
        original = StoreWriter._maybe_flush

        def after_transaction(self, num_bytes):
            original(self, num_bytes)
            if self.num_records == 7:
                die()

        StoreWriter._maybe_flush = after_transaction
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
    small_pieces, image_folder, store_path, target
):
    def work():
        original = ThreadPoolExecutor.submit

        def submit(self, function, *arguments):
            future = original(self, function, *arguments)
            if getattr(function, "__name__", "") == "_commit":
                signal.raise_signal(signal.SIGINT)
            return future

        ThreadPoolExecutor.submit = submit
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            convert(image_folder, target, commit_records=5)
        except KeyboardInterrupt:
            os._exit(7)

    assert os.waitstatus_to_exitcode(in_child(work)) == 7
    convert(image_folder, target)
    assert content(target) == content(store_path)


def test_an_error_of_the_disk_that_is_told_once_is_not_missed(monkeypatch, image_folder, store_path, target):
    write_with(monkeypatch, transaction_bytes=20_000, flush_bytes=20_000)
    calls, original = [], os.fdatasync

    def fdatasync(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(descriptor)

    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fdatasync)
        message = refusal(image_folder, target)
    assert "Input/output error" in message
    convert(image_folder, target)
    assert content(target) == content(store_path)


@pytest.fixture
def interrupted(small_pieces, images, target):
    """A conversion of ``images`` to ``target`` that was killed after ten records."""

    def work():
        original = StoreWriter.commit

        def commit(self, values):
            original(self, values)
            if self.num_records == 10:
                die()

        StoreWriter.commit = commit
        convert(images, target, commit_records=5)

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_command_with_a_sentence_and_it_can_go_on(
    small_pieces, images, target, store_path, tmp_path, number
):
    def work():
        original = StoreWriter.commit

        def commit(self, values):
            original(self, values)
            if self.num_records == 10:
                os.kill(os.getpid(), number)

        StoreWriter.commit = commit
        command.convert = partial(convert, commit_records=5)
        with open(tmp_path / "err", "w") as file, contextlib.redirect_stderr(file):
            main([str(images), str(target)], prog_name="convert")

    def exit_code():
        try:
            work()
        except SystemExit as end:
            os._exit(end.code)

    assert os.waitstatus_to_exitcode(in_child(exit_code)) == 130
    assert (tmp_path / "err").read_text() == "Stopped. Run the same command again to resume where it stopped.\n"
    assert not target.exists()
    convert(images, target)
    assert content(target) == content(store_path)


def test_killed_between_transactions_of_a_journalled_run_it_goes_on_from_the_last(
    small_pieces, monkeypatch, images, store_path, target
):
    write_with(monkeypatch, transaction_bytes=1)
    (images / "ant" / "0035.jpg").write_bytes(b"no image")
    settings = ConvertSettings(on_bad="skip")

    def work():
        original = StoreWriter._maybe_flush

        def after_transaction(self, num_bytes):
            original(self, num_bytes)
            if self.num_records == 7:
                die()

        StoreWriter._maybe_flush = after_transaction
        convert(images, target, settings=settings, commit_records=5)

    assert os.WIFSIGNALED(in_child(work))
    assert records_in(target.with_name("x.lmdb.partial")) == 7
    source = CountedSource(images)
    assert convert(source, target, settings=settings).skipped == 1
    assert len(source.read) == 24 - 7
    assert content(target) == content(store_path)
