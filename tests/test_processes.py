"""Several real processes, one of which is killed, and what they trained on and evaluated."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from elastic_ranks import Job
from image_sets import make_image_folder

from dali_lmdb.convert import convert

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "tests" / "elastic_ranks.py")
NUM_VAL = 2  # fewer than ranks


@pytest.fixture(scope="module")
def val_path(tmp_path_factory):
    folder = make_image_folder(tmp_path_factory.mktemp("val") / "images", num_records=NUM_VAL, classes=("a", "b"))
    convert(folder, folder.with_suffix(".lmdb"))
    return folder.with_suffix(".lmdb")


class Run:
    """A job and what its ranks have written about it."""

    def __init__(self, folder, **settings):
        self.folder = Path(folder)
        self.job = self.folder / "job.json"
        self.job.write_text(json.dumps(asdict(Job(folder=str(folder), **settings))))

    def start(self, *, num_ranks, max_restarts, torchrun=False):
        """Run it to its end; its exit code."""
        command = [sys.executable, SCRIPT, str(self.job), str(num_ranks), str(max_restarts)]
        if torchrun:
            options = ["--standalone", "--nproc-per-node", str(num_ranks), "--max-restarts", str(max_restarts)]
            command = [sys.executable, "-m", "torch.distributed.run", *options, SCRIPT, str(self.job)]
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, cwd=self.folder, check=False
        )
        self.output = done.stdout + done.stderr
        return done.returncode

    def lines(self, where):
        """What all ranks have written, oldest first for each rank."""
        lines = []
        for path in sorted(self.folder.glob("rank-*")):
            lines += [json.loads(line) for line in path.read_text().splitlines()]
            path.rename(path.with_name(f"read-{path.name}"))
        self.read = getattr(self, "read", []) + lines
        return [line for line in self.read if line["where"] == where]


def settings(store_path, val_path, **overrides):
    return {
        "train": str(store_path),
        "val": str(val_path),
        "backend": "dali",
        "batch_size": 2,
        "epochs": 2,
        "checkpoint_every": 2,
        "kill": ("train", 1, 3),
    } | overrides


def records(lines, *, epoch, attempt=None):
    return [
        record
        for line in lines
        for record in line["records"]
        if line["epoch"] == epoch and attempt in (None, line["attempt"])
    ]


def starts(run):
    """Where the ranks of each attempt began, as (attempt, epoch, position)."""
    return sorted({(line["attempt"], line["epoch"], line["position"]) for line in run.lines("start")})


def check_training(train, *, resumed_at, order, attempts=(0, 1)):
    """Up to the checkpoint the first attempt counts, after it the second: together each record once an epoch."""
    before, after = (sorted(records(train, epoch=0, attempt=attempt)) for attempt in attempts)
    seen = sorted(order[:resumed_at])
    assert set(seen) <= set(before), "the checkpoint counts records that nobody has trained on"
    assert len(before) > resumed_at, "nothing was lost, so nothing is shown"
    assert sorted(seen + after) == sorted(order)
    assert sorted(records(train, epoch=1)) == sorted(order)


@pytest.fixture(scope="module")
def order():
    """Records of epoch 0 in their order."""
    import numpy as np

    from dali_lmdb.plan.order import epoch_order

    return epoch_order(24, seed=3, epoch=0, shuffle="full")(np.arange(24)).tolist()


def test_torchrun_starts_a_killed_rank_again_and_no_record_is_lost_or_seen_twice(
    store_path, val_path, tmp_path, order
):
    run = Run(tmp_path, **settings(store_path, val_path))
    assert run.start(num_ranks=2, max_restarts=1, torchrun=True) == 0, run.output
    assert starts(run) == [(0, 0, 0), (1, 0, 12)]  # steps 0 to 3 were made, and saved after 0 and 2
    check_training(run.lines("train"), resumed_at=12, order=order)
    for epoch in range(2):
        assert sorted(records(run.lines("val"), epoch=epoch)) == list(range(NUM_VAL))


def test_a_rank_killed_while_it_evaluates_leaves_nothing_out(store_path, val_path, tmp_path, order):
    # Of 24 records, three ranks take 18 in batches of 6 and then 2 each; of 2 to evaluate, rank 0 has none.
    kill = {"kill": ("val", 2, 0), "backend": "torch", "batch_size": 6, "checkpoint_every": 5}
    run = Run(tmp_path, **settings(store_path, val_path, **kill))
    assert run.start(num_ranks=3, max_restarts=1) == 0, run.output
    assert starts(run) == [(0, 0, 0), (1, 0, 18)]
    check_training(run.lines("train"), resumed_at=18, order=order)
    evaluated = run.lines("val")
    assert records(evaluated, epoch=0, attempt=0) == [0, 1]
    for epoch in range(2):
        assert sorted(records(evaluated, epoch=epoch, attempt=1)) == list(range(NUM_VAL))


def test_a_killed_run_goes_on_with_fewer_processes(store_path, val_path, tmp_path, order):
    run = Run(tmp_path, **settings(store_path, val_path))
    assert run.start(num_ranks=3, max_restarts=0) != 0
    assert starts(run) == [(0, 0, 0)]
    killed = [line | {"attempt": -1} for line in run.lines("train")]
    run.read = []
    run.job.write_text(json.dumps(json.loads(run.job.read_text()) | {"kill": None, "batch_size": 5}))
    assert run.start(num_ranks=2, max_restarts=0) == 0, run.output
    assert starts(run) == [(0, 0, 18)]
    check_training(killed + run.lines("train"), resumed_at=18, order=order, attempts=(-1, 0))
    assert sorted(records(run.lines("val"), epoch=1)) == list(range(NUM_VAL))
