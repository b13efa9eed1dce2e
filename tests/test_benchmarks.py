import gc
import json
import os
import threading
from pathlib import Path

import cold
import handover
import interpreter
import numpy as np
import page_cache
import peers
import pytest
from classic_databases import make_classic
from click.testing import CliRunner
from cold import COLD_WAYS, compare_cold
from handover import define_handover, measure_handover
from image_sets import save_noise
from liblmdb import plain_reading
from reading import ReadingSettings, shuffled_part

from dali_lmdb.compare.__main__ import main as compare_command
from dali_lmdb.convert import convert
from dali_lmdb.errors import StoreFormatError, StoreNotFoundError
from dali_lmdb.loaders.external_source import fields_of
from dali_lmdb.plan.augment import TrainTransform
from dali_lmdb.store import open_store

NUM_RECORDS = 30
QUICK = ReadingSettings(batch_size=4, rounds=2, seconds=20, records=20)
MEMORY_FILES = Path("/dev/shm")  # a tmpfs wherever there is one


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of some pages each."""
    folder = tmp_path_factory.mktemp("images")
    for record in range(NUM_RECORDS):
        path = folder / f"class{record % 2}" / f"{record:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        save_noise(path, seed=record, size=(100 + record, 120), quality=95)
    return folder


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("stores") / "noise.lmdb"
    convert(folder, target)
    return target


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("shards") / "set.lmdb"
    convert(folder, target, shards=3)
    return target


@pytest.fixture
def classic(tmp_path):
    return make_classic(tmp_path / "classic.lmdb", [(b"image", 0)])


def settings(**overrides):
    return ReadingSettings(**{**vars(QUICK), **overrides})


@pytest.mark.parametrize("name", ["store", "shards"])
def test_every_way_reads_every_record_in_every_round(name, request):
    result = compare_cold(request.getfixturevalue(name), settings=QUICK)
    assert [one.number for one in result.rounds] == [1, 2]
    for one in result.rounds:
        assert set(one.windows) == set(COLD_WAYS)
        assert {window.num_records for window in one.windows.values()} == {20}
        assert len({window.used_bytes for window in one.windows.values()}) == 1
        assert min(window.warm_after for window in one.windows.values()) > 0.9


def test_every_window_reads_from_storage(store):
    page_cache.drop(store)
    middle = np.arange(10, 20)  # opening a store touches its first and last pages and their neighbours
    if any(page_cache.is_cached(*part).any() for part in open_store(store).byte_ranges(middle)):
        pytest.skip("the temporary folder is on a file system that has no storage behind it")
    result = compare_cold(store, settings=QUICK)
    for one in result.rounds:
        for window in one.windows.values():
            assert window.warm_before < 0.5
            assert window.read_bytes is None or window.read_bytes > 0.5 * window.used_bytes


def test_order_of_the_ways_is_reversed_from_round_to_round(store):
    seen = []
    compare_cold(store, settings=QUICK, progress=seen.append)
    order = list(COLD_WAYS)
    assert [list(one.windows) for one in seen] == [order[::-1], order]


def test_window_ends_with_its_time_but_not_before_something_was_read(store):
    result = compare_cold(store, settings=settings(rounds=1, seconds=1e-9, batch_size=3))
    windows = result.rounds[0].windows
    assert windows["get"].num_records == 1
    assert windows["loader"].num_records == 3
    assert 1 <= windows["pread"].num_records <= 16
    assert windows["get"].used_bytes < windows["loader"].used_bytes


def test_ratios_are_of_windows_of_the_same_round(store):
    result = compare_cold(store, settings=QUICK)
    expected = [one.windows["loader"].records_per_s / one.windows["pread"].records_per_s for one in result.rounds]
    assert result.ratios("loader", to="pread") == expected
    assert result.ratios("get", to="get") == [1, 1]
    assert result.to_dict()["ways"]["loader"]["ratio_to_pread"]["rounds"] == expected


def test_no_thread_and_no_file_is_left_after_reading(store):
    measure_handover(store, settings=settings(rounds=1, seconds=0.01))  # DALI keeps what it opens the first time
    gc.collect()  # a DALI pipeline and its source know each other
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    compare_cold(store, settings=QUICK)
    measure_handover(store, settings=settings(rounds=1, seconds=0.01))
    assert threading.active_count() == threads
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files


def test_dropped_file_is_not_in_memory_until_it_is_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    offsets, lengths = np.array([0, 1 << 20], np.uint64), np.array([5000, 1 << 20], np.uint32)
    page_cache.drop(path)
    if page_cache.is_cached(path, offsets, lengths).any():
        pytest.skip("the temporary folder is on a file system that has no storage behind it")
    read_before = page_cache.bytes_from_device()
    path.read_bytes()
    assert page_cache.is_cached(path, offsets, lengths).tolist() == [[True, True], [True, True]]
    read_after = page_cache.bytes_from_device()
    if read_before is not None:
        assert read_after - read_before >= 4 << 20


def test_first_and_last_page_are_looked_at_each_for_itself(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    page_cache.drop(path)
    offsets, lengths = np.array([10_000], np.uint64), np.array([3 << 20], np.uint32)
    if page_cache.is_cached(path, offsets, lengths).any():
        pytest.skip("the temporary folder is on a file system that has no storage behind it")
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 1, 10_000)
        assert page_cache.is_cached(path, offsets, lengths).tolist() == [[True, False]]


@pytest.mark.skipif(not MEMORY_FILES.is_dir(), reason="no tmpfs at /dev/shm")
def test_store_that_cannot_be_dropped_from_memory_is_said_not_to_be_cold(folder):
    path = MEMORY_FILES / f"dali_lmdb-test-{os.getpid()}.lmdb"
    try:
        convert(folder, path)
        result = compare_cold(path, settings=settings(rounds=1))
        output = run(cold.main, path, "--rounds", 1).stdout
    finally:
        path.unlink(missing_ok=True)
    assert result.warm_before == 1
    assert not result.is_cold
    assert result.to_dict()["is_cold"] is False
    assert "NOT COLD: 100% of the records were in the page cache before" in output


@pytest.mark.parametrize("name", ["store", "shards"])
def test_plain_reading_gives_the_records_bytes(name, request):
    opened = open_store(request.getfixturevalue(name))
    with plain_reading(opened) as get:
        assert [bytes(get(record)) for record in range(NUM_RECORDS)] == [
            bytes(opened.read(record)) for record in range(NUM_RECORDS)
        ]


def test_classic_database_is_refused(classic):
    with pytest.raises(StoreFormatError, match=r"classic\.lmdb: a classic database.*convert"):
        compare_cold(classic, settings=QUICK)


def test_part_is_taken_from_the_whole_store_and_shuffled_anew_in_every_epoch(store):
    part = shuffled_part(open_store(store), 10)
    first, second = (part.records(np.arange(10), epoch=epoch).tolist() for epoch in (0, 1))
    assert len(set(first)) == 10
    assert max(first) >= 10
    assert sorted(first) == sorted(second)
    assert first != second


def test_handover_gives_whole_batches_and_does_not_count_the_warm_up(store):
    seen = []
    result = measure_handover(store, settings=settings(seconds=0.01), progress=seen.append)
    assert [one.number for one in seen] == [0, 1, 2]
    assert result.rounds == seen[1:]
    for one in seen:
        assert one.num_records > 0
        assert one.num_records % 4 == 0
        assert one.records_per_s == one.num_records / one.elapsed_s
        assert one.records_per_cpu_s == one.num_records / one.cpu_s


def test_handover_runs_on_one_core_and_gives_the_others_back(store):
    cores = os.sched_getaffinity(0)
    seen = []
    measure_handover(
        store, settings=settings(rounds=1, seconds=0.01), progress=lambda _: seen.append(os.sched_getaffinity(0))
    )
    assert seen == [{max(cores)}] * 2
    assert os.sched_getaffinity(0) == cores


def test_cores_and_threads_are_given_back_after_an_error(store):
    cores, threads = os.sched_getaffinity(0), threading.active_count()

    def fail(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_handover(store, settings=settings(seconds=0.01), progress=fail)
    assert os.sched_getaffinity(0) == cores
    assert threading.active_count() == threads


@pytest.mark.parametrize("transform", [TrainTransform(), TrainTransform(hue=0.1, erase=0.5)], ids=["plain", "all"])
def test_handover_graph_takes_in_every_field_and_decodes_nothing(transform):
    fields = fields_of(transform)
    feed = [[np.zeros(7 + place, np.uint8) for place in range(3)], np.arange(3)]
    feed += [np.zeros((3, 2)[: 1 + field.ndim], field.dtype) for field in fields[2:]]
    pipeline = define_handover(lambda info: tuple(feed), transform=transform, batch_size=3)
    pipeline.build()
    labels, lengths, *shapes = pipeline.run()
    assert labels.as_array().tolist() == [0, 1, 2]
    assert lengths.as_array().tolist() == [[7], [8], [9]]
    assert len(shapes) == len(fields) - 2


def test_records_and_batch_size_are_cut_down_to_the_store(store):
    result = measure_handover(store, settings=settings(rounds=1, seconds=0.01, records=500, batch_size=400))
    assert (result.settings.records, result.settings.batch_size) == (NUM_RECORDS, NUM_RECORDS)
    assert result.num_records == NUM_RECORDS


@pytest.mark.parametrize("command", [cold.main, handover.main])
@pytest.mark.parametrize("option", ["--batch-size", "--rounds", "--records", "--seconds"])
def test_options_out_of_range_are_wrong_usage(command, option, store):
    result = run(command, store, option, 0)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.stderr


@pytest.mark.parametrize("measure", [compare_cold, measure_handover])
def test_missing_store_is_an_error(measure, tmp_path):
    with pytest.raises(StoreNotFoundError):
        measure(tmp_path / "none.lmdb", settings=QUICK)


def run(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_cold_command_prints_a_table(store):
    result = run(cold.main, store, "--rounds", 1, "--records", 20, "--batch-size", 4)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1] == "cold, 20 records in random order, batches of 4, 1 rounds of at most 5 s"
    assert [line.split()[0] for line in lines[5:8]] == list(COLD_WAYS)
    assert lines[6].split()[7:10] == ["1.00", "1.00", "1.00"]
    assert result.stderr.startswith("round 1: get ")


def test_handover_command_prints_a_table(store):
    result = run(handover.main, store, "--rounds", 1, "--seconds", 0.01)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1] == "handover, 30 records in random order, batches of 30, one core, 1 rounds of 0.01 s"
    assert [line.split()[0] for line in lines[5:7]] == ["elapsed", "cpu"]
    assert result.stderr.startswith("warm-up: ")


def test_peers_command_compares_each_row_with_its_peer(folder, store):
    quick = ("--rounds", 1, "--batches", 2, "--batch-size", 4, "--threads", 1)
    rows = ("--only", "train/plain", "--only", "train/torch", "--only", "train/dali")
    result = run(peers.main, folder, store, *quick, *rows, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["rows"]
    assert list(found) == ["train/dali", "train/torch", "train/plain"]
    assert found["train/dali"]["ratio_to_peer"] is None  # its peer was not measured
    speed = {row: windows["images_per_s"]["median"] for row, windows in found.items()}
    assert found["train/torch"]["ratio_to_peer"]["rounds"] == [speed["train/torch"] / speed["train/plain"]]
    assert min(windows[name]["median"] for windows in found.values() for name in ("cpu_ms", "start_s")) > 0


def test_peers_command_wants_the_folder_that_the_store_was_made_from(folder, store):
    (folder / "class0" / "more.jpg").write_bytes(b"")
    try:
        result = run(peers.main, folder, store, "--batch-size", 4)
    finally:
        (folder / "class0" / "more.jpg").unlink()
    assert (result.exit_code, result.stdout) == (1, "")
    assert "31 images, the store has 30" in result.stderr


def test_commands_print_one_json_object(store):
    read = json.loads(run(cold.main, store, "--rounds", 1, "--json").stdout)
    assert list(read["ways"]) == list(COLD_WAYS)
    assert read["settings"] == {"batch_size": 30, "rounds": 1, "seconds": 5.0, "records": 30}
    assert read["ways"]["pread"]["ratio_to_pread"]["median"] == 1
    handed_over = json.loads(run(handover.main, store, "--rounds", 1, "--seconds", 0.01, "--json").stdout)
    speed = handed_over["records_per_s"]
    assert speed["min"] == speed["median"] == speed["max"] == speed["rounds"][0] > 0


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        (cold.main, "--images", "DIR"),
        (cold.main, "--workers", 1),
        (handover.main, "--size", 224),
        (handover.main, "--device", "cpu"),
        (compare_command, "--records", 10),
    ],
)
def test_option_that_means_nothing_to_the_measurement_is_wrong_usage(store, command, option, value):
    result = run(command, store, option, value)
    assert result.exit_code == 2
    assert "No such option" in result.stderr
    assert option in result.stderr


@pytest.mark.parametrize("command", [cold.main, handover.main])
def test_command_says_in_one_line_what_is_wrong(command, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    result = run(command, tmp_path / "pipe")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    assert "a pipe, expected a file" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_interpreters_time_is_measured(store):
    found = interpreter.interpreter_us(store, TrainTransform(size=8), epochs=3, threads=1)
    assert 0 < found < 100_000
