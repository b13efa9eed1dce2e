"""Training runs that are interrupted and resumed, and the files that they keep; see ``interrupt_training.py``."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import interrupt_training
import pytest
import torch
import torchvision

from dali_lmdb.train import checkpoint
from dali_lmdb.train.interruption import EXIT_CODE, SAME_SIGNAL_S

ROOT = Path(__file__).resolve().parents[1]
TINY = "--arch squeezenet1_1 --size 32 --batch-size 4 --workers 1 --device cpu --lr 0.001"


def test_a_run_interrupted_in_every_way_ends_as_one_that_was_not(tmp_path):
    interrupt_training.check(tmp_path, count=4, seed=1, options=interrupt_training.RECIPE.split())


def test_a_run_that_changes_its_number_of_ranks_trains_on_each_record_once_an_epoch(tmp_path):
    said = []
    interrupt_training.check(tmp_path, count=2, seed=1, elastic=True, say=said.append)
    assert ["2 rank(s)" in line for line in said[:2]] == [False, True]


@contextlib.contextmanager
def endless(store, *options, log_every=1, **environment):
    """A run without an end, in a process group of its own; killed on leaving."""
    interrupt_training.heed_ctrl_c()
    command = [sys.executable, "-m", "dali_lmdb.train", "--train", store, "--val", store, *TINY.split()]
    command += ["--epochs", "100000", "--log-every", str(log_every), *options]
    with subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process, text):
    """Read the lines up to one with this text."""
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the process ended without {text!r}: {process.stderr.read()}")


def all_of(pid):
    """A process and its descendants."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                found += all_of(int(child))
    return found


@pytest.mark.parametrize(
    ("backend", "world_size", "number", "whom"),
    [
        ("torch", 1, signal.SIGTERM, "timeout"),
        ("dali", 1, signal.SIGINT, "terminal"),
        ("torch", 2, signal.SIGINT, "terminal"),
        ("torch", 2, signal.SIGUSR1, "SLURM"),
    ],
)
def test_a_signal_to_all_processes_of_a_run_ends_it_as_one_to_the_command(
    store_path, tmp_path, backend, world_size, number, whom
):
    options = ("--backend", backend, "--world-size", world_size, "--output", tmp_path / "run")
    with endless(store_path, *options) as process:
        read_until(process, "step 2 ")
        if whom == "SLURM":
            for pid in all_of(process.pid):
                os.kill(pid, number)
        else:
            if whom == "timeout":  # coreutils'
                process.send_signal(number)
            os.killpg(process.pid, number)
        out, errors = process.communicate(timeout=120)
    code, said = (130, "Stopped.\n") if number == signal.SIGINT else (EXIT_CODE, "")
    assert (process.returncode, errors) == (code, said)
    assert f"interrupted by {number.name} in epoch " in out
    assert sorted(file.name for file in (tmp_path / "run").glob("*.pt*"))[-1] == "last.pt"


def signal_until_it_ends(process, number):
    for timeout in (1.5 * SAME_SIGNAL_S, 20, 20):  # the third one only where the first was received late
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=timeout)
    return None


def test_a_second_signal_ends_a_run_that_cannot_finish_its_step(store_path, tmp_path):
    with endless(store_path, "--world-size", 2, "--output", tmp_path / "run") as process:
        read_until(process, "epoch 1  step 1 ")
        ranks = interrupt_training.ranks_of(process)
        os.kill(max(ranks), signal.SIGSTOP)
        assert signal_until_it_ends(process, signal.SIGINT) == 130
        assert "interrupted by" not in process.stdout.read()
        assert process.stderr.read() == "Stopped.\n"
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] >= 1


HANGING = """
import ctypes, datetime
from dali_lmdb.train.interruption import Interruption

with Interruption() as interruption:
    interruption.begin(world_size=1, timeout=datetime.timedelta(minutes=1))
    mutex = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    print("locked", flush=True)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_second_signal_ends_a_process_that_hangs_outside_python():
    with subprocess.Popen(
        [sys.executable, "-c", HANGING],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        read_until(process, "locked")
        try:
            assert signal_until_it_ends(process, signal.SIGTERM) == 128 + signal.SIGTERM
        finally:
            process.kill()
        assert process.stderr.read() == ""


def test_a_signal_in_an_evaluation_ends_it_within_a_few_steps_and_a_resumed_run_evaluates_again(
    store_path, tmp_path
):
    planted = {
        "PYTHONPATH": f"{ROOT / 'tests' / 'planted_crash'}:{ROOT}",
        "PLANTED_RECORDS": str(tmp_path / "records"),
        "PLANTED_START": "1",
        "PLANTED_SIGTERM": "1",
    }
    options = ("--world-size", 2, "--batch-size", 1, "--output", tmp_path / "run", "--log-json", tmp_path / "log")
    with endless(store_path, *options, log_every=100, **planted) as process:
        out, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (EXIT_CODE, "")
    assert "interrupted by SIGTERM in epoch 0, after step 12: saved in" in out
    batches = interrupt_training.read_lines(tmp_path / "records")
    assert max(batch["end"] for batch in batches if not batch["training"]) <= 2 * 5
    with endless(store_path, *options, "--resume", log_every=100) as process:
        read_until(process, "epoch 0  validation: top-1")
    lines = interrupt_training.read_lines(tmp_path / "log")
    assert [line.get("step") for line in lines if line.get("epoch") == 0] == [12, None]
    assert [line["val_records"] for line in lines if "val_records" in line][:1] == [24]


def train(store, *options, folder, shell=""):
    command = [sys.executable, "-m", "dali_lmdb.train", "--train", store, "--val", store, *TINY.split(), *options]
    done = subprocess.run(
        ["bash", "-c", f'{shell} exec "$@"', "-", *map(str, command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def test_a_run_keeps_its_last_and_best_checkpoints_and_says_its_results_when_it_is_over(store_path, tmp_path):
    options = ("--epochs", "3", "--output", "run", "--keep", "2", "--log-json", "log")
    assert train(store_path, *options, folder=tmp_path)[0] == 0
    names = sorted(file.name for file in (tmp_path / "run").glob("*.pt*"))
    assert names == ["best.pt", "epoch-0001.pt", "epoch-0002.pt", "last.pt"]
    last = checkpoint.load(tmp_path / "run" / "last.pt")
    best = checkpoint.load(tmp_path / "run" / "best.pt")
    assert last["best"] == best["result"]
    model = torchvision.models.squeezenet1_1(num_classes=3)
    model.load_state_dict(torch.load(tmp_path / "run" / "best.pt")["model"])

    # Without --resume neither the log nor the folder is used again.
    code, _, (line,) = train(store_path, *options[:-2], folder=tmp_path)
    assert (code, "last.pt exists; resume that run with --resume" in line) == (1, True)
    code, _, (line,) = train(store_path, "--log-json", "log", folder=tmp_path)
    assert (code, "--log-json log: exists; choose another file" in line) == (1, True)
    # Nor is the log of another run continued.
    code, _, (line,) = train(store_path, "--log-json", "log", "--output", "b", "--resume", folder=tmp_path)
    assert (code, "log: the log of the run in" in line) == (1, True)

    before = (tmp_path / "log").read_text()
    code, lines, errors = train(store_path, *options, "--resume", folder=tmp_path)
    assert (code, errors, (tmp_path / "log").read_text()) == (0, [], before)
    assert lines[0].startswith("training is complete, in run/last.pt; epoch 2  validation: top-1 ")
    assert lines[1].startswith(f"best: epoch {best['result']['epoch']}  validation: top-1 ")
    assert len(lines) == 2


def test_a_full_disk_does_not_end_a_run_before_its_last_checkpoint(store_path, tmp_path):
    assert train(store_path, "--epochs", "1", "--output", "run", folder=tmp_path)[0] == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    options = ("--epochs", "3", "--output", "run", "--resume")
    code, lines, errors = train(store_path, *options, folder=tmp_path, shell="ulimit -f 1000;")
    (warned,) = [line for line in lines if "cannot be written" in line]
    assert warned.startswith("run/last.pt: cannot be written: File too large; ")
    assert warned.endswith("; meanwhile training goes on")
    assert any(line.startswith("epoch 2  validation") for line in lines)
    assert (code, len(errors)) == (1, 1)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
