"""What people watch: the line on a terminal, and what is said of waiting for data."""

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch
from test_train import ROOT, command, data, environment, one_thread, tiny  # noqa: F401  # fixtures

from dali_lmdb.torchrun import RankEnvironment
from dali_lmdb.train.metrics import JsonLog
from dali_lmdb.train.progress import RunProgress, what_to_try

COLUMNS = 20


def on_terminal(arguments, *, columns=COLUMNS, expect=0):
    """Run a process with stdout and stderr on a terminal, and return all that it wrote there."""
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    # Without stdin: only the output is a terminal, as in a container.
    with subprocess.Popen(
        list(map(str, arguments)), cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=end, stderr=end
    ) as process:
        os.close(end)
        text = b""
        while True:
            try:
                block = os.read(terminal, 1 << 16)
            except OSError:  # Linux's way to say that no process has the other end any more
                break
            text += block
    os.close(terminal)
    assert process.returncode == expect, text
    return text.decode()


def screen(text):
    """The lines that a terminal shows in the end; it knows line ends, ``\\r`` and ``\\x1b[K``."""
    lines, column = [""], 0
    for part in re.split(r"(\r|\n|\x1b\[K)", text):
        if part == "\n":
            lines.append("")
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif part != "\r":
            lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
            column += len(part)
        if part in ("\r", "\n"):
            column = 0
    return lines


def drawn(text):
    """Each text that the progress line has had."""
    return re.findall(r"\r([^\r\n\x1b]+)\x1b\[K", text)


def test_the_screen_is_that_of_a_terminal():
    assert screen("one\rtwo\r\nabcdef\rxy\x1b[K\rz\r\n\r\x1b[Kok") == ["two", "zy", "ok"]


def test_a_terminal_shows_one_line_instead_of_the_reports_of_steps(data, tmp_path):  # noqa: F811
    # Six batches are two steps: one of four batches and one of two.
    options = ("--epochs", "2", "--accumulate", "4", "--log-every", "1", "--log-json", tmp_path / "log")
    text = on_terminal(command(data, *options), columns=200)
    lines = drawn(text)
    assert all(re.match(r"epoch [01]/2  (step [12]/2|evaluation [12]/2)(  |$)", line) for line in lines), lines
    everything = r"  ETA 0:0\d:\d\d  \d+ images/s  loss \S+  lr \S+  top-1 \S+ %  waiting \d+ %$"
    assert any(re.search(everything, line) for line in lines), lines
    shown = screen(text)
    assert [line.split()[0] for line in shown if "validation: top-1" in line] == [
        "epoch",
        "epoch",
        "best:",
        "last:",
    ]
    assert not any("waiting" in line for line in shown)
    logged = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(logged[1]) == ["data_wait_fraction", "epoch", "images_per_s", "loss", "lr", "step", "time"]
    assert {"epoch_s", "time", "val_top1"} <= logged[-1].keys()


def test_the_line_is_cut_to_a_terminals_width_and_an_error_has_a_line_of_its_own(data):  # noqa: F811
    text = on_terminal(command(data, "--world-size", "2", "--lr", "1e30"), expect=1)
    lines = drawn(text)
    assert lines
    assert max(map(len, lines)) < COLUMNS
    (error,) = [line for line in screen(text) if "Error" in line]
    assert error.startswith("Error: rank ")


def test_messages_and_warnings_stand_above_the_line():
    script = (
        "import logging, warnings\nfrom dali_lmdb.train.rank import show_progress\n"
        "with show_progress(rank=0) as line:\n"
        "    line.show('a long line of progress')\n"
        "    warnings.warn('careful', stacklevel=1)\n"
        "    line.show('a long line of progress')\n"
        "    logging.getLogger('dali_lmdb').warning('message')\n"
        "    line.show('a moment later')\n"
    )
    shown = screen(on_terminal([sys.executable, "-c", script]))
    assert re.fullmatch(r"<string>:5: UserWarning: careful", shown[0])
    assert "message" in shown
    assert not any("progress" in line for line in shown)
    assert shown[-1] == ""


def rows():
    """The symptoms in README and what to do about them, where they are about waiting for data."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return [line.split(" | ")[1] for line in readme.splitlines() if re.match(r"\| \S+ wait for data", line)]


@pytest.mark.parametrize(
    ("options", "situation"),
    [
        ({}, {}),
        ({}, {"on_gpu": True}),
        ({"decode_device": "cpu"}, {"on_gpu": True}),
        ({"backend": "torch"}, {}),
        ({}, {"is_late": True, "is_first_epoch": True}),
        ({}, {"is_late": True}),
    ],
)
def test_what_to_try_against_waiting_is_what_readme_says(data, options, situation):  # noqa: F811
    settings = tiny(data, **options)
    says = what_to_try(settings, **{"on_gpu": False, "is_late": False, "is_first_epoch": False, **situation})
    tried = set(
        re.findall(r"(?:convert )?--[a-z-]+(?: \w+(?= |$|,))?", says.replace(" where", ",").replace(" or", ","))
    )
    assert tried
    assert all(any(option in row for row in rows()) for option in tried), tried


def test_waiting_is_said_once_and_not_of_the_beginning_of_an_epoch(data, caplog):  # noqa: F811
    report = {"loss": 1.0, "lr": 0.1, "images_per_s": 10.0, "data_wait_fraction": 0.11}
    with JsonLog(None, append=False) as log:
        progress = RunProgress(
            tiny(data), num_records=48, ranks=RankEnvironment(), device=torch.device("cpu"), log=log, line=None
        )
        for fraction, said in ((0.5, 0), (0.1, 0), (0.11, 1), (0.5, 1)):
            progress.report(
                {**report, "data_wait_fraction": fraction}, epoch=0, step=1, records_done=8, late_bytes=0
            )
            assert len(caplog.messages) == said
    assert caplog.messages == [
        "11 % of the time since the last report was spent waiting for data; try more --workers where CPU cores "
        "are idle, convert --resize 512 where they are busy"
    ]
