"""Conversions that torchrun's processes share."""

import os
import subprocess
import sys
from pathlib import Path

from image_sets import make_image_folder

from dali_lmdb.store import open_store

ROOT = Path(__file__).resolve().parents[1]


def torchrun(*arguments, folder):
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "scripts" / "convert.py"), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        check=False,
    )


def content(path):
    with open_store(path) as store:
        records = range(len(store))
        return store.fingerprint, [store.name(i) for i in records], [bytes(store.read(i)) for i in records]


def test_two_ranks_write_the_store_that_one_process_writes(image_folder, store_path, tmp_path):
    done = torchrun(image_folder, tmp_path / "x.lmdb", "--shards", "3", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("24 records") == 1  # rank 0 speaks for all
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"x-{i:05}-of-00003.lmdb" for i in range(3)]
    assert content(tmp_path / "x.lmdb") == content(store_path)


def test_ranks_that_find_bad_images_publish_nothing_and_say_so_together(tmp_path):
    images = make_image_folder(tmp_path / "images")
    for name in ("ant/000.jpg", "ant/001.jpg", "cat/023.jpg"):
        (images / name).write_text("no image")
    (tmp_path / "stores").mkdir()
    done = torchrun(images, tmp_path / "stores" / "x.lmdb", "--shards", "2", folder=tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert "3 of 24 images are bad" in line
    assert all(f"x-0000{shard}-of-00002.lmdb.bad.tsv" in line for shard in range(2))
    assert not list((tmp_path / "stores").glob("*.lmdb"))
    listed = "".join(path.read_text() for path in sorted((tmp_path / "stores").glob("*.bad.tsv")))
    assert [name in listed for name in ("ant/000.jpg", "ant/001.jpg", "cat/023.jpg")] == [True] * 3


def test_a_rank_that_cannot_write_ends_all_with_one_line(tmp_path):
    images = make_image_folder(tmp_path / "images")
    (images / "cat" / "023.jpg").write_text("no image")
    report = tmp_path / "x-00001-of-00002.lmdb.bad.tsv"
    report.symlink_to("/dev/full")
    done = torchrun(images, "x.lmdb", "--shards", "2", folder=tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert line.startswith(f"Error: {report.name}: a symbolic link, expected none or a file that dali_lmdb wrote")
    assert "exitcode: -" not in done.stderr  # neither rank died of a signal
    assert os.readlink(report) == "/dev/full"
