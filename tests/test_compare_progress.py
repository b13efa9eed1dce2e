"""What ``compare`` says while it measures."""

import re
import sys

from click.testing import CliRunner
from test_train_progress import on_terminal, screen

from dali_lmdb.compare import __main__ as command

QUICK = ("--only", "dali,decode", "--seconds", "0.05", "--batch-size", "4", "--size", "16", "--device", "cpu")


def test_a_terminal_shows_what_is_measured_in_one_line_which_goes_away(store_path):
    options = (*QUICK, "--rounds", "2", "--workers", "1")
    text = on_terminal([sys.executable, "-m", "dali_lmdb.compare", store_path, *options], columns=200)
    assert "\rwarm-up: 1 of 2, dali\x1b[K" in text
    assert "\rround 1/2: 1 of 2, decode\x1b[K" in text
    assert re.search(r"\rround 2/2: 1 of 2, dali  ETA 0:0\d:\d\d\x1b\[K", text)
    shown = screen(text)
    assert [line.partition(":")[0] for line in shown[:3]] == ["warm-up", "round 1", "round 2"]
    assert not any(" of 2, " in line for line in shown)


def test_elsewhere_a_round_is_a_line_and_in_a_long_one_there_are_more(store_path, monkeypatch):
    def said():
        result = CliRunner().invoke(command.main, [str(store_path), *QUICK, "--rounds", "1", "--workers", "1"])
        assert result.exit_code == 0, result.output
        return result.stderr.splitlines()

    assert [line.partition(":")[0] for line in said()] == ["warm-up", "round 1"]
    monkeypatch.setattr(command, "LINE_INTERVAL_S", 0)
    lines = said()
    assert lines[:2] == ["warm-up: 1 of 2, dali", "warm-up: 2 of 2, decode"]
    assert lines[3:5] == ["round 1/1: 1 of 2, decode", "round 1/1: 2 of 2, dali"]
