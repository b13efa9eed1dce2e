"""``dali-lmdb parity``: it finds planted faults and names them, and finds none in what the loaders deliver."""

import io
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from damage import DAMAGE, encoded, noise_image, write_store
from pictures import KINDS, picture
from PIL import Image

from dali_lmdb import EvalTransform, TrainTransform
from dali_lmdb.cli import main
from dali_lmdb.convert import convert
from dali_lmdb.evaluate.__main__ import main as evaluate
from dali_lmdb.store import open_store
from dali_lmdb.train import TrainSettings, checkpoint
from dali_lmdb.train.models import build_model
from dali_lmdb.view.causes import causes, resemblance
from dali_lmdb.view.delivery import deliver, way_of
from dali_lmdb.view.parity import measure_parity
from dali_lmdb.view.predictions import Predictor

TRANSFORMS = {
    "train": TrainTransform(size=96, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, erase=0.5),
    "eval": EvalTransform(size=96, resize=110),
}
TOLERANCE = 1.0
FAULTS = {
    "flipped": lambda image: image[:, ::-1],
    "shifted by 1 pixel right": lambda image: np.roll(image, 1, axis=1),
    "shifted by 1 pixel up": lambda image: np.roll(image, -1, axis=0),
    "red and blue swapped": lambda image: image[..., ::-1],
    "turned left": lambda image: np.rot90(image),
    "turned right": lambda image: np.rot90(image, 3),
}


@pytest.fixture(scope="module")
def kinds_path(tmp_path_factory):
    """A store of one picture of each kind of file, in classes of 1, 3 and the other 9; read-only."""
    root = tmp_path_factory.mktemp("kinds")
    for number, (kind, encode) in enumerate(KINDS.items()):
        path = root / "images" / ("a" if number < 1 else "b" if number < 4 else "c") / f"{kind}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(Image.fromarray(picture(number))))
    convert(root / "images", root / "kinds.lmdb")
    return root / "kinds.lmdb"


def images(store, way, *, transform, records=None, workers=1):
    records = list(range(len(store))) if records is None else records
    return deliver(store, records, way_of(way), transform=transform, seed=3, epoch=1, workers=workers)


def run(store, *options):
    return CliRunner().invoke(main, ["parity", str(store), "--workers", "1", *map(str, options)])


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("way", ["dali:cpu", "dali:cpu,resize=dali"])
def test_the_loaders_give_the_same_images(kinds_path, kind, way):
    with open_store(kinds_path) as store:
        arguments = {"transform": TRANSFORMS[kind]}
        parity = measure_parity(images(store, "torch", workers=0, **arguments), images(store, way, **arguments))
    assert sorted(parity.records.tolist()) == list(range(len(KINDS)))
    assert parity.num_beyond(TOLERANCE) == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_in_one_image_is_found_and_named(kinds_path, fault):
    def faulty(delivered):
        for record, image in delivered:
            yield record, FAULTS[fault](image) if record == 5 else image

    with open_store(kinds_path) as store:
        arguments = {"transform": TRANSFORMS["train"]}
        left = images(store, "torch", workers=0, **arguments)
        parity = measure_parity(left, faulty(images(store, "dali:cpu", **arguments)))
    assert parity.num_beyond(TOLERANCE) == 1
    worst = parity.worst[0]
    assert (worst.record, worst.mean) == (5, parity.means.max())
    assert resemblance(worst.left, worst.right) == fault
    assert parity.mean == pytest.approx(parity.means.mean())
    assert parity.maxima.max() == np.flatnonzero(parity.histogram).max() == worst.difference.max()


def test_figures_are_those_of_the_pixels():
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 10, np.uint8)
    dotted = black.copy()
    dotted[0, 0, 0] = 255
    parity = measure_parity([(7, black), (1, grey), (4, black)], [(4, dotted), (7, black), (1, black)])
    assert dict(zip(parity.records.tolist(), parity.means.tolist(), strict=True)) == {7: 0, 1: 10, 4: 255 / 48}
    assert dict(zip(parity.records.tolist(), parity.maxima.tolist(), strict=True)) == {7: 0, 1: 10, 4: 255}
    assert {level: parity.histogram[level] for level in (0, 10, 255)} == {0: 48 + 47, 10: 48, 255: 1}
    assert [worst.record for worst in parity.worst] == [1, 4]
    assert [parity.num_beyond(limit) for limit in (0, 5.5, 10)] == [2, 1, 0]
    with pytest.raises(ValueError, match="record 4 and 0 more came from one side only"):
        measure_parity([(7, black), (4, black)], [(7, black)])
    with pytest.raises(ValueError, match="record 7: images of shape"):
        measure_parity([(7, black)], [(7, black[:2])])


def test_the_command_names_causes_and_draws_the_worst(kinds_path, tmp_path):
    target = tmp_path / "worst.png"
    arguments = ("--right", "dali:cpu,resize=dali", "--all", "--size", 64, "--seed", 3, "--epoch", 1)
    done = run(kinds_path, *arguments, "--json", "--plot", target)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    with open_store(kinds_path) as store:
        transform = TrainTransform(size=64)
        by_torch = dict(images(store, "torch", workers=0, transform=transform))
        by_dali = dict(images(store, "dali:cpu,resize=dali", transform=transform))
        names = [store.name(record) for record in range(len(store))]
    means = {record: np.abs(by_torch[record].astype(int) - by_dali[record]).mean() for record in by_torch}
    worst = sorted(means, key=lambda record: -means[record])[:8]
    assert [row["record"] for row in found["worst"]] == worst
    assert [row["mean"] for row in found["worst"]] == pytest.approx([means[record] for record in worst])
    assert [found[name] for name in ("task", "size", "epoch", "seed")] == ["train", 64, 1, 3]
    said = {row["name"].split("/")[1]: row["cause"] for row in found["worst"]}
    assert (said["cmyk jpeg.jpg"], said["bmp.jpg"]) == ("CMYK JPEG", "not a JPEG but BMP")
    assert [row["name"] for row in found["worst"]] == [names[record] for record in worst]

    pixels = np.asarray(Image.open(io.BytesIO(target.read_bytes())))
    margin, step = 8 + (232 - 3 * 64) // 2, 232 + 8
    left, right, difference = (
        pixels[margin : margin + 192 : 3, margin + step * place : margin + step * place + 192 : 3].astype(int)
        for place in range(3)
    )
    assert (left == by_torch[worst[0]]).all()
    assert (right == by_dali[worst[0]]).all()
    apart = np.abs(left - right)
    assert (difference == 255 // apart.max() * apart).all()


def test_causes_are_those_of_the_file(kinds_path, tmp_path):
    ways = way_of("torch"), way_of("dali:cpu")
    with open_store(kinds_path) as store:
        found = {store.name(record).split("/")[1]: causes(store, record, ways) for record in range(len(store))}
    assert found["plain jpeg.jpg"] == found["progressive jpeg.jpg"] == []
    assert found["cmyk jpeg.jpg"] == ["CMYK JPEG"]
    assert found["grey jpeg.jpg"] == ["grey JPEG"]
    assert found["jpeg with exif orientation.jpg"] == ["EXIF orientation 6"]
    assert found["webp.jpg"] == ["not a JPEG but WEBP"]
    gif = encoded(picture(0), "GIF")
    with open_store(write_store(tmp_path / "x.lmdb", [gif, noise_image(1)])) as store:
        assert causes(store, 0, ways) == ["not a JPEG but GIF", "decoded by Pillow for DALI"]
        assert causes(store, 0, (way_of("torch"), way_of("torch"))) == ["not a JPEG but GIF"]


def test_the_exit_code_is_one_beyond_the_tolerance(kinds_path):
    arguments = ("--right", "dali:cpu,resize=dali", "--size", 64, "--count", 5)
    within, beyond = run(kinds_path, *arguments), run(kinds_path, *arguments, "--tolerance", 0.001)
    assert (within.exit_code, beyond.exit_code) == (0, 1)
    assert within.stdout.startswith(f"{kinds_path}: 5 records, torch and dali:cpu,resize=dali, train, 64 pixels,")
    assert within.stdout.endswith("every image is within the tolerance, a mean difference of 1\n")
    assert "images beyond the tolerance, a mean difference of 0.001: 5; decoded by one only: 0" in beyond.stdout


@pytest.mark.parametrize("bad", ["left", "right", "both"])
def test_records_that_one_cannot_decode_are_a_difference(bad):
    image, reason = np.zeros((2, 2, 3), np.uint8), "cut off"
    left = [(0, image), (1, reason if bad != "right" else image)]
    right = [(0, image), (1, reason if bad != "left" else image)]
    parity = measure_parity(left, right)
    found = {"right": parity.only_left, "left": parity.only_right, "both": parity.bad}
    assert {side: reasons for side, reasons in found.items() if reasons} == {bad: {1: reason}}
    assert parity.num_beyond(0) == (bad != "both")


def test_a_damaged_record_hides_no_other(tmp_path):
    store = write_store(tmp_path / "x.lmdb", [noise_image(0), DAMAGE["scan cut off"], noise_image(2)])
    done = run(store, "--size", 32, "--right", "dali:cpu", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["records"] == 2
    assert [row["record"] for row in found["bad"]] == [1]


def test_a_comparison_of_no_images_is_refused(tmp_path):
    store = write_store(tmp_path / "x.lmdb", [DAMAGE["scan cut off"]] * 2)
    done = run(store, "--size", 32, "--right", "dali:cpu")
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"{store}: no images to compare: none of 2 records can be decoded" in done.stderr


@pytest.fixture(scope="module")
def model_path(kinds_path, tmp_path_factory):
    """A checkpoint of random weights that predicts each class at times; the classes are in another order, and one
    more."""
    settings = TrainSettings(
        train="x", val="x", arch="resnet18", size=32, val_size=40, val_resize=44, batch_size=8
    )
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=4, size=32)
    with torch.no_grad():
        model.fc.bias -= torch.tensor([-0.497, 0.159, -0.052, 0.218])  # what it gives on average
    path = tmp_path_factory.mktemp("model") / "last.pt"
    content = {"arch": "resnet18", "settings": asdict(settings), "classes": ["c", "x", "b", "a"]}
    checkpoint.save(path, {**content, "model": model.state_dict()})
    return path


def test_top1_is_that_of_evaluate_with_either_backend(kinds_path, model_path):
    done = run(kinds_path, "--checkpoint", model_path, "--right", "dali:cpu", "--all", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["top1"]
    for side, backend in (("left", "torch"), ("right", "dali")):
        words = [model_path, "--val", kinds_path, "--allow-subset", "--device", "cpu", "--workers", 1, "--json"]
        evaluated = CliRunner().invoke(evaluate, [*map(str, words), "--backend", backend])
        assert json.loads(evaluated.stdout)["val_top1"] == pytest.approx(found[side])
    assert 0 < found["left"] < 100
    text = run(kinds_path, "--checkpoint", model_path, "--right", "torch", "--count", 5).stdout
    assert "; 0 of 5 predictions differ\n" in text
    assert "eval, 40 pixels" in text


def test_predictions_that_differ_are_counted(kinds_path, model_path):
    with open_store(kinds_path) as store:
        shown = dict(images(store, "torch", workers=0, transform=EvalTransform(size=40, resize=44)))
        same, mixed = Predictor(str(model_path), store), Predictor(str(model_path), store)
        for record, image in shown.items():
            same.add(record, image, image)
            mixed.add(record, image, shown[0])
    assert (same.top1().num_different, same.top1().left) == (0, mixed.top1().left)
    assert 0 < mixed.top1().num_different < len(KINDS)
    assert mixed.top1().left != mixed.top1().right


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--left", "pillow"), 1, "'pillow': no way of loading, expected torch, dali, dali:cpu or dali:gpu"),
        (("--left", "torch:cpu"), 1, "no way of loading"),
        (("--right", "dali:cpu,resize=best"), 1, "resize is 'best', expected"),
        (("--right", "dali,size=3"), 1, "no way of loading"),
        (("--tolerance", "nan"), 2, "nan is not a finite number"),
        (("--tolerance", "inf"), 2, "inf is not a finite number"),
        (("--checkpoint", "no/such.pt"), 1, "no/such.pt: cannot be read"),
        (("--checkpoint", "x", "--task", "train"), 2, "--checkpoint is for evaluation, which --task does not fit"),
        (("--checkpoint", "x", "--hflip", "0"), 2, "--checkpoint is for evaluation, which --hflip does not fit"),
        (("--plot", "no/such/folder/x.png"), 1, "create it first"),
    ],
)
def test_what_cannot_be_compared_is_one_line(kinds_path, options, code, says):
    done = run(kinds_path, *options)
    assert (done.exit_code, says in done.stderr) == (code, True), done.stderr
    assert done.stdout == ""
