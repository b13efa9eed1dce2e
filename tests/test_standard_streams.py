"""Commands whose standard input, output or error is closed, full or gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLI = ["-m", "dali_lmdb"]
NO_SPACE = "No space left on device"


def run(*arguments, redirect, folder):
    """Run Python in ``folder`` with a redirection, in the shell's words."""
    return subprocess.run(
        ["bash", "-c", f'exec "$@" {redirect}', "-", sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def is_clean(store, folder):
    done = run(*CLI, "verify", store, redirect="", folder=folder)
    return done.returncode == 0 and ": clean: 24 records" in done.stdout


@pytest.mark.parametrize("redirect", ["2>&-", "<&- >&- 2>&-"])
def test_commands_work_where_nobody_listens(image_folder, tmp_path, redirect):
    for arguments in (["convert", image_folder, "x.lmdb"], ["verify", "x.lmdb"], ["export", "x.lmdb", "images"]):
        done = run(*CLI, *arguments, redirect=redirect, folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), arguments
    assert is_clean("x.lmdb", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "x.lmdb"]
    assert len(list((tmp_path / "images").glob("*/*.jpg"))) == 24


def test_an_error_is_an_error_where_nobody_listens(tmp_path):
    done = run(*CLI, "info", "none.lmdb", redirect="2>&-", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")


PRINTING_LIBRARY = """
import os, sys
import dali_lmdb.cli

def write(event, arguments):
    if event == "open":
        os.write(1, b"what a C library has to say\\n")

sys.addaudithook(write)
dali_lmdb.cli.main(sys.argv[1:])
"""


def test_what_a_library_prints_to_a_closed_stream_lands_in_no_file(image_folder, tmp_path):
    done = run("-c", PRINTING_LIBRARY, "convert", image_folder, "x.lmdb", redirect=">&-", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert is_clean("x.lmdb", tmp_path)
    assert b"library" not in (tmp_path / "x.lmdb").read_bytes()


def test_a_file_and_a_child_process_get_no_standard_descriptor(tmp_path):
    code = "import dali_lmdb, os, subprocess, sys; child = [sys.executable, '-c', 'import os; os.fstat(2)']"
    code += "; assert os.open('file', os.O_CREAT) > 2; subprocess.run(child, check=True)"
    assert run("-c", code, redirect="<&- >&- 2>&-", folder=tmp_path).returncode == 0


LIBRARY = """
import sys
sys.stdin = sys.stdout = sys.stderr = None
from dali_lmdb import DaliLoader, TorchLoader, TrainTransform
from dali_lmdb.cli import ProgressBar
from dali_lmdb.convert import convert
from dali_lmdb.inspect import export, verify

convert(sys.argv[1], "x.lmdb")
assert verify("x.lmdb").clean
assert export("x.lmdb", "images").records == 24
for kind in (DaliLoader, TorchLoader):
    with kind("x.lmdb", transform=TrainTransform(size=8), batch_size=4, device="cpu") as loader:
        assert len(list(loader)) == 6
with ProgressBar() as bar:
    bar.show("writing", 1, 2, 3)
"""


def test_the_library_works_in_a_process_without_streams(image_folder, tmp_path):
    assert run("-c", LIBRARY, image_folder, redirect="", folder=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "complete"),
    [
        (["--help"], ""),
        (["--version"], ""),
        (["info", "--help"], ""),
        (["info", "STORE"], ""),
        (["info", "STORE", "--json"], ""),
        (["verify", "STORE"], ""),
        (["convert", "IMAGES", "x.lmdb"], "; x.lmdb is complete"),
        (["export", "STORE", "images"], "; images is complete"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_result_that_cannot_be_written_is_one_line(image_folder, store_path, tmp_path, arguments, complete):
    names = {"STORE": store_path, "IMAGES": image_folder}
    arguments = [names.get(word, word) for word in arguments]
    done = run(*CLI, *arguments, redirect="> /dev/full", folder=tmp_path)
    says = f"Error: standard output: cannot be written: {NO_SPACE}{complete}\n"
    assert (done.returncode, done.stderr) == (1, says)
    if complete:
        assert (tmp_path / complete.split()[1]).exists()


def test_a_reader_that_went_away_is_no_message(store_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, *CLI, "info", store_path]
    done = subprocess.run(command, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


PROGRESS = """
from dali_lmdb import cli
cli.LINE_INTERVAL_S = 0
with cli.ProgressBar() as bar:
    bar.show("writing", 1, 2, 3)
    bar.show("writing", 2, 2, 3)
print("done")
"""


def test_progress_that_cannot_be_shown_stops_nothing(tmp_path):
    done = run("-c", PROGRESS, redirect="2>/dev/full", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n")
