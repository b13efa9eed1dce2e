"""Names of classes on the command line, whatever characters they have."""

import subprocess
import sys

import pytest
from image_sets import make_image_folder

from dali_lmdb.convert import convert
from dali_lmdb.store import open_store


def command(*words, **options):
    return subprocess.run([sys.executable, "-m", "dali_lmdb", *words], capture_output=True, check=False, **options)


def classes_of(path):
    with open_store(path) as store:
        return store.classes


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A store whose class names have commas; two of them look like others with a comma between."""
    root = tmp_path_factory.mktemp("named")
    make_image_folder(root / "images", num_records=12, classes=("ant", "ant,bee", "bee", "tench, Tinca tinca"))
    convert(root / "images", root / "named.lmdb")
    return root / "named.lmdb"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--classes", "tench, Tinca tinca"], ["tench, Tinca tinca"]),
        (["--classes", "ant,bee"], ["ant,bee"]),
        (["--classes", "bee,ant"], ["ant", "bee"]),
        (["--classes", "bee", "--classes", "ant"], ["ant", "bee"]),
        (["--classes", "bee,ant", "--classes", "tench, Tinca tinca"], ["ant", "bee", "tench, Tinca tinca"]),
        (["--classes-file", "names.txt"], ["ant,bee", "tench, Tinca tinca"]),
        (["--classes-file", "names.txt", "--classes", "ant"], ["ant", "ant,bee", "tench, Tinca tinca"]),
    ],
    ids=" ".join,
)
def test_a_class_is_named_whole_before_a_value_is_split_at_commas(words, expected, named, tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufefftench, Tinca tinca\r\n\r\nant,bee\r\n".encode())
    done = command("convert", named, "part.lmdb", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert classes_of(tmp_path / "part.lmdb") == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--classes", "tench,bee"], "no class 'tench'; it has 4: 'ant', 'ant,bee', 'bee', 'tench, Tinca"),
        (["--classes", ""], "no class ''; it has"),
        (["--classes-file", "empty.txt"], "empty.txt: no class names in it; expected one on each line"),
        (["--classes-file", "none.txt"], "none.txt: cannot be read: No such file"),
        (["--classes-file", "."], ".: a folder, expected a file"),
    ],
)
def test_classes_that_are_not_there_are_refused(words, message, named, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    done = command("convert", named, "part.lmdb", *words, cwd=tmp_path, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "part.lmdb").exists()


def test_classes_that_export_lists_name_the_classes_of_the_store(named, tmp_path):
    assert command("export", named, "tars", "--tar", cwd=tmp_path).returncode == 0
    done = command("convert", named, "all.lmdb", "--classes-file", "tars/classes.txt", cwd=tmp_path, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert classes_of(tmp_path / "all.lmdb") == classes_of(named)
