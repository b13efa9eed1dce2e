"""Names of classes and records that cannot be names of folders and files: exported to tars only."""

import io
import subprocess
import sys

import pytest
from packing import items_of, records_of, write_parquet
from PIL import Image

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.convert.sources import open_source
from dali_lmdb.inspect import export


def command(*words, **options):
    return subprocess.run([sys.executable, "-m", "dali_lmdb", *words], capture_output=True, check=False, **options)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/a/airfield", "has a slash"),
        ("x" * 256, "needs 256 bytes, file names there have at most 255"),
        ("日" * 86, "needs 258 bytes, file names there have at most 255"),
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
    assert "needs 304 bytes" in done.stderr


def encoded(kind, value):
    """The bytes of a grey image."""
    with io.BytesIO() as file:
        Image.new("RGB", (8, 8), (value, value, value)).save(file, kind)
        return file.getvalue()


@pytest.mark.parametrize("check", ["header", "none"])
@pytest.mark.parametrize("options", [[], ["--tar"]], ids=["folder", "tar"])
@pytest.mark.parametrize(
    "paths",
    [[None] * 4, ["x.jpg"] * 4, ["/d/x.jpg", "../y", "", "z"], ["a.v1", "b.v2", "c.1", "d.JPG"]],
    ids=["no paths", "repeated", "unsafe", "other endings"],
)
def test_images_whose_names_have_no_extension_are_exported_so_that_they_convert_again(
    paths, options, check, tmp_path
):
    images = [encoded(kind, value) for value, kind in enumerate(["JPEG", "PNG", "AVIF", "JPEG"])]
    rows = [(path, data, label // 2) for label, (path, data) in enumerate(zip(paths, images, strict=True))]
    source = write_parquet(tmp_path / "d.parquet", rows)
    convert(source, tmp_path / "d.lmdb", settings=ConvertSettings(check=check))
    done = command("export", "d.lmdb", "out", *options, cwd=tmp_path, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    convert(tmp_path / "out", tmp_path / "again.lmdb")
    (classes, before), (again, after) = records_of(tmp_path / "d.lmdb"), records_of(tmp_path / "again.lmdb")
    assert again == classes
    assert sorted(row[1:] for row in after) == sorted(row[1:] for row in before)


def test_the_extension_that_is_added_is_that_of_the_image(tmp_path):
    rows = [(None, encoded(kind, 0), 0) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")]
    convert(write_parquet(tmp_path / "d.parquet", rows), tmp_path / "d.lmdb")
    assert command("export", "d.lmdb", "out", cwd=tmp_path).returncode == 0
    names = sorted(path.name for path in (tmp_path / "out").rglob("*.*"))
    extensions = ["jpg", "png", "webp", "bmp", "tiff", "jpg", "ppm"]  # ImageFolder finds no .gif
    assert names == [f"{row:08}.{extension}" for row, extension in enumerate(extensions)]
    for options, folder in (((), "out"), (("--tar",), "wds")):
        export(tmp_path / "d.lmdb", tmp_path / f"{folder}2", tar=bool(options))
        assert convert(tmp_path / f"{folder}2", tmp_path / f"{folder}.lmdb").records == len(rows)


def test_two_records_that_an_extension_makes_one_file_are_refused(tmp_path):
    rows = [("a", encoded("JPEG", 0), 0), ("a.jpg", encoded("JPEG", 1), 0)]
    convert(write_parquet(tmp_path / "d.parquet", rows), tmp_path / "d.lmdb")
    done = command("export", "d.lmdb", "out", cwd=tmp_path, text=True)
    assert done.returncode == 1
    assert "its name '0/a.jpg' is also that of record 0; export it with --tar" in done.stderr
