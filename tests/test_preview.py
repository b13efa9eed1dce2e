"""``dali-lmdb preview``: the pictures are the loaders' pixels, and which records they are of."""

import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from damage import DAMAGE, noise_image, write_store
from PIL import Image

from dali_lmdb import DaliLoader, EvalTransform, TorchLoader, TrainTransform
from dali_lmdb.cli import main
from dali_lmdb.plan.order import epoch_order
from dali_lmdb.store import open_store
from dali_lmdb.view.delivery import way_of
from dali_lmdb.view.preview import preview

CELL, GAP, LINE = 232, 8, 14
AUGMENTED = TrainTransform(size=64, brightness=0.4, hue=0.2, grayscale=0.3, erase=0.8, ratio=(0.5, 2.0))
TRANSFORMS = {"train": AUGMENTED, "eval": EvalTransform(size=64, resize=80, interpolation="cubic")}


def run(store, target, *options):
    return CliRunner().invoke(main, ["preview", str(store), "-o", str(target), *map(str, options)])


def shown(picture, *, size, num_columns, num_cells):
    """The images in a grid with two lines of text a cell, at their own size: a pixel of each enlarged one."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    factor = max(1, CELL // size)
    cell = max(CELL, size)
    margin = (cell - factor * size) // 2
    for number in range(num_cells):
        top = GAP + number // num_columns * (cell + 2 * LINE + GAP) + margin
        left = GAP + number % num_columns * (cell + GAP) + margin
        area = pixels[top : top + factor * size, left : left + factor * size]
        yield area[::factor, ::factor]


def delivered(store, *, transform, backend, records=None, epoch=0, seed=0, **dali):
    """What a loader gives for an epoch's first records, or for some."""
    arguments = {"transform": transform, "batch_size": 7, "seed": seed, "dtype": "uint8", "return_index": True}
    arguments |= {"sampler": records, "last_batch": "short"}
    make = {
        "torch": lambda: TorchLoader(store, num_workers=0, **arguments),
        "dali": lambda: DaliLoader(store, device="cpu", num_threads=1, **arguments, **dali),
    }[backend]
    with make() as loader:
        loader.set_epoch(epoch)
        return {
            record: image.permute(1, 2, 0).numpy().copy()
            for images, _, numbers in loader
            for record, image in zip(numbers.tolist(), images, strict=True)
        }


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_pictures_are_the_loaders_pixels(noise_path, kind):
    records = [3, 11, 0, 7, 4, 19]
    with open_store(noise_path) as store:
        ways = [way_of("torch"), way_of("dali:cpu,resize=dali")]
        found = preview(store, records, ways=ways, transform=TRANSFORMS[kind], seed=5, epoch=2)
    assert found.missing == []
    arguments = {"transform": TRANSFORMS[kind], "records": records, "seed": 5, "epoch": 2}
    by_torch = delivered(noise_path, backend="torch", **arguments)
    by_dali = delivered(noise_path, backend="dali", resize="dali", **arguments)
    pictures = list(shown(found.picture, size=64, num_columns=4, num_cells=12))
    assert all((picture == by_torch[record]).all() for record, picture in zip(records, pictures[::2], strict=True))
    assert all((picture == by_dali[record]).all() for record, picture in zip(records, pictures[1::2], strict=True))
    assert any((by_torch[record] != by_dali[record]).any() for record in records)


def test_the_command_shows_what_training_sees_in_an_epoch(noise_path, tmp_path):
    target = tmp_path / "grid.png"
    options = ("--size", 48, "--crop-scale", 0.5, "--hflip", 1, "--color-jitter", 0.3, "--random-erase", 1)
    done = run(noise_path, target, "--backend", "torch", "--count", 6, "--epoch", 3, "--seed", 9, *options)
    assert (done.exit_code, done.stderr) == (0, "")
    transform = TrainTransform(
        size=48, scale=(0.5, 1.0), flip=1.0, brightness=0.3, contrast=0.3, saturation=0.3, erase=1.0
    )
    images = delivered(noise_path, transform=transform, backend="torch", epoch=3, seed=9)
    first = epoch_order(20, seed=9, epoch=3, shuffle="full")(np.arange(6))
    pictures = shown(target.read_bytes(), size=48, num_columns=5, num_cells=6)
    assert all((picture == images[record]).all() for record, picture in zip(first.tolist(), pictures, strict=True))
    assert list(tmp_path.iterdir()) == [target]


def test_images_larger_than_a_cell_are_whole(noise_path, tmp_path):
    done = run(noise_path, tmp_path / "grid.png", "--task", "eval", "--val-size", 300, "--record", 2)
    assert done.exit_code == 0
    images = delivered(noise_path, transform=EvalTransform(size=300, resize=343), backend="dali", records=[2])
    (picture,) = shown((tmp_path / "grid.png").read_bytes(), size=300, num_columns=5, num_cells=1)
    assert (picture == images[2]).all()


def test_only_records_of_a_class_are_shown(store_path, tmp_path):
    arguments = ("--size", 16, "--backend", "torch", "--class", "bee")
    done = run(store_path, tmp_path / "grid.png", *arguments)
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path}/grid.png: 8 records, torch\n")
    with Image.open(tmp_path / "grid.png") as picture:
        greys = {picture.getpixel((left, top)) for left in range(100, 1200, 240) for top in (100, 368)}
    assert len(greys - {(255, 255, 255)}) == 8
    assert all(8 + 10 * 8 - 2 <= grey[0] < 8 + 10 * 16 or grey[0] == 255 for grey in greys)
    refused = run(store_path, tmp_path / "grid.png", "--class", "bees")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "no class 'bees'" in refused.stderr


@pytest.fixture
def damaged(tmp_path):
    """A store whose record 1 cannot be decoded."""
    return write_store(tmp_path / "x.lmdb", [noise_image(0), DAMAGE["scan cut off"], noise_image(2)])


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_a_record_that_cannot_be_decoded_is_shown_as_its_reason(damaged, tmp_path, backend):
    target = tmp_path / "grid.png"
    done = run(damaged, target, "--size", 32, "--backend", backend, "--device", "cpu")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{damaged}: record 1 (")
    images = delivered(damaged, transform=TrainTransform(size=32), backend=backend, records=[0, 2])
    pictures = list(shown(target.read_bytes(), size=32, num_columns=3, num_cells=3))
    found = [next((r for r, image in images.items() if (image == picture).all()), None) for picture in pictures]
    assert sorted(found, key=str) == [0, 2, None]


def test_records_that_reports_name_are_shown(damaged, tmp_path):
    with open_store(damaged) as store:
        bad, good = store.name(1), store.name(2)
    lines = [
        {"store": "another", "index": 0, "name": "not/this", "cause": "x"},
        {"store": "x.lmdb", "index": 1, "name": bad, "cause": "broken"},
        {"store": "x.lmdb", "index": 1, "name": bad, "cause": "broken"},
    ]
    (tmp_path / "bad.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "x.bad.tsv").write_text(
        f"name\treason\ngone/away.jpg\tempty file\n{good}\tcut off\nnotes.txt\tleft out: no image\n"
    )
    arguments = ("--size", 32, "--backend", "torch", "--bad", tmp_path / "bad.jsonl")
    done = run(damaged, tmp_path / "grid.png", *arguments, "--bad", tmp_path / "x.bad.tsv")
    assert done.exit_code == 1
    assert done.stdout == f"{tmp_path}/grid.png: 2 records, torch\n"
    first, second = done.stderr.splitlines()
    assert first.startswith(f"{damaged}: record 1 ({bad})")
    assert second == f"gone/away.jpg: not in {damaged}: empty file"
    images = delivered(damaged, transform=TrainTransform(size=32), backend="torch", records=[2])
    pictures = list(shown((tmp_path / "grid.png").read_bytes(), size=32, num_columns=3, num_cells=3))
    assert (pictures[1] == images[2]).all()
    (tmp_path / "none.jsonl").write_text(json.dumps(lines[0]) + "\n")
    refused = run(damaged, tmp_path / "grid.png", "--bad", tmp_path / "none.jsonl")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--record", 24), 1, "no record 24, expected 0 to 23"),
        (("--record", 0, "--class", "ant"), 2, "exclude each other"),
        (("--bad", "no/such"), 1, "No such file"),
        (("--bad", __file__), 1, "expected STORE.bad.tsv of convert or a quarantine file"),
        (("--task", "eval", "--val-size", 32, "--val-resize", 16), 1, "val_resize: 16, expected at least 32"),
        (("--hflip", 2), 1, "hflip: 2.0, expected 0 to 1"),
    ],
)
def test_what_cannot_be_shown_is_one_line(store_path, tmp_path, options, code, says):
    done = run(store_path, tmp_path / "grid.png", *options)
    assert (done.exit_code, says in done.stderr) == (code, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_only_pictures_are_written_over(noise_path, tmp_path):
    arguments = ("--size", 16, "--backend", "torch", "--count", 1)
    before = noise_path.read_bytes()
    refused = run(noise_path, noise_path, *arguments)
    assert (refused.exit_code, "ends with .png" in refused.stderr) == (1, True)
    assert noise_path.read_bytes() == before
    notes = tmp_path / "notes.png"
    notes.write_text("notes")
    refused = run(noise_path, notes, *arguments)
    assert (refused.exit_code, refused.stderr.endswith("exists and is not a PNG; choose another file\n")) == (
        1,
        True,
    )
    assert notes.read_text() == "notes"
    (tmp_path / "link.png").symlink_to(noise_path)
    assert run(noise_path, tmp_path / "link.png", *arguments).exit_code == 1
    assert run(noise_path, tmp_path / "no/grid.png", *arguments).exit_code == 1
    target = tmp_path / "grid.png"
    assert [run(noise_path, target, *arguments, "--seed", seed).exit_code for seed in (1, 2)] == [0, 0]
    assert target.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "grid.png.partial").touch()
    assert run(noise_path, target, *arguments).exit_code == 1
