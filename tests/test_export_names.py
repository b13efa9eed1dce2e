"""Names of classes and records that cannot be names of folders and files: exported to tars only."""

import subprocess
import sys

import pytest
from packing import items_of, write_parquet

from dali_lmdb.convert import convert
from dali_lmdb.convert.sources import open_source


def command(*words, **options):
    return subprocess.run([sys.executable, "-m", "dali_lmdb", *words], capture_output=True, check=False, **options)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/a/airfield", "has a slash"),
        ("x" * 256, "needs 256 bytes, a file's name has at most 255"),
        ("日" * 86, "needs 258 bytes, a file's name has at most 255"),
        (".", "is not a plain path"),
    ],
    ids=["slash", "long", "long in UTF-8", "dot"],
)
def test_a_class_that_cannot_be_a_folder_is_exported_to_tars_only(name, reason, tmp_path, image_folder):
    data = (image_folder / "ant" / "000.jpg").read_bytes()
    source = write_parquet(tmp_path / "a.parquet", [("x.jpg", data, 0), ("y.jpg", data, 1)], names=["ant", name])
    convert(source, tmp_path / "a.lmdb")
    done = command("export", "a.lmdb", "out", cwd=tmp_path, text=True)
    assert done.returncode == 1
    assert reason in done.stderr
    assert "export it with --tar" in done.stderr
    assert len(done.stderr) < 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.lmdb", "a.parquet"]
    assert command("export", "a.lmdb", "out", "--tar", cwd=tmp_path).returncode == 0
    classes, rows = items_of(open_source(tmp_path / "out"))
    assert classes == ["ant", name]
    assert [(label, value) for _, label, value in rows] == [(0, data), (1, data)]


def test_a_record_whose_name_is_too_long_for_a_file_is_refused_before_anything_is_written(tmp_path, image_folder):
    data = (image_folder / "ant" / "000.jpg").read_bytes()
    convert(write_parquet(tmp_path / "a.parquet", [("x" * 300, data, 0)], names=["ant"]), tmp_path / "a.lmdb")
    done = command("export", "a.lmdb", "out", cwd=tmp_path, text=True)
    assert done.returncode == 1
    assert "record 0: its name 'ant/xxx" in done.stderr
    assert "needs 300 bytes" in done.stderr
