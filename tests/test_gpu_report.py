import contextlib
import importlib
import inspect
import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from gpu_checks import store_of_pictures
from gpu_report import main, markdown, steps_of
from gpu_steps.decoding import decoders_in, largest_batches
from gpu_steps.faults import tests as gpu_tests
from gpu_steps.isolated import Outcome, Step, run_step, run_steps

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 60


def planted(name, *, limit_s=LIMIT_S, **arguments):
    return Step(name=name, function=f"planted_steps:{name}", arguments=arguments, limit_s=limit_s)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return store_of_pictures(tmp_path_factory.mktemp("pictures") / "pictures.lmdb")


# --- steps in processes of their own


def test_a_step_gives_its_rows():
    found = run_step(planted("good", value=5))
    assert (found.status, found.cause, found.log) == ("ok", "", "")
    assert found.rows == [{"value": 5}, {"value": 6}]
    assert found.elapsed_s > 0


@pytest.mark.parametrize(
    ("name", "status", "cause"),
    [
        ("wrong", "wrong", "2 is not 1"),
        ("failing", "failed", "ValueError: two lines"),
        ("leaving", "failed", "exit code 7"),
        ("crashing", "crashed", "SIGSEGV"),
        ("crashing_at_its_end", "crashed", "SIGSEGV after its last row"),
    ],
)
def test_a_step_that_does_not_end_well_says_why_and_keeps_its_rows(name, status, cause):
    found = run_step(planted(name))
    assert (found.status, found.cause) == (status, cause)
    assert found.rows[0] == {"value": 1}


@pytest.mark.parametrize(("name", "limit_s"), [("failing", LIMIT_S), ("crashing", LIMIT_S), ("hanging", 2)])
def test_the_log_of_a_step_shows_where_it_was(name, limit_s):
    log = run_step(planted(name, limit_s=limit_s)).log
    assert re.search(rf"planted_steps\.py.*{name}", log), log


def test_a_hanging_step_is_ended_and_keeps_its_rows():
    found = run_step(planted("hanging", limit_s=2))
    assert (found.status, found.cause) == ("timed out", "still running after 2 s")
    assert found.rows == [{"value": 1}]


def test_processes_that_a_step_leaves_behind_are_ended():
    (row,) = run_step(planted("leaving_a_process_behind")).rows
    with contextlib.suppress(ProcessLookupError):  # it is gone already
        ended = os.pidfd_open(row["pid"])
        assert select.select([ended], [], [], LIMIT_S)[0]
        os.close(ended)


def test_a_crash_or_a_hang_costs_only_its_step():
    steps = [planted("crashing"), planted("hanging", limit_s=2), planted("failing"), planted("good")]
    outcomes = list(run_steps(steps, budget_s=LIMIT_S))
    assert [one.name for one in outcomes] == [step.name for step in steps]
    assert [one.status for one in outcomes] == ["crashed", "timed out", "failed", "ok"]


def test_steps_share_a_budget():
    first, second = run_steps([planted("hanging"), planted("good")], budget_s=2)
    assert first.status == "timed out"
    assert (second.status, second.cause) == ("not run", "the 2 s are used up")


# --- the report


def test_markdown_shows_every_step_and_row():
    outcomes = [
        Outcome(name="one", status="ok", elapsed_s=1.25, rows=[{"a": 1234.5, "b": None}, {"c": "x|y"}]),
        Outcome(name="two", status="crashed", cause="SIGSEGV", log="last\nwords"),
        Outcome(name="three", status="not run"),
    ]
    assert markdown("A card", outcomes).splitlines() == [
        "# A card",
        "",
        "| step | result | seconds | why |",
        "|---|---|---|---|",
        "| one | ok | 1.2 |  |",
        "| two | crashed | 0.0 | SIGSEGV |",
        "| three | not run | 0.0 |  |",
        "",
        "## one",
        "",
        "| a | b | c |",
        "|---|---|---|",
        "| 1,234.5 |  |  |",
        "|  |  | x\\|y |",
        "",
        "## two",
        "",
        "",
        "```text",
        "last",
        "words",
        "```",
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_step_can_be_found_and_takes_its_arguments(device, store_path):
    steps = steps_of(str(store_path), device=device, batch_size=8, seconds=1)
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        module, _, name = step.function.partition(":")
        inspect.signature(getattr(importlib.import_module(module), name)).bind(**step.arguments)


def test_on_a_gpu_every_mode_is_run_by_itself():
    functions = [step.function for step in steps_of("x.lmdb", device="cuda", batch_size=8, seconds=1)]
    for function in ("decoding:route", "decoding:pixels", "speed:decoding"):
        assert functions.count(f"gpu_steps.{function}") == 3
    assert functions.count("gpu_steps.faults:out_of_memory") == 1
    assert functions.count("gpu_steps.faults:tests") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(store_path, tmp_path):
    found = CliRunner().invoke(main, [str(store_path), "--output", str(tmp_path / "report")])
    assert found.exit_code == 1
    assert found.stderr == "Error: no usable GPU found; install its driver, or try the report with --cpu\n"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_store_is_an_error_in_one_line(tmp_path):
    found = CliRunner().invoke(main, [str(tmp_path / "none.lmdb"), "--cpu"])
    assert (found.exit_code, found.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize("options", [["--output", "none/report"], ["--seconds", "nan"]])
def test_what_cannot_be_done_is_an_error_in_one_line_before_any_step(pictures, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(main, [str(pictures), "--cpu", *options])
    assert (found.exit_code, found.stderr.count("\n")) == (1, 1), found.stderr
    assert found.stderr.startswith("Error: ")
    assert options[1] in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_training_on_a_cpu_takes_small_batches():
    for device, expected in (("cpu", 2), ("cuda", 256)):
        (step,) = (
            one for one in steps_of("x.lmdb", device=device, batch_size=256, seconds=1) if "training" in one.name
        )
        assert step.arguments["batch_size"] == expected


def command(store, tmp_path, *options):
    words = [sys.executable, "scripts/gpu_report.py", store, "--cpu", "--output", tmp_path / "report", *options]
    return [str(word) for word in words]


def test_on_a_cpu_every_step_passes(pictures, tmp_path):
    options = ["--batch-size", 4, "--seconds", 0.05]
    done = subprocess.run(
        command(pictures, tmp_path, *options), cwd=ROOT, capture_output=True, text=True, check=False
    )
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert done.returncode == 0, text
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    expected = steps_of(str(pictures), device="cpu", batch_size=4, seconds=0.05)
    assert [one["name"] for one in report["steps"]] == [step.name for step in expected]
    assert {one["status"] for one in report["steps"]} == {"ok"}
    assert all(one["rows"] for one in report["steps"])
    rows = {one["name"]: one["rows"] for one in report["steps"]}
    decoders = {row["decoder"]: row["images"] for row in rows["decoders: image on the CPU"]}
    assert decoders["libjpeg_turbo_decoder"] >= 2
    assert [row["found"] for row in rows["bad records"]] == [row["bad"] for row in rows["bad records"]]
    assert f"{len(expected)} steps: {len(expected)} ok" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_after_ctrl_c_the_report_has_what_was_found(pictures, tmp_path):
    process = subprocess.Popen(
        command(pictures, tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline().startswith("versions: ok after")
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, rest
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    statuses = [one["status"] for one in report["steps"]]
    assert len(statuses) == len(steps_of("x.lmdb", device="cpu", batch_size=4, seconds=1))
    assert statuses[0] == "ok"
    assert set(statuses[2:]) == {"not run"}  # the second one may have begun
    assert "| versions | ok |" in (tmp_path / "report.md").read_text(encoding="utf-8")


# --- what the steps read


def test_decoders_are_read_from_nvimagecodecs_log():
    log = """
[INFO] [nvimgcodec] create nvjpeg_hw_decoder load_hint 0.65 load_hint_policy 2
[INFO] [nvimgcodec] nvjpeg_hw_decoder selecting max batch size to 5 mini_bs=1
[INFO] [nvimgcodec] 1: nvjpeg_cuda_decoder process #0
[INFO] [nvimgcodec] 0: nvjpeg_cuda_decoder process #3
[INFO] [nvimgcodec] 0: libjpeg_turbo_decoder process #3
"""
    found = decoders_in(log, num_images=7)
    assert found == {"nvjpeg_cuda_decoder": 1, "libjpeg_turbo_decoder": 1, "nvjpeg_hw_decoder": 5}
    assert largest_batches(log) == [5]


def test_without_a_hardware_engine_images_of_no_line_are_not_counted_as_its():
    log = "[INFO] [nvimgcodec] 1: libjpeg_turbo_decoder process #0\n"
    assert decoders_in(log, num_images=2) == {"libjpeg_turbo_decoder": 1, "no line in the log": 1}
    assert largest_batches(log) == []


def test_results_of_tests_are_counted_and_failures_named(tmp_path):
    path = tmp_path / "test_planted.py"
    path.write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_left_out(): pytest.skip('why')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    bad, all_of_them = gpu_tests(paths=[os.path.relpath(path, ROOT)], ignored=[])
    assert bad["test"].endswith("test_bad")
    assert bad["wrong"]
    assert sorted(all_of_them["result"].split(", ")) == ["1 failed", "1 passed", "1 skipped"]
    assert all_of_them["wrong"] == "pytest ended with exit code 1"
