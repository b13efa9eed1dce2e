import contextlib
import os
import resource
import signal
import tracemalloc
from pathlib import Path

import pytest
from conversions import add_bad, content, in_child, left_beside, refusal, write_with

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.convert.sources import FolderSource, Item, Source
from dali_lmdb.errors import ConversionError
from dali_lmdb.store.writer import StoreWriter


@pytest.mark.parametrize("limit", [1, 5_000, 9_000, 20_000, 40_000, 45_000])
def test_a_disk_that_refuses_more_bytes_stops_the_conversion_and_it_can_go_on(
    small_pieces, image_folder, store_path, target, limit, tmp_path
):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            convert(image_folder, target, commit_records=5)
        except ConversionError as error:
            os._exit(7 if "\n" not in str(error) else 8)

    assert os.waitstatus_to_exitcode(in_child(work)) == 7
    assert not target.exists()
    assert convert(image_folder, target).records == 24
    assert content(target) == content(store_path)
    assert left_beside(target) == ["x.lmdb"]


@pytest.mark.parametrize("free", [0, 4096, 16_384, 40_000])
def test_a_full_disk_stops_the_conversion_and_it_can_go_on_with_room(
    small_pieces, image_folder, store_path, small_disk, free
):
    filler = small_disk / "filler"
    filler.write_bytes(b"\1" * (256 * 1024 - free - 4096))
    target = small_disk / "x.lmdb"
    message = refusal(image_folder, target, commit_records=5)
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
        original = StoreWriter.sync

        def sync(self):
            original(self)
            with open(small_disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"\1" * 1024)

        StoreWriter.sync = sync
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
    write_with(monkeypatch, piece_records=5000)
    original, seen = StoreWriter._maybe_flush, []

    def after_transaction(self, num_bytes):
        original(self, num_bytes)
        lines = Path("/proc/self/status").read_text().splitlines()
        seen.extend(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def peak_of(num_records):
        seen.clear()
        convert(ManyRecords(num_records), target, settings=ConvertSettings(check="none"))
        target.unlink()
        return max(seen)

    monkeypatch.setattr(StoreWriter, "_maybe_flush", after_transaction)
    before = peak_of(100_000)  # first, since a process keeps what it once had
    assert peak_of(400_000) - before < 40_000  # kB; 16,000 measured, and 108,000 with an index in one piece
