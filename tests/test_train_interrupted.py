"""Training runs that are interrupted and resumed, and the files that they keep; see ``interrupt_training.py``."""

import os
import subprocess
import sys
from pathlib import Path

import interrupt_training
import torch
import torchvision

from dali_lmdb.train import checkpoint

ROOT = Path(__file__).resolve().parents[1]
TINY = "--arch squeezenet1_1 --size 32 --batch-size 4 --workers 1 --device cpu --lr 0.001"


def test_a_run_interrupted_in_every_way_ends_as_one_that_was_not(tmp_path):
    interrupt_training.check(tmp_path, count=4, seed=1, options=interrupt_training.RECIPE.split())


def test_a_run_that_changes_its_number_of_ranks_trains_on_each_record_once_an_epoch(tmp_path):
    said = []
    interrupt_training.check(tmp_path, count=2, seed=1, elastic=True, say=said.append)
    assert ["2 rank(s)" in line for line in said[:2]] == [False, True]


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
