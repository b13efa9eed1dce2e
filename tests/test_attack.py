"""Damaged images of every kind, and bursts of interrupts: no process dies, hangs or leaves a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from attack import ATTACKS, MALLOC_CHECKS, Run, failure
from mutations import corpus, mutant

HERE = Path(__file__).resolve().parent
INTERRUPTS = 10_000


def attack(folder, *options, cases, odd_images=None):
    """Run ``attack.py``; returns what failed, a line each."""
    more = ("--odd-images", odd_images) if odd_images else ()
    command = [sys.executable, HERE / "attack.py", folder, "--cases", cases, *options, *more]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    *failures, summary = done.stdout.splitlines()
    print(summary)
    return failures


OVERFLOW = """
import ctypes
block = ctypes.create_string_buffer(2000)
ctypes.memset(block, 1, 2001)  # what malloc has rounded up, so only its checks notice
del block
"""


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        pytest.param(OVERFLOW, "SIGABRT", marks=pytest.mark.skipif(not MALLOC_CHECKS, reason="needs glibc")),
        ("{}['name']", "traceback: KeyError: 'name'"),
        ("import signal; signal.pause()", "runs for more than 2 s"),
        ("raise SystemExit(3)", "exit code 3"),
        ("raise SystemExit(1)", "exit code 1"),
        ("import sys; sys.exit('Error: ours')", "None"),
    ],
)
def test_what_should_not_happen_to_a_command_is_noticed(code, says):
    what, _ = failure([sys.executable, "-c", code], seconds=2 if "pause" in code else 60, perturb=85)
    assert str(what).startswith(says)


def test_the_image_that_a_command_dies_of_is_found(tmp_path, monkeypatch, capsys):
    images = {f"{number:02}": tmp_path / f"{number:02}" for number in range(30)}
    for name, path in images.items():
        path.write_text("deadly" if name in ("07", "21") else "harmless")
    texts = "[path.read_text() for path in pathlib.Path(sys.argv[1]).glob('*/*')]"
    code = f"import os, pathlib, sys; 'deadly' in {texts} and os.abort()"
    monkeypatch.setitem(ATTACKS, "header", [[sys.executable, "-c", code, "SOURCE"]])
    run = Run(images, scratch=tmp_path)
    run.search("header", list(images))
    assert [names for names, _ in run.culprits] == [["07"], ["21"]]
    assert all("SIGABRT" in line for line in capsys.readouterr().out.splitlines())


def test_a_mutant_depends_on_its_number_alone():
    files = corpus()
    first, *_, last = [mutant(files, seed=0, number=number) for number in range(20)]
    assert mutant(files, seed=0, number=0) == first
    assert mutant(files, seed=0, number=19) == last != mutant(files, seed=1, number=19)


def test_damaged_images_are_bad_images_and_nothing_more(tmp_path):
    assert attack(tmp_path, "--attack", "header", "--attack", "decode", cases=100) == []


@pytest.mark.soak
def test_many_damaged_images_are_bad_images_and_nothing_more(tmp_path, test_data):
    cases = int(os.environ.get("DALI_LMDB_SOAK_CASES", "20000"))
    assert attack(tmp_path, "--group", 2500, cases=cases, odd_images=test_data / "odd-images") == []


def interrupt(kind, store, count, seed=0):
    """Run ``interrupts.py``; returns its figures."""
    command = [sys.executable, HERE / "interrupts.py", kind, store, count, seed]
    done = subprocess.run(list(map(str, command)), cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_no_interrupt_is_lost_and_none_leaves_a_loader_waiting(store_path, kind):
    figures = interrupt(kind, store_path, 200)
    assert figures["raised"] >= 200
    assert (figures["lost"], figures["repeated"]) == (0, 0)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_of_many_interrupts_none_is_lost_and_none_leaves_a_loader_waiting(store_path, kind):
    figures = interrupt(kind, store_path, INTERRUPTS)
    print(kind, figures)
    assert (figures["lost"], figures["repeated"]) == (0, 0)
