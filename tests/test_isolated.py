"""Work in a process of its own: whatever an item does to that process, it alone is named."""

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dali_lmdb.errors import DeviceError, RecordError
from dali_lmdb.isolated import Died, Isolated, Sample

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def isolated(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))  # the process gets the parent's sys.path
    made = Isolated("isolated_handlers:obey", {"scale": 1}, cpu_seconds=1, growth_bytes=256 << 20)
    yield made
    made.close()


def items(*orders):
    return [Sample(order.encode(), note=order) for order in orders]


def outcomes(answers):
    return [answer.cause if isinstance(answer, Died) else answer.value[1] for answer in answers]


def test_items_are_answered_in_order_with_settings_notes_and_data(isolated):
    answers = isolated.work([Sample(b"double", note=[1]), Sample(memoryview(b"x")), Sample(np.zeros(3, np.uint8))])
    assert [answer.value[:2] for answer in answers] == [
        [{"scale": 1}, [1]],
        [{"scale": 1}, None],
        [{"scale": 1}, None],
    ]
    assert [answer.data for answer in answers] == [b"222222", b"2", b"222"]
    assert answers[0].value[2] == isolated.work(items("x"))[0].value[2] != os.getpid()


@pytest.mark.parametrize(
    ("order", "cause"),
    [("segv", "crashed: SIGSEGV"), ("spin", "took more than 1 s"), ("exit", "ended with exit code 3")],
)
def test_an_item_that_ends_the_process_is_named_and_the_others_are_answered(isolated, order, cause):
    assert outcomes(isolated.work(items("a", order, "b", "c"))) == ["a", cause, "b", "c"]


def test_several_items_that_end_the_process_are_all_named(isolated):
    assert outcomes(isolated.work(items("segv", "a", "exit", "segv"))) == [
        "crashed: SIGSEGV",
        "a",
        "ended with exit code 3",
        "crashed: SIGSEGV",
    ]


def test_an_item_that_dies_only_after_others_is_not_blamed(isolated):
    answers = isolated.work(items("a", "segv in company", "b"))
    assert outcomes(answers) == ["a", "segv in company", "b"]
    assert len({answer.value[2] for answer in answers}) == 3, "each has a process of its own"


def test_a_single_item_that_finds_the_process_dead_is_not_blamed(isolated):
    (before,) = isolated.work(items("a"))
    process = os.pidfd_open(before.value[2])
    os.kill(before.value[2], signal.SIGKILL)
    assert select.select([process], [], [], 10)[0]
    os.close(process)
    assert outcomes(isolated.work(items("b"))) == ["b"]
    assert outcomes(isolated.work(items("segv"))) == ["crashed: SIGSEGV"]


def test_a_culprit_among_items_worked_on_at_once_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    isolated = Isolated("isolated_handlers:together", None)
    orders = ["a"] * 20
    orders[13] = "segv"
    answers = isolated.work(items(*orders))
    assert [number for number, answer in enumerate(answers) if isinstance(answer, Died)] == [13]
    isolated.close()


def test_an_item_that_needs_memory_beyond_the_limit_is_named(isolated):
    assert outcomes(isolated.work(items("a", "grow", "b"))) == ["a", "ran out of memory", "b"]


def test_an_item_that_is_larger_than_the_limit_is_named(isolated):
    large = Sample(bytes(300 << 20))
    assert outcomes(isolated.work([*items("a"), large, *items("b")])) == ["a", "ran out of memory", "b"]


def test_an_error_of_the_handler_is_raised_and_the_process_stays(isolated):
    (before,) = isolated.work(items("a"))
    with pytest.raises(RecordError, match="this record"):
        isolated.work(items("raise"))
    assert isolated.work(items("a")) == [before]


def test_a_handler_that_cannot_be_made_says_why(isolated):
    with pytest.raises(RuntimeError, match="cannot be made"):
        Isolated("isolated_handlers:obey", "broken").work(items("a"))


def test_a_handler_that_cannot_be_made_for_lack_of_memory_says_so_as_python_does(isolated):
    with pytest.raises(ImportError, match="failed to map segment"):
        Isolated("isolated_handlers:obey", "no memory").work(items("a"))


def test_a_process_that_dies_while_it_starts_is_an_error_of_ours(isolated):
    with pytest.raises(DeviceError, match="cannot start: it ended with exit code 3; free some memory"):
        Isolated("isolated_handlers:obey", "dies").work(items("a"))


def test_large_items_leave_no_memory_behind(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    isolated = Isolated("isolated_handlers:obey", None)
    large, small = isolated.work([Sample(bytes(100 << 20))]), isolated.work(items("a"))
    assert len(large[0].data) == 100 << 20
    assert small[0].value[2] != large[0].value[2]
    isolated.close()


def test_close_ends_a_wait_for_an_answer(isolated):
    (answer,) = isolated.work(items("a"))
    failures = []

    def wait():
        try:
            isolated.work(items("wait"))
        except RuntimeError as error:
            failures.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    isolated.close()
    thread.join(10)
    assert failures == ["the process that decodes is closed"]
    with pytest.raises(ProcessLookupError):
        os.kill(answer.value[2], 0)
    with pytest.raises(RuntimeError, match="closed"):
        isolated.work(items("a"))


def test_a_start_that_is_refused_leaves_no_descriptor(isolated):
    isolated.close()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(RuntimeError, match="closed"):
        isolated.work(items("a"))
    assert os.listdir("/proc/self/fd") == before


def test_the_process_ends_with_its_parent():
    script = """
import os, signal
from dali_lmdb.isolated import Isolated, Sample
isolated = Isolated("isolated_handlers:obey", None)
print(isolated.work([Sample(b"a")])[0].value[2], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.returncode == -signal.SIGKILL
    try:
        process = os.pidfd_open(int(parent.stdout))
    except ProcessLookupError:
        return
    assert select.select([process], [], [], 10)[0], "still there after 10 s"
    os.close(process)
