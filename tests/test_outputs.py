"""Files that cannot be written: one line with the cause, nothing half-made, and what was there before is kept."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from damage import DAMAGE, grey_image, write_store
from image_sets import make_image_folder

from dali_lmdb import EvalTransform, TorchLoader
from dali_lmdb.convert import convert
from dali_lmdb.convert._job import Job
from dali_lmdb.errors import ConversionError, StateError
from dali_lmdb.train import checkpoint
from dali_lmdb.train.metrics import JsonLog

ROOT = Path(__file__).resolve().parents[1]
NO_SPACE = "No space left on device"


@contextmanager
def largest_file(num_bytes):
    """Let this process write no file larger than this: the kernel says EFBIG, and takes what fits before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def train(store, *options, folder, shell=""):
    """Run the command in ``folder``, after what the shell is told."""
    command = [sys.executable, "-m", "dali_lmdb.train", "--train", store, "--val", store, "--device", "cpu"]
    command += ["--arch", "squeezenet1_1", "--size", "32", "--batch-size", "4", "--workers", "1", "--epochs", "1"]
    return subprocess.run(
        ["bash", "-c", f'{shell} exec "$@"', "-", *map(str, command), *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})
    with (
        largest_file(100_000),
        pytest.raises(StateError, match=r"last\.pt: cannot be written: File too large;.* --resume .*kept$"),
    ):
        checkpoint.save(path, {"epoch": 2, "model": torch.zeros(100_000)})
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert checkpoint.load(path)["epoch"] == 1


@pytest.mark.parametrize(("world_size", "who"), [("1", ""), ("2", "rank 0: ")])
def test_a_run_whose_checkpoint_cannot_be_written_ends_with_one_line(store_path, tmp_path, world_size, who):
    options = ("--output", "run", "--world-size", world_size)
    done = train(store_path, *options, folder=tmp_path, shell="ulimit -f 1000;")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {who}run/last.pt: cannot be written: File too large; ")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(("world_size", "who"), [("1", ""), ("2", "rank 0: ")])
def test_a_run_whose_log_cannot_be_written_ends_with_one_line(store_path, tmp_path, world_size, who):
    done = train(store_path, "--log-json", "/dev/full", "--world-size", world_size, folder=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    says = "make room on its disk, or choose another --log-json"
    assert line == f"Error: {who}/dev/full: cannot be written: {NO_SPACE}; {says}"


def test_a_run_whose_progress_cannot_be_printed_goes_on(store_path, tmp_path):
    done = train(store_path, "--log-json", "log", "--log-every", "1", folder=tmp_path, shell="exec > /dev/full;")
    says = f"standard output: cannot be written: {NO_SPACE}; training continues"
    first, *warnings = done.stderr.splitlines()
    assert (done.returncode, first) == (0, says)
    assert all("waiting for data" in line for line in warnings)  # of a busy machine; Python prints them to stderr
    assert len((tmp_path / "log").read_text().splitlines()) == 1 + 6 + 1  # settings, steps, evaluation


def test_a_log_without_room_holds_whole_lines(tmp_path):
    path = tmp_path / "log"
    with largest_file(150), JsonLog(path, append=False) as log:
        log.write(epoch=0, step=1, loss=0.25)
        log.write(epoch=0, step=2, loss=0.25)
        with pytest.raises(StateError, match="log: cannot be written: File too large"):
            log.write(epoch=0, step=3, loss=0.25)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert path.read_text().endswith("}\n")


def test_a_log_whose_reader_is_gone_is_our_error(tmp_path):
    path = tmp_path / "log"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with JsonLog(path, append=False) as log:
        log.write(epoch=0)
        os.close(reader)
        with pytest.raises(StateError, match="log: cannot be written: Broken pipe"):
            log.write(epoch=1)


@pytest.mark.parametrize("name", ["x" * 300, "no/folder/log"])
def test_a_log_that_cannot_be_made_is_our_error(tmp_path, name):
    with pytest.raises(StateError, match=r"cannot be written: (File name too long|No such file or directory)"):
        JsonLog(tmp_path / name, append=False)


def test_a_quarantine_file_without_room_holds_whole_lines(tmp_path, caplog):
    store = write_store(tmp_path / "x.lmdb", [grey_image(0), *[DAMAGE["scan cut off"]] * 3])
    arguments = {"transform": EvalTransform(size=8, resize=8), "batch_size": 4, "num_workers": 0}
    quarantine = tmp_path / "bad.jsonl"
    with TorchLoader(store, on_bad="substitute", quarantine=quarantine, **arguments) as loader:
        with largest_file(500):
            list(loader)
        assert len(loader.bad_records) == 3
    listed = [json.loads(line)["index"] for line in quarantine.read_text().splitlines()]
    assert listed == [1, 2, 3][: len(listed)]
    assert 0 < len(listed) < 3
    assert caplog.text.count("bad.jsonl: cannot be written: File too large; not listed: ") == 3 - len(listed)


def test_a_report_of_bad_images_that_cannot_be_written_is_not_left_half_made(tmp_path, monkeypatch):
    images = make_image_folder(tmp_path / "images")
    (images / "ant" / "000.jpg").write_text("no image")
    write = Job._write_report

    def without_room(job):
        with largest_file(9):
            write(job)

    monkeypatch.setattr(Job, "_write_report", without_room)
    with pytest.raises(ConversionError, match=r"x\.lmdb\.bad\.tsv: cannot be written: File too large"):
        convert(images, tmp_path / "x.lmdb")
    assert not (tmp_path / "x.lmdb.bad.tsv").exists()
