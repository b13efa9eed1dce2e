"""``info`` with ``--stats``, ``--plot`` and ``--against``."""

import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from image_sets import make_image_folder, save_damaged, save_noise
from PIL import Image
from test_inspect import write_store

from dali_lmdb.cli import main
from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.errors import RecordError
from dali_lmdb.inspect.pixels import pixel_statistics
from dali_lmdb.inspect.shared import shared_images


def run(*arguments):
    return CliRunner().invoke(main, ["info", *map(str, arguments)])


# --stats


def test_statistics_are_those_of_the_pixels_that_evaluation_shows(noise_path):
    from dali_lmdb import EvalTransform, TorchLoader

    found = pixel_statistics(noise_path)
    with TorchLoader(
        noise_path, transform=EvalTransform(size=224, resize=256), batch_size=20, dtype="uint8", num_workers=0
    ) as loader:
        pixels = np.concatenate([np.asarray(images) for images, _ in loader]) / 255
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 2, 3)), atol=1e-9)
    np.testing.assert_allclose(found.std, pixels.std(axis=(0, 2, 3)), atol=1e-9)
    assert (found.records, found.undecodable, found.mean_error) == (20, 0, (0, 0, 0))


def test_channels_are_red_green_blue_in_0_to_1(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for number, red in enumerate((0, 255)):
        Image.new("RGB", (300, 300), (red, 51, 0)).save(tmp_path / "images" / "a" / f"{number}.png")
    convert(tmp_path / "images", tmp_path / "x.lmdb")
    found = pixel_statistics(tmp_path / "x.lmdb")
    np.testing.assert_allclose([found.mean, found.std], [(0.5, 0.2, 0), (0.5, 0, 0)], atol=1e-7)


def test_the_middle_of_a_very_long_image_counts(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    long = Image.new("RGB", (60_000, 1), (255, 0, 0))
    long.paste((0, 51, 0), (29_990, 0, 30_010, 1))
    long.save(tmp_path / "images" / "a" / "wide.png")
    long.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "images" / "a" / "high.png")
    convert(tmp_path / "images", tmp_path / "x.lmdb")
    found = pixel_statistics(tmp_path / "x.lmdb")
    assert (found.records, found.undecodable) == (2, 0)
    np.testing.assert_allclose([found.mean, found.std], [(0, 0.2, 0), (0, 0, 0)], atol=1e-7)


def test_a_sample_is_the_same_each_time_and_says_how_far_off_it_may_be(noise_path, store_path):
    found = pixel_statistics(store_path, num_records=8)
    assert found == pixel_statistics(store_path, num_records=8)
    assert found.records == 8
    exact = pixel_statistics(store_path).mean[0]
    assert 0 < abs(found.mean[0] - exact) < 3 * found.mean_error[0]


def test_records_that_cannot_be_decoded_are_counted_and_left_out(tmp_path):
    make_image_folder(tmp_path / "images", num_records=3)
    convert(tmp_path / "images", tmp_path / "good.lmdb")
    save_damaged(tmp_path / "images" / "ant" / "x.png")
    convert(tmp_path / "images", tmp_path / "x.lmdb")
    found = pixel_statistics(tmp_path / "x.lmdb")
    assert (found.records, found.undecodable) == (3, 1)
    assert found.mean == pixel_statistics(tmp_path / "good.lmdb").mean
    result = run(tmp_path / "x.lmdb", "--stats")
    assert result.exit_code == 0
    assert "3 records, shorter side resized to 256, centre of 224 x 224; 1 more cannot be decoded" in result.stdout


@pytest.mark.parametrize("names", [[], ["a", "b"]])
def test_statistics_of_nothing_are_refused(tmp_path, names):
    with pytest.raises(RecordError, match=f"none of {len(names)} records can be decoded"):
        pixel_statistics(write_store(tmp_path / "x.lmdb", names))


# --against


@pytest.fixture
def leak(images, tmp_path):
    """Two stores; the second has two images of the first under other names, and one re-encoded."""
    convert(images, tmp_path / "train.lmdb")
    other = tmp_path / "other"
    (other / "bee").mkdir(parents=True)
    (images / "ant" / "001.jpg").rename(other / "bee" / "b.jpg")
    (images / "cat" / "020.jpg").rename(other / "bee" / "a.jpg")
    Image.open(images / "ant" / "002.jpg").save(other / "bee" / "again.jpg", quality=50)
    save_noise(other / "bee" / "new.jpg", seed=1)
    convert(other, tmp_path / "val.lmdb")
    return tmp_path / "val.lmdb", tmp_path / "train.lmdb"


def test_images_in_both_stores_are_listed_by_name_with_exit_code_1(leak):
    result = run(*leak[:1], "--against", leak[1])
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-3:] == [
        f"{leak[1]}: 2 images of {leak[0]} are in it, too (same bytes):",
        "bee/a.jpg is cat/020.jpg there",
        "bee/b.jpg is ant/001.jpg there",
    ]


def test_stores_without_a_common_image_have_exit_code_0(store_path, noise_path):
    result = run(store_path, "--against", noise_path, "--json")
    assert result.exit_code == 0
    shared = {"store": str(store_path), "other": str(noise_path), "images": [], "compared": True, "changed": 0}
    assert json.loads(result.stdout)["shared"] == shared


def test_images_whose_bytes_a_conversion_changed_are_mentioned(store_path, image_folder, tmp_path):
    convert(image_folder, tmp_path / "x.lmdb", settings=ConvertSettings(resize=8))
    result = run(store_path, "--against", tmp_path / "x.lmdb")
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()[-2:]
    assert first == f"{tmp_path}/x.lmdb: no image of {store_path} is in it"
    assert second.startswith("note: 24 records of the two were re-encoded or resized; copies of their originals")


def test_shards_are_searched_like_one_store(image_folder, store_path, tmp_path):
    convert(image_folder, tmp_path / "x.lmdb", shards=3)
    found = shared_images(tmp_path / "x.lmdb", store_path)
    assert [image.name for image in found.images] == [image.other_name for image in found.images]
    assert len(found.images) == 24


def test_a_checksum_that_agrees_by_chance_is_no_shared_image(tmp_path):
    stores = [
        write_store(tmp_path / name, ["a/x", "a/y"], values=values, crc32=np.array([7, 8], np.uint32))
        for name, values in (("p.lmdb", [b"one", b"same"]), ("q.lmdb", [b"two", b"same"]))
    ]
    assert shared_images(*stores).images == [("a/y", "a/y")]


def test_a_store_without_records_shares_nothing(store_path, tmp_path):
    empty = write_store(tmp_path / "empty.lmdb", [])
    assert [*shared_images(empty, store_path).images, *shared_images(store_path, empty).images] == []


def test_so_many_that_it_is_no_chance_are_not_compared(monkeypatch, image_folder, store_path, tmp_path):
    monkeypatch.setattr("dali_lmdb.inspect.shared.MOST_COMPARED", 23)
    monkeypatch.setattr("dali_lmdb.inspect.commands._LISTED", 5)
    result = run(store_path, "--against", store_path)
    *_, head, _, _, _, _, _, more = result.stdout.splitlines()
    assert (result.exit_code, more) == (1, "19 more, listed with --json")
    assert head.endswith("24 images of " + str(store_path) + " are in it, too (same checksums and lengths):")


# --plot


def unbalanced(path, num_classes, *, name="class {}, the name of which is longer than others", **columns):
    labels = np.minimum(np.random.default_rng(0).exponential(num_classes / 4, 2000), num_classes - 1)
    sides = np.random.default_rng(1).lognormal(6, 0.4, (2, 2000)).astype(np.int32)
    sizes = {"label": labels.astype(np.int32), "height": sides[0], "width": sides[1], **columns}
    classes = [name.format(number) for number in range(num_classes)]
    return write_store(
        path, ["x.jpg"] * 2000, values=[b"x" * int(side) for side in sides[0]], classes=classes, **sizes
    )


@pytest.mark.parametrize("num_classes", [1, 10, 40, 41, 1000])
def test_nothing_in_the_picture_is_cut_off(tmp_path, num_classes):
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    store = unbalanced(tmp_path / "x.lmdb", num_classes)
    assert run(store, "--plot", tmp_path / "x.png").exit_code == 0
    with Image.open(tmp_path / "x.png") as picture:
        opacity = np.asarray(picture.getchannel("A"))
    assert opacity.any()
    assert not any(edge.any() for edge in (opacity[:2], opacity[-2:], opacity[:, :2], opacity[:, -2:]))


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"name": "$x_{}$ \n \x1b[1m \u65e5\u672c"},
        {"height": np.zeros(2000, np.int32)},
        {"height": np.full(2000, 5, np.int32), "width": np.full(2000, 7, np.int32)},
        {"width": np.geomspace(1, 100_000, 2000).astype(np.int32)},
    ],
    ids=["usual", "odd names", "no sizes", "one size", "wide"],
)
def test_every_store_can_be_drawn(tmp_path, columns):
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    result = run(unbalanced(tmp_path / "x.lmdb", 3, **columns), "--plot", tmp_path / "x.png")
    assert (result.exit_code, result.stderr) == (0, "")
    with Image.open(tmp_path / "x.png") as picture:
        assert min(picture.size) > 500
    assert {path.name for path in tmp_path.iterdir()} == {"x.lmdb", "x.png"}


def test_a_store_without_records_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    for number, classes in enumerate(([], ["a", "b"])):
        store = write_store(tmp_path / f"{number}.lmdb", [], classes=classes)
        assert run(store, "--plot", tmp_path / "x.svg").exit_code == 0


def test_without_matplotlib_one_line_says_how_to_get_it(monkeypatch, store_path, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(store_path, "--plot", tmp_path / "x.png")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: --plot needs matplotlib: pip install 'dali-lmdb[plot]'\n"


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_decoded(store_path, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    result = run(store_path, "--stats", "--plot", tmp_path / "none" / "x.png")
    assert result.stderr == f"Error: {tmp_path}/none/x.png: its folder does not exist; create it first\n"
    (tmp_path / "x.png").mkdir()
    result = run(store_path, "--stats", "--plot", tmp_path / "x.png")
    assert result.stderr == f"Error: {tmp_path}/x.png: a folder; give a file\n"
