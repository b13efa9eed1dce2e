"""Records that kill the process that decodes them, in training: found by the next start, and not decoded again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damage import DAMAGE, noise_image, store_with, write_store
from image_sets import size_of

from dali_lmdb.errors import StateError
from dali_lmdb.loaders import probe
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.in_flight import InFlightFile, read_left_over
from dali_lmdb.plan.augment import EvalTransform
from dali_lmdb.plan.batches import BatchPlan
from dali_lmdb.torchrun import RankEnvironment
from dali_lmdb.train.crashes import FILE_NAME, refuse_crashing

ROOT = Path(__file__).resolve().parents[1]
NUM_RECORDS, CRASHING = 24, 5
TINY = ("--arch", "resnet18", "--size", "32", "--batch-size", "4", "--workers", "1", "--device", "cpu")
EVAL = EvalTransform(size=16, resize=18)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A good store, whose record ``CRASHING`` crashes DALI where that is planted."""
    return store_with(tmp_path_factory.mktemp("store") / "x.lmdb", (), num_records=NUM_RECORDS)


@pytest.fixture
def train(path, tmp_path):
    """Runs the trainer with the planted crash, in ``tmp_path / "run"``."""

    def run(*options, by=("-m", "dali_lmdb.train"), expect=0):
        done = subprocess.run(
            [sys.executable, *by, "--train", path, "--val", path, *TINY, "--output", tmp_path / "run", *options],
            env=os.environ
            | {"PYTHONPATH": f"{ROOT / 'tests' / 'planted_crash'}:{ROOT}", "PLANTED_CRASH": str(CRASHING)}
            | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == expect, done.stdout + done.stderr
        return done

    return run


def files(folder):
    """Names of what is in a folder, but for the curves, which need matplotlib."""
    return sorted(file.name for file in folder.iterdir() if file.name != "curves.png")


def test_a_crash_of_one_of_two_ranks_names_what_it_decoded_and_is_survived_by_any_number_of_ranks(
    train, tmp_path, path
):
    output, quarantine = tmp_path / "run", tmp_path / "bad.jsonl"
    done = train("--epochs", "1", "--world-size", "2", expect=1)
    line = next(line for line in done.stderr.splitlines() if line.startswith("Error: "))
    assert " was killed by SIGSEGV while it decoded " in line
    assert f"records of {path}: " in line
    assert "c0" in line, "names are given"
    assert line.endswith(
        "; continue with --resume --on-bad substitute, which finds those that crash the decoder and uses others "
        "in their place"
    )
    dead = line.partition("rank ")[2][0]
    assert CRASHING in read_left_over(output / f"in-flight-train-{dead}").records

    substitute = ("--resume", "--on-bad", "substitute", "--quarantine", quarantine)
    done = train("--epochs", "1", *substitute)
    assert f"{path}: record 5 (c05/005.jpg) crashes the decoder; it is not decoded again: " in done.stdout
    assert files(output) == ["best.pt", FILE_NAME, "last.pt"]
    assert {json.loads(line)["index"] for line in quarantine.read_text().splitlines()} == {CRASHING}

    done = train("--epochs", "2", "--world-size", "2", *substitute)
    assert "the last run ended" not in done.stdout, "remembered, not looked for again"
    assert files(output) == ["best.pt", FILE_NAME, "last.pt"]


def test_a_run_that_stops_at_bad_records_names_the_one_that_crashed_it(train, path):
    train("--epochs", "1", expect=-signal.SIGSEGV)
    done = train("--epochs", "1", "--resume", expect=1)
    assert f"{path}: record 5 (c05/005.jpg): not a decodable image: " in done.stderr
    assert "DALI: the decoder crashed: SIGSEGV" in done.stderr


def test_torchruns_restart_goes_on_without_the_record(train, tmp_path):
    by = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m")
    train("--epochs", "1", "--resume", "--on-bad", "substitute", by=(*by, "dali_lmdb.train"))
    assert files(tmp_path / "run") == ["best.pt", FILE_NAME, "last.pt"]


# --- without a planted crash


def loader_of(path, **arguments):
    return DaliLoader(path, **{"transform": EVAL, "batch_size": 4, "device": "cpu", "num_threads": 1} | arguments)


def plan_of(*records, epoch=0):
    return BatchPlan(epoch=epoch, start=0, end=0, records=np.array(records, np.int64))


def test_what_is_being_decoded_is_in_the_file_until_the_loader_is_closed(path, tmp_path):
    file = tmp_path / "in-flight"
    with loader_of(path, in_flight_file=file, prefetch_queue_depth=2) as loader:
        assert not file.exists(), "it may tell of an earlier process"
        batches = iter(loader)
        next(batches)
        left_over = read_left_over(file)
        assert left_over.fingerprint == loader.store.fingerprint
        given = [records for epoch, records in left_over.batches if epoch == 0]
        assert [4, 5, 6, 7] in given
        assert [0, 1, 2, 3] not in given, "it is decoded"
    assert not file.exists()


def test_the_file_names_every_batch_at_any_instant_while_they_change(tmp_path):
    file = InFlightFile(tmp_path / "x", fingerprint="f", batch_size=3, num_batches=2)
    first, second, third = plan_of(1, 2, 3), plan_of(4, 5), plan_of(6, 7, 8, epoch=1)
    file.set_given([first])
    file.set_given([first, second])
    assert read_left_over(tmp_path / "x").batches == [(0, [1, 2, 3]), (0, [4, 5])]
    file.set_given([second])
    assert read_left_over(tmp_path / "x").batches == [(0, [4, 5])]
    file.set_given([second, third])
    assert read_left_over(tmp_path / "x").batches == [(0, [4, 5]), (1, [6, 7, 8])]
    seen = []
    file.noting(lambda plan: seen.append(read_left_over(tmp_path / "x").records))(plan_of(0))
    assert seen == [[0, 4, 5, 6, 7, 8]]
    file.set_given([])
    assert read_left_over(tmp_path / "x").records == []
    file.remove()
    file.set_given([first])
    assert files(tmp_path) == []


def test_a_file_that_cannot_be_made_is_a_warning(path, tmp_path, caplog):
    file = tmp_path / "no folder" / "in-flight"
    with loader_of(path, in_flight_file=file) as loader:
        assert len(list(loader)) == 6
    assert [record.message for record in caplog.records] == [
        f"{file}: cannot be written: No such file or directory; check that it still exists; training continues, "
        "but a record that kills the process will not be known"
    ]


def test_a_link_in_the_files_place_is_replaced_not_followed(path, tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "in-flight").symlink_to(tmp_path / "precious")
    assert read_left_over(tmp_path / "in-flight") is None
    with loader_of(path, in_flight_file=tmp_path / "in-flight") as loader:
        next(iter(loader))
        assert read_left_over(tmp_path / "in-flight").records
    assert (tmp_path / "precious").read_text() == "kept"


def test_whatever_is_in_a_left_over_file_it_is_read_or_refused(tmp_path):
    file = InFlightFile(tmp_path / "x", fingerprint="f" * 39, batch_size=3, num_batches=2)
    file.set_given([plan_of(1, 2, 3), plan_of(4, 5)])
    whole = (tmp_path / "x").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            data[random.integers(len(data))] ^= 1 << random.integers(8)
        cut = random.integers(len(data)) if random.random() < 0.3 else len(data)
        (tmp_path / "y").write_bytes(data[:cut])
        read = read_left_over(tmp_path / "y")
        assert read is None or len(read.records) <= 3 * 3
    os.mkfifo(tmp_path / "pipe")
    assert read_left_over(tmp_path / "pipe") is None
    assert read_left_over(tmp_path / "nothing") is None


def refuse(loader, output):
    refuse_crashing({"train": loader}, output=output, ranks=RankEnvironment())


def test_good_records_that_were_being_decoded_when_a_run_was_killed_stay(path, tmp_path):
    with loader_of(path) as loader:
        for name, records in (("in-flight-train-0", (3, 7)), ("in-flight-train-9", (1, 99))):
            file = InFlightFile(tmp_path / name, fingerprint=loader.store.fingerprint, batch_size=4, num_batches=1)
            file.set_given([plan_of(*records)])
        refuse(loader, tmp_path)
        assert files(tmp_path) == []
        assert len(list(loader)) == 6
        assert loader.bad_records == []


@pytest.mark.parametrize("line", [b"{}", b"[", b"[" * 100_000, b"\xff", b'{"index": "5"}'], ids=range(5))
def test_a_damaged_list_of_crashing_records_is_told_in_one_line(path, tmp_path, line):
    (tmp_path / FILE_NAME).write_bytes(line + b"\n")
    with (
        loader_of(path) as loader,
        pytest.raises(StateError, match=r"line 1 is not an object with fingerprint, in"),
    ):
        refuse(loader, tmp_path)


@pytest.mark.parametrize(("num_records", "blamed"), [(31, []), (32, [9])])
def test_of_a_batch_that_crashes_as_a_whole_the_records_that_fail_are_to_blame(
    tmp_path, monkeypatch, num_records, blamed
):
    """As DALI 2.4 does, though not in every run, on 32 records or more with a window outside of the image."""
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    monkeypatch.setattr(probe, "_HANDLER", "planted_probes:crashing_together")
    values = [noise_image(record % 24) for record in range(num_records)]
    values[9] = DAMAGE["header cut off"][:50]
    path = write_store(tmp_path / "x.lmdb", values, sizes=[size_of(record % 24) for record in range(num_records)])
    with loader_of(path, batch_size=num_records) as loader:
        found = loader.find_crashing([(0, list(range(num_records)))])
    assert list(found) == blamed
