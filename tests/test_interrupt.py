"""Ctrl-C in a training loop: the process ends at once, with one traceback, and takes all of its own with it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_SECONDS = 10

LOOP = """
import sys
import torch
from dali_lmdb import DaliLoader, TorchLoader, TrainTransform

kind, options = {"dali": (DaliLoader, {"device": "cpu", "num_threads": 1}),
                 "torch": (TorchLoader, {"num_workers": 0}),
                 "workers": (TorchLoader, {"num_workers": 2})}[sys.argv[1]]
model = torch.nn.Linear(3 * 32 * 32, 3)
loader = kind(sys.argv[2], transform=TrainTransform(size=32), batch_size=4, **options)
steps = 0
while True:
    for images, labels in loader:
        torch.nn.functional.cross_entropy(model(images.flatten(1)), labels).backward()
        steps += 1
        if steps == 20:
            print("training", flush=True)
"""


def session_of(pid):
    """Processes of a session, by what /proc says; the dead ones that nobody has asked about are left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(") ")[2].split()[:4]
        except OSError:  # gone since
            continue
        if int(session) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


@contextmanager
def training(kind, store_path):
    """A process in the training loop; whatever is left of it in the end is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, kind, str(store_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            assert process.stdout.readline() == "training\n", process.stderr.read()
            yield process
        finally:
            for pid in session_of(process.pid):
                os.kill(pid, signal.SIGKILL)


def assert_ended_by_interrupt(process, errors):
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt"), errors


@pytest.mark.parametrize(
    ("kind", "to_all"),
    [("dali", True), ("torch", True), ("workers", True), ("workers", False)],
    ids=["dali", "torch", "workers", "workers-not-told"],
)
def test_ctrl_c_ends_a_training_loop_at_once(store_path, kind, to_all):
    """A terminal interrupts the workers, too; ``kill -INT`` only the process that is named."""
    with training(kind, store_path) as process:
        begin = time.monotonic()
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - begin < MOST_SECONDS
        assert session_of(process.pid) == []
    assert_ended_by_interrupt(process, errors)


def test_a_worker_that_does_not_answer_does_not_keep_the_process_alive(store_path):
    with training("workers", store_path) as process:
        worker = max(session_of(process.pid))
        assert worker != process.pid
        os.kill(worker, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)  # torch alone waits for 5 s
        assert session_of(process.pid) == []
    assert_ended_by_interrupt(process, errors)


def test_no_interrupt_is_lost_while_torch_takes_over_tensors_of_dali():
    script = """
import signal
import numpy as np
from nvidia.dali.backend import TensorCPU
from dali_lmdb.loaders.run import as_torch

raised = caught = 0

def interrupt(number, frame):
    global raised
    raised += 1
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
tensor = TensorCPU(np.arange(4, dtype=np.uint8))
while raised < 2000:
    try:
        # Again after 10 ms, in case that one is lost.
        signal.setitimer(signal.ITIMER_REAL, 1e-5 * (1 + raised % 7), 0.01)
        while True:
            as_torch(tensor)
    except KeyboardInterrupt:
        caught += 1
signal.setitimer(signal.ITIMER_REAL, 0)
print(raised - caught, as_torch(tensor).tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "0 [0, 1, 2, 3]\n", done.stderr
