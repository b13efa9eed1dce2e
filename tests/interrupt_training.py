"""Interrupt a training run at random moments, resume it, and compare it with a run that was not interrupted.

``python interrupt_training.py FOLDER [--count 20] [--seed 0] [--elastic] [-- OPTION ...]`` prints what it did to
the run. The final weights must be equal bit for bit, the log must have each step and each evaluation once, in
order, and every epoch each record once; so too where torchrun restarts the ranks after one was killed. With
``--elastic`` each start has 1 or 2 ranks, which changes the weights.
Options after ``--`` are added to the training command.
"""

import argparse
import contextlib
import itertools
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
NUM_IMAGES, EPOCHS, BATCH_SIZE = 24, 15, 4
# A model with BatchNorm and dropout.
TINY = f"--arch mobilenet_v3_small --size 32 --batch-size {BATCH_SIZE} --workers 1 --device cpu --lr 0.001"
RECIPE = (
    "--model-ema-decay 0.9 --mixup-alpha 0.2 --cutmix-alpha 1 --accumulate 2 --label-smoothing 0.1 "
    "--clip-grad-norm 1"
)
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
    """A store of which each record has a label of its own."""
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        path = folder / "images" / f"{number:02}" / "image.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    convert(folder / "images", folder / "store.lmdb")
    return folder / "store.lmdb"


class Runs:
    """Runs of the same command, each into a folder of its own."""

    def __init__(self, folder, options):
        self.folder, store = folder, make_store(folder)
        self.num_starts = 0
        self.command = ["-m", "dali_lmdb.train", "--train", store, "--val", store]
        self.command += TINY.split()
        self.command += f"--epochs {EPOCHS} --log-every 1 --checkpoint-every 2 --resume".split()
        self.command += options

    def start(self, name, *, world_size=2, by=()):
        files = ("--output", self.folder / name, "--log-json", self.folder / f"{name}.jsonl")
        self.num_starts += 1
        planted = {"PLANTED_RECORDS": str(self.folder / f"{name}.records"), "PLANTED_START": str(self.num_starts)}
        return subprocess.Popen(
            [sys.executable, *by, *map(str, self.command), "--world-size", str(world_size), *files],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'tests' / 'planted_crash'}:{ROOT}"}
            | planted,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def outcome(self, name):
        """(weights and averaged weights, log without times) of a run."""
        lines = read_lines(self.folder / f"{name}.jsonl")
        lines = [
            {
                key: value
                for key, value in line.items()
                if key in ("epoch", "step", "lr") or "loss" in key or "top" in key
            }
            for line in lines
            if "epoch" in line
        ]
        last = checkpoint.load(self.folder / name / "last.pt")
        averaged = {f"averaged {key}": value for key, value in (last["ema"] or {}).items()}
        return last["model"] | averaged, lines

    def check_complete(self, name):
        """Whether the log has each step and evaluation once, in order, and every epoch each record once."""
        places = [(line["epoch"], line.get("step")) for line in self.outcome(name)[1]]
        in_order = []
        for epoch in range(EPOCHS):
            num_steps = sum(place[0] == epoch for place in places) - 1
            in_order += [(epoch, step) for step in (*range(1, num_steps + 1), None)]
        assert places == in_order, places
        for epoch, batches in kept_batches(self.folder / f"{name}.records").items():
            labels = [label for batch in batches for label in batch["labels"]]
            assert len(set(labels)) == len(labels), (epoch, batches)
            # The last step of an epoch needs as many records as the others.
            assert 0 <= NUM_IMAGES - len(labels) < batches[-1]["num_records"], (epoch, batches)


def heed_ctrl_c():
    """Let SIGINT reach processes started from here, also where a shell runs this in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def kept_batches(path):
    """The batches that a run trained on by epoch, without those that a later start trained on again."""
    kept, epochs = [], {epoch: [] for epoch in range(EPOCHS)}
    lines = [line for line in read_lines(path) if line["training"]]
    for _, group in itertools.groupby(lines, key=lambda line: line["start"]):
        batches = list(group)
        begin = min((batch["epoch"], batch["end"] - batch["num_records"]) for batch in batches)
        kept = [batch for batch in kept if (batch["epoch"], batch["end"]) <= begin] + batches
    for batch in kept:
        epochs[batch["epoch"]].append(batch)
    return epochs


def ranks_of(process):
    ranks = []
    for children in Path(f"/proc/{process.pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                    ranks.append(int(pid))
    return ranks


def read_lines_of(process, count):
    """Read this many lines of progress; returns whether there were so many before the end."""
    for line in process.stdout:
        count -= line.startswith("epoch")
        if not count:
            return True
    return False


def interrupt(runs, name, kind, rng, *, world_size):
    """Start the run, send a signal once it has written some lines; returns whether it came before the end."""
    number, whom, codes = kind
    if number == signal.SIGKILL and world_size == 1:
        codes = {-number}
    with runs.start(name, world_size=world_size) as process:
        if not read_lines_of(process, rng.randint(1, 8)):
            errors = process.stderr.read()
            assert process.wait(timeout=60) == 0, errors
            return False
        os.kill(process.pid if whom == "launcher" else rng.choice(ranks_of(process) or [process.pid]), number)
        rest, errors = process.communicate(timeout=120)
    assert process.returncode in codes | {0}, (number, whom, process.returncode, errors)
    if process.returncode in (EXIT_CODE, 130):
        assert "interrupted by " in rest, rest
    return process.returncode != 0


TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1"


def kill_a_rank_of_torchrun(runs, name, rng):
    with runs.start(name, by=TORCHRUN.split()) as process:
        assert read_lines_of(process, rng.randint(6, 12)), process.stderr.read()
        os.kill(rng.choice(ranks_of(process)), signal.SIGKILL)
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def check(folder, *, count, seed, options=(), elastic=False, say=print):
    heed_ctrl_c()
    rng, runs = random.Random(seed), Runs(folder, list(options))

    def world_size():
        return rng.choice([1, 2]) if elastic else 2

    def finish(name):
        with runs.start(name, world_size=world_size()) as process:
            _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        runs.check_complete(name)
        return runs.outcome(name)

    weights, log = (None, None) if elastic else finish("whole")
    done = number = 0
    while done < count:
        name = f"run{number}"
        while done < count:
            kind, ranks = KINDS[done % len(KINDS)], world_size()
            if not interrupt(runs, name, kind, rng, world_size=ranks):
                break
            say(f"{name}: {kind[0].name} to {kind[1]} of {ranks} rank(s)")
            done += 1
        resumed, resumed_log = finish(name)
        if not elastic:
            assert resumed_log == log
            assert resumed.keys() == weights.keys()
            for key, value in weights.items():
                assert torch.equal(resumed[key], value), key
        number += 1
    if not elastic:
        kill_a_rank_of_torchrun(runs, "restarted", rng)
        runs.check_complete("restarted")
        restarted, restarted_log = runs.outcome("restarted")
        assert restarted_log == log
        assert all(torch.equal(restarted[key], value) for key, value in weights.items())
    says = "every record and step once" if elastic else "equal weights, equal logs, every record once"
    say(f"{done} interruptions of {number} runs: {says}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_intermixed_args()
    arguments.folder.mkdir(exist_ok=True)
    check(
        arguments.folder,
        count=arguments.count,
        seed=arguments.seed,
        options=arguments.options,
        elastic=arguments.elastic,
    )


if __name__ == "__main__":
    main()
