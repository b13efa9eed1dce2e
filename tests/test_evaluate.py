"""``dali-lmdb evaluate``: what it counts, writes and refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dali_lmdb.convert import convert
from dali_lmdb.evaluate.__main__ import main
from dali_lmdb.store import open_store
from dali_lmdb.train import TrainSettings, checkpoint, train

NUM_VAL = 13
NUM_CLASSES = 6
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread():
    """Sums come out the same every time, and as in a process with OMP_NUM_THREADS=1."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stores, and a run in ``run`` with averaged weights and unusual image settings; result.json: its figures."""
    root = tmp_path_factory.mktemp("evaluate")
    random = np.random.default_rng(0)
    classes = "abcdef"
    for split, names, count in (
        ("train", classes, 12),
        ("val", classes, NUM_VAL),
        ("subset", "ca", 4),
        ("other", "ax", 4),
    ):
        for number in range(count):
            path = root / split / names[number % len(names)] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
        convert(root / split, root / f"{split}.lmdb")
    settings = TrainSettings(
        train=str(root / "train.lmdb"),
        val=str(root / "val.lmdb"),
        arch="resnet18",
        device="cpu",
        size=32,
        val_size=40,
        val_resize=44,
        interpolation="nearest",
        batch_size=6,
        epochs=2,
        keep=2,
        workers=1,
        model_ema_decay=0.9,
        output=str(root / "run"),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    (root / "result.json").write_text(json.dumps(train(settings)))
    torch.set_num_threads(before)
    return root


def words(folder, *options, val="val.lmdb", file="run/last.pt"):
    paths = [folder / file, "--val", folder / val, "--device", "cpu", "--workers", "1"]
    return [str(word) for word in (*paths, *options)]


def run(folder, *options, **where):
    return CliRunner().invoke(main, words(folder, *options, **where))


def evaluated(folder, *options, **where):
    """What ``--json`` prints."""
    done = run(folder, "--json", *options, **where)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def run_process(folder, *options, launcher=("-m",), **where):
    command = [sys.executable, *launcher, "dali_lmdb.evaluate", *words(folder, *options, **where)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done


def changed(folder, tmp_path, **values):
    """A checkpoint like last.pt but for some values."""
    checkpoint.save(tmp_path / "changed.pt", {**checkpoint.load(folder / "run/last.pt"), **values})
    return tmp_path / "changed.pt"


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "epoch-0000.pt"])
def test_a_checkpoint_has_the_figures_that_the_trainer_gave_it(folder, name):
    result = evaluated(folder, file=f"run/{name}")
    trained = json.loads((folder / "result.json").read_text())
    epoch = checkpoint.load(folder / "run" / name)["result"]["epoch"]
    figures = {key: value for key, value in result.items() if "val_" in key}
    assert figures == {key: value for key, value in trained[epoch].items() if key != "epoch"}
    assert {"val_top1", "ema_val_top1", "val_records"} <= figures.keys()


def test_either_weights_can_be_evaluated_alone(folder):
    both, plain, averaged = evaluated(folder), evaluated(folder, "--no-ema"), evaluated(folder, "--ema")
    assert both["weights"] == averaged["weights"] == "averaged"
    assert plain["weights"] == "plain"
    assert {**plain, **averaged} == both
    assert plain.keys() ^ averaged.keys() == {
        f"{prefix}val_{kind}" for prefix in ("", "ema_") for kind in ("top1", "top5", "loss")
    }


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")


@pytest.mark.parametrize("launcher", [("-m",), TORCHRUN], ids=["launch", "torchrun"])
def test_ranks_together_count_every_record_once(folder, tmp_path, launcher):
    options = ["--json", "--batch-size", "2", "--predictions"]
    alone = evaluated(folder, *options[1:], tmp_path / "alone")
    ranks = ["--world-size", "2"] if launcher == ("-m",) else []
    done = run_process(folder, *ranks, *options, tmp_path / "ranks", launcher=launcher)
    result = json.loads(done.stdout)
    for name in ("val_top1", "val_top5", "ema_val_top1", "ema_val_top5", "val_records", "confusions"):
        assert result[name] == alone[name]
    one, two = (pq.read_table(tmp_path / name).to_pydict() for name in ("alone", "ranks"))
    assert two["record"] == list(range(NUM_VAL))
    assert [two[name] for name in ("name", "label", "predicted")] == [
        one[name] for name in ("name", "label", "predicted")
    ]


def test_the_files_agree_with_the_figures(folder, tmp_path):
    files = {name: tmp_path / name for name in ("per-class", "predictions", "worst")}
    result = evaluated(folder, "--no-ema", *(word for name, path in files.items() for word in (f"--{name}", path)))
    rows = pq.read_table(files["predictions"]).to_pylist()
    with open_store(folder / "val.lmdb") as store:
        assert [row["name"] for row in rows] == store.names().to_pylist()
        assert [row["label"] for row in rows] == [store.classes[label] for label in store.labels]
    assert all(len(row["predicted"]) == len(row["probabilities"]) == 5 for row in rows)
    assert all(row["probabilities"] == sorted(row["probabilities"], reverse=True) for row in rows)
    right = [row["predicted"][0] == row["label"] for row in rows]
    assert 100 * sum(right) / NUM_VAL == result["val_top1"]
    assert 100 * sum(row["label"] in row["predicted"] for row in rows) / NUM_VAL == result["val_top5"]
    assert sum(confusion["count"] for confusion in result["confusions"]) == NUM_VAL - sum(right)
    header, *lines = (line.split("\t") for line in files["per-class"].read_text().splitlines())
    assert header == ["class", "records", "top1", "top5"]
    assert [line[:2] for line in lines] == [["a", "3"], *([name, "2"] for name in "bcdef")]
    assert sum(int(count) * float(top1) for _, count, top1, _ in lines) / NUM_VAL == pytest.approx(
        result["val_top1"], abs=0.01
    )
    with Image.open(files["worst"]) as picture:
        assert picture.format == "PNG"
    assert sorted(tmp_path.iterdir()) == sorted(files.values())


def test_the_torch_backend_reads_the_folder_that_the_store_was_made_from(folder, tmp_path):
    where = {"val": "val", "file": "run/best.pt"}
    files = ("--predictions", tmp_path / "predictions", "--worst", tmp_path / "worst")
    result = evaluated(folder, "--backend", "torch", *files, **where)
    assert result["val_records"] == NUM_VAL
    assert pq.read_table(tmp_path / "predictions")["label"].to_pylist() == sorted("abcdef" * 2 + "a")


def test_a_subset_of_the_classes_is_evaluated_when_asked_for(folder, tmp_path):
    refused = run(folder, val="subset.lmdb")
    assert refused.exit_code == 1
    assert "2 of the checkpoint's 6 classes, without b, d, e, f; use --allow-subset" in refused.output
    files = ("--predictions", tmp_path / "predictions", "--per-class", tmp_path / "classes")
    evaluated(folder, "--allow-subset", *files, val="subset.lmdb")
    rows = pq.read_table(tmp_path / "predictions").to_pylist()
    assert [row["label"] for row in rows] == ["a", "a", "c", "c"]
    assert all(row["name"].startswith(row["label"]) for row in rows)
    assert [line[0] for line in (tmp_path / "classes").read_text().splitlines()[1:]] == ["a", "c"]


def test_classes_are_matched_by_name_in_any_order(folder, tmp_path):
    content = checkpoint.load(folder / "run/last.pt")
    order = [3, 1, 0, 5, 4, 2]
    weights = {name: value[order] if name.startswith("fc.") else value for name, value in content["model"].items()}
    classes = [content["classes"][label] for label in order]
    file = changed(folder, tmp_path, model=weights, classes=classes)
    assert evaluated(folder, "--no-ema", file=file)["val_top1"] == evaluated(folder, "--no-ema")["val_top1"]


def test_the_images_are_cut_as_the_checkpoint_says_unless_told_otherwise(folder):
    own = evaluated(folder)
    options = ("--val-size", "40", "--val-resize", "44", "--interpolation", "nearest", "--precision", "auto")
    assert evaluated(folder, *options) == own
    for other in (("--val-size", "64"), ("--val-resize", "60"), ("--interpolation", "linear")):
        assert evaluated(folder, *other)["val_loss"] != own["val_loss"]


def test_the_text_names_the_weights(folder):
    text = run(folder)
    assert text.stdout.splitlines()[0].startswith("plain weights: top-1 ")
    assert text.stdout.splitlines()[1].startswith("averaged weights: top-1 ")


def without_averaged_weights(folder, tmp_path):
    return changed(folder, tmp_path, ema=None)


def with_arch(arch):
    def change(folder, tmp_path):
        content = checkpoint.load(folder / "run/last.pt")
        return changed(folder, tmp_path, settings={**content["settings"], "arch": arch})

    return change


def of_format_2(folder, tmp_path):
    return changed(folder, tmp_path, format=2)


def cut_off(folder, tmp_path):
    (tmp_path / "cut.pt").write_bytes((folder / "run/last.pt").read_bytes()[:-100])
    return tmp_path / "cut.pt"


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("missing.pt", (), "missing.pt: cannot be read: No such file or directory"),
        ("result.json", (), "not a readable checkpoint"),
        (cut_off, (), "put a copy of it in its place, or give another checkpoint"),
        (of_format_2, (), "format 2, this version reads 3; give another checkpoint"),
        (with_arch("resnet19"), (), "changed.pt: arch: torchvision has no classification model 'resnet19'"),
        (with_arch("resnet34"), (), "changed.pt: its resnet34 cannot be evaluated on images of 40x40 pixels: "),
        (without_averaged_weights, ("--ema",), "changed.pt: has no averaged weights; leave out --ema"),
        ("run/last.pt", ("--val-resize", "8"), "last.pt: val_resize: 8, expected at least 40, val_size"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(folder, tmp_path, file, options, message):
    result = run(folder, *options, file=file if isinstance(file, str) else file(folder, tmp_path))
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1
    assert "resum" not in result.output
    assert "--output" not in result.output


def test_a_store_that_does_not_fit_is_refused_in_one_line(folder, tmp_path):
    for val, message in (
        ("other.lmdb", "classes that the checkpoint does not know: x"),
        ("nothing.lmdb", "nothing.lmdb"),
        ("val", "--backend dali reads stores"),
    ):
        result = run(folder, val=val)
        assert result.exit_code == 1
        assert message in result.output
        assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"--worst": "{run}/last.pt"},
            "--worst {run}/last.pt: {run}/last.pt exists; remove it or choose another file",
        ),
        ({"--predictions": "{root}/val.lmdb"}, "--predictions {root}/val.lmdb: {root}/val.lmdb exists"),
        ({"--per-class": "{new}", "--worst": "{again}"}, "--worst {again}: --per-class would write {again} too"),
        ({"--per-class": "{new}.partial", "--worst": "{new}"}, "--per-class would write {new}.partial too"),
        ({"--worst": "/nowhere/worst.png"}, "--worst /nowhere/worst.png: no folder /nowhere"),
        ({"--worst": "{root}"}, "--worst {root}: a folder, expected a file"),
    ],
)
def test_nothing_is_written_over(folder, tmp_path, files, message):
    before = (folder / "run/last.pt").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    places = {"run": folder / "run", "root": folder, "new": tmp_path / "new", "again": tmp_path / "link/new"}
    result = run(folder, *(word.format(**places) for pair in files.items() for word in pair))
    assert result.exit_code == 1
    assert message.format(**places) in result.output
    assert result.output.count("\n") == 1
    assert (folder / "run/last.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link"]


def test_a_file_that_cannot_be_written_is_not_left_half_written(folder, tmp_path):
    limit = "ulimit -f 1; exec "  # of 1024 bytes
    command = f"{sys.executable} -m dali_lmdb.evaluate {' '.join(words(folder, '--worst', tmp_path / 'worst'))}"
    done = subprocess.run(
        ["bash", "-c", limit + command], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert f"{tmp_path}/worst: cannot be written: File too large" in done.stderr
    assert "top-1" in done.stdout
    assert list(tmp_path.iterdir()) == []
