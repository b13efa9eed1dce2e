"""Interrupt a training run at random moments, resume it, and compare it with a run that was not interrupted.

``python interrupt_training.py FOLDER [--count 20] [--seed 0] [-- OPTION ...]`` prints what it did to the run. The
final weights must be equal bit for bit, and the log must have each step and each evaluation once, in order.
Options after ``--`` are added to the training command.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dali_lmdb.convert import convert
from dali_lmdb.train import checkpoint
from dali_lmdb.train.interruption import EXIT_CODE

ROOT = Path(__file__).resolve().parents[1]
NUM_IMAGES, EPOCHS = 24, 15
TINY = "--arch squeezenet1_1 --size 32 --batch-size 4 --workers 1 --device cpu --lr 0.001 --world-size 2"
KINDS = (
    # (signal, to whom, exit codes of the command; a signal that comes while a rank starts may kill it)
    (signal.SIGTERM, "launcher", {EXIT_CODE}),
    (signal.SIGUSR1, "rank", {EXIT_CODE}),
    (signal.SIGKILL, "rank", {1}),
    (signal.SIGKILL, "launcher", {-signal.SIGKILL}),
    (signal.SIGUSR1, "launcher", {EXIT_CODE}),
    (signal.SIGTERM, "rank", {EXIT_CODE}),
    (signal.SIGINT, "launcher", {130}),
)


def make_store(folder):
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = folder / "images" / str(number % 3) / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    convert(folder / "images", folder / "store.lmdb")
    return folder / "store.lmdb"


class Runs:
    """Runs of the same command, each into a folder of its own."""

    def __init__(self, folder, options):
        self.folder, store = folder, make_store(folder)
        self.command = [sys.executable, "-m", "dali_lmdb.train", "--train", store, "--val", store]
        self.command += TINY.split()
        self.command += f"--epochs {EPOCHS} --log-every 1 --checkpoint-every 2 --resume".split()
        self.command += options

    def start(self, name):
        return subprocess.Popen(
            [*map(str, self.command), "--output", self.folder / name, "--log-json", self.folder / f"{name}.jsonl"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def outcome(self, name):
        """(weights, log without times) of a run; the log's epochs and steps must be in order."""
        lines = [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]
        lines = [
            {
                key: value
                for key, value in line.items()
                if key in ("epoch", "step", "lr") or "loss" in key or "top" in key
            }
            for line in lines
            if "epoch" in line
        ]
        return checkpoint.load(self.folder / name / "last.pt")["model"], lines


def ranks_of(process):
    ranks = []
    for children in Path(f"/proc/{process.pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                    ranks.append(int(pid))
    return ranks


def interrupt(runs, name, kind, rng):
    """Start the run, send a signal once it has written some lines; returns whether it came before the end."""
    number, whom, codes = kind
    with runs.start(name) as process:
        lines = rng.randint(1, 8)
        for line in process.stdout:
            lines -= line.startswith("epoch")
            if not lines:
                break
        else:
            errors = process.stderr.read()
            assert process.wait(timeout=60) == 0, errors
            return False
        os.kill(process.pid if whom == "launcher" else rng.choice(ranks_of(process)), number)
        rest, errors = process.communicate(timeout=120)
    assert process.returncode in codes | {0}, (number, whom, process.returncode, errors)
    if process.returncode in (EXIT_CODE, 130):
        assert "interrupted by " in rest, rest
    return process.returncode != 0


def check(folder, *, count, seed, options=(), say=print):
    rng, runs = random.Random(seed), Runs(folder, list(options))
    with runs.start("whole") as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    weights, log = runs.outcome("whole")
    done = number = 0
    while done < count:
        name = f"run{number}"
        while done < count and interrupt(runs, name, KINDS[done % len(KINDS)], rng):
            say(f"{name}: {KINDS[done % len(KINDS)][0].name} to {KINDS[done % len(KINDS)][1]}")
            done += 1
        with runs.start(name) as process:
            _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        resumed, resumed_log = runs.outcome(name)
        assert resumed_log == log
        assert all(torch.equal(resumed[key], value) for key, value in weights.items())
        number += 1
    say(f"{done} interruptions of {number} runs: equal weights, equal logs")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_args()
    check(arguments.folder, count=arguments.count, seed=arguments.seed, options=arguments.options)


if __name__ == "__main__":
    main()
