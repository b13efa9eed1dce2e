import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

SCRIPT = Path(__file__).parent.parent / "scripts" / "make_demo_images.py"


@pytest.fixture(scope="module")
def demo():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("make_demo_images", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def make(demo, out, **settings):
    demo.make_demo_images(
        out, demo.DemoImages(**{"train_per_class": 3, "val_per_class": 2, "classes": 2} | settings)
    )
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.jpg"))}


def test_images_lie_in_class_folders_of_two_splits(demo, tmp_path):
    assert list(make(demo, tmp_path / "out")) == [
        "train/bars/bars_0000.jpg",
        "train/bars/bars_0001.jpg",
        "train/bars/bars_0002.jpg",
        "train/checks/checks_0000.jpg",
        "train/checks/checks_0001.jpg",
        "train/checks/checks_0002.jpg",
        "val/bars/bars_0000.jpg",
        "val/bars/bars_0001.jpg",
        "val/checks/checks_0000.jpg",
        "val/checks/checks_0001.jpg",
    ]


def test_same_seed_gives_the_same_files_and_another_seed_others(demo, tmp_path):
    first = make(demo, tmp_path / "first", seed=7)
    assert make(demo, tmp_path / "again", seed=7) == first
    other = make(demo, tmp_path / "other", seed=8)
    assert other.keys() == first.keys()
    assert not set(other.values()) & set(first.values())


def test_no_two_images_are_equal(demo, tmp_path):
    files = make(demo, tmp_path / "out")
    assert len(set(files.values())) == len(files)


def test_images_have_the_pixels_and_bytes_of_photos(demo):
    jpegs = [demo.demo_jpeg(i % 4, np.random.default_rng(i), num_classes=4) for i in range(24)]
    assert 90_000 < np.mean([len(jpeg) for jpeg in jpegs]) < 130_000
    sizes = {Image.open(io.BytesIO(jpeg)).size for jpeg in jpegs}
    assert (500, 375) in sizes
    assert len(sizes) > 2


def test_small_crops_still_tell_the_class(demo):
    """A nearest-mean classifier on the colour of one random twelfth of an image is far above chance."""

    def crop_colours(label, seeds):
        colours = []
        for seed in seeds:
            generator = np.random.default_rng((label, seed))
            image = Image.open(io.BytesIO(demo.demo_jpeg(label, generator, num_classes=4)))
            y, x = generator.integers(image.height - 110), generator.integers(image.width - 140)
            pixels = np.asarray(image.crop((x, y, x + 140, y + 110)), dtype=np.float64)
            colours.append(pixels.mean(axis=(0, 1)) - pixels.mean())
        return np.array(colours)

    means = np.array([crop_colours(label, range(12)).mean(axis=0) for label in range(4)])
    unseen = np.array([crop_colours(label, range(12, 24)) for label in range(4)])  # (label, image, RGB)
    nearest = np.linalg.norm(unseen[:, :, None] - means, axis=-1).argmin(axis=-1)
    assert (nearest == np.arange(4)[:, None]).mean() > 0.6  # chance is 0.25


def test_every_pattern_covers_a_fair_share_of_the_plane(demo):
    v, u = np.mgrid[:4:200j, :4:200j].astype(np.float32)
    shares = {name: pattern(u, v).mean() for name, pattern in demo.PATTERNS.items()}
    assert {name: share for name, share in shares.items() if not 0.1 < share < 0.6} == {}


def test_existing_folder_is_refused_and_left_alone(demo, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    result = CliRunner().invoke(demo.main, [str(tmp_path / "mine")])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {tmp_path / 'mine'} exists already; ")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


def test_interrupted_run_leaves_nothing_behind(demo, tmp_path, monkeypatch):
    def interrupt(label, generator, *, num_classes):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demo_jpeg", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(demo, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings",
    [{"classes": 1}, {"classes": 99}, {"train_per_class": 0}, {"val_per_class": 0}, {"seed": -1}],
    ids=str,
)
def test_impossible_settings_are_refused(demo, settings):
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        demo.DemoImages(**settings)
    option, value = next(iter(settings.items()))
    result = CliRunner().invoke(demo.main, ["out", f"--{option.replace('_', '-')}", str(value)])
    assert result.exit_code == 2


def test_command_says_what_it_made(demo, tmp_path):
    arguments = [str(tmp_path / "out"), "--classes", "2", "--train-per-class", "2", "--val-per-class", "1"]
    result = CliRunner().invoke(demo.main, arguments)
    assert result.exit_code == 0
    assert "6 images in 2 classes" in result.output
