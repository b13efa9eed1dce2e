"""What augmentation does to pixels: the same in both backends, and torchvision's where it has the like."""

import numpy as np
import pytest
import torch
from damage import encoded, write_store
from pictures import KINDS, picture
from PIL import Image
from torchvision.transforms import ColorJitter, RandomErasing
from torchvision.transforms import functional as F

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import IMAGENET_MEAN, IMAGENET_STD, EvalTransform, TrainTransform
from dali_lmdb.store import open_store

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2}
TRANSFORMS = {
    "train": TrainTransform(),
    "eval": EvalTransform(),
    "eval-enlarged": EvalTransform(size=480, resize=512),
    "brightness": TrainTransform(brightness=0.8),
    "contrast": TrainTransform(contrast=0.8),
    "saturation": TrainTransform(saturation=0.9),
    "hue": TrainTransform(hue=0.5),
    "jitter": TrainTransform(size=96, **JITTER),
    "grayscale": TrainTransform(grayscale=1.0),
    "erase": TrainTransform(erase=1.0),
    "cubic": TrainTransform(interpolation="cubic"),
    "eval-cubic": EvalTransform(interpolation="cubic"),
    "lanczos": TrainTransform(interpolation="lanczos"),
    "eval-lanczos": EvalTransform(interpolation="lanczos"),
    "everything": TrainTransform(size=64, erase=0.5, **JITTER),
}


@pytest.fixture(scope="module")
def picture_path(tmp_path_factory):
    """A store of 24 pictures, as JPEG of every usual quality and chroma subsampling."""
    pictures = [picture(seed) for seed in range(24)]
    values = [
        encoded(pixels, quality=(95, 75, 85)[seed % 3], subsampling=(2, 0, 1)[seed % 3], progressive=seed % 4 == 0)
        for seed, pixels in enumerate(pictures)
    ]
    path = tmp_path_factory.mktemp("pictures") / "pictures.lmdb"
    return write_store(path, values, sizes=[pixels.shape[:2] for pixels in pictures])


@pytest.fixture(scope="module")
def photo_path(test_data, tmp_path_factory):
    """A store of photos at full size."""
    path = tmp_path_factory.mktemp("photos") / "photos.lmdb"
    convert(test_data / "photos", path, settings=ConvertSettings(on_bad="skip"))
    return path


def dali(path, **arguments):
    return DaliLoader(path, device="cpu", num_threads=1, **arguments)


def classic(path, **arguments):
    return TorchLoader(path, num_workers=0, **arguments)


def epochs_of(make, path, transform, *, epochs=1, dtype="uint8", **arguments):
    """Images and records of some epochs, each image a tensor (3, size, size), by (epoch, record)."""
    arguments = {"batch_size": 8, "last_batch": "short", "seed": 4, "on_bad": "substitute"} | arguments
    images = {}
    with make(path, transform=transform, dtype=dtype, return_index=True, **arguments) as loader:
        for epoch in range(epochs):
            for batch, _, records in loader:
                images |= {(epoch, int(r)): image.clone() for r, image in zip(records, batch, strict=True)}
        bad = {record.index for record in loader.bad_records}
    return {key: image for key, image in images.items() if key[1] not in bad}


def differences(ours, theirs):
    """Absolute differences in grey levels, float (n, pixels)."""
    assert ours.keys() == theirs.keys()
    return torch.stack([(ours[key].float() - theirs[key].float()).abs().flatten() for key in theirs])


def assert_alike(found):
    """The bounds of parity: on average less than one grey level, and 99.9 % of all values within 8."""
    assert found.mean() < 1
    assert (found <= 8).float().mean() > 0.999
    # Far inside them, in truth, so that a crop that is off by half a pixel shows.
    assert found.mean() < 0.5


# --- the two backends


@pytest.mark.parametrize("resize", ["auto", "dali"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_pictures_look_alike_in_both_backends(picture_path, name, resize):
    transform = TRANSFORMS[name]
    assert_alike(
        differences(
            epochs_of(dali, picture_path, transform, sampler=range(0, 24, 2), shuffle="full", resize=resize),
            epochs_of(classic, picture_path, transform, sampler=range(0, 24, 2), shuffle="full"),
        )
    )


@pytest.mark.parametrize("resize", ["auto", "dali"])
@pytest.mark.parametrize("name", ["train", "eval", "eval-cubic", "lanczos", "everything"])
def test_photos_look_alike_in_both_backends(photo_path, name, resize):
    chosen = {"sampler": range(0, 120, 5), "shuffle": "full"}
    assert_alike(
        differences(
            epochs_of(dali, photo_path, TRANSFORMS[name], resize=resize, **chosen),
            epochs_of(classic, photo_path, TRANSFORMS[name], **chosen),
        )
    )


@pytest.mark.parametrize("resize", ["auto", "dali"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_normalised_pictures_look_alike_too(picture_path, dtype, layout, resize):
    transform = TrainTransform(size=64, erase=0.5, **JITTER)
    arguments = {"dtype": dtype, "layout": layout}
    ours = epochs_of(dali, picture_path, transform, resize=resize, **arguments)
    theirs = epochs_of(classic, picture_path, transform, **arguments)
    scale = 255 * torch.tensor(IMAGENET_STD).reshape(3, 1, 1)
    assert_alike(
        differences({key: v.float() * scale for key, v in ours.items()}, {k: v * scale for k, v in theirs.items()})
    )


def test_pictures_of_every_scheduled_size_look_alike(picture_path):
    transform = TrainTransform(size=64, size_schedule=((1, 80), (3, 112)), **JITTER)
    ours = epochs_of(dali, picture_path, transform, epochs=4)
    theirs = epochs_of(classic, picture_path, transform, epochs=4)
    for epoch, size in enumerate((64, 80, 80, 112)):
        of_epoch = {key: image for key, image in theirs.items() if key[0] == epoch}
        assert {tuple(image.shape) for image in of_epoch.values()} == {(3, size, size)}
        assert_alike(differences({key: ours[key] for key in of_epoch}, of_epoch))


def test_pictures_of_every_kind_of_file_look_alike(tmp_path):
    image = Image.fromarray(picture(3))
    values = [encode(image) for encode in KINDS.values()]
    path = write_store(tmp_path / "x.lmdb", values, sizes=[(image.height, image.width)] * len(values))
    for transform in (TrainTransform(size=96), EvalTransform(size=96, resize=112)):
        ours, theirs = (epochs_of(make, path, transform) for make in (dali, classic))
        assert len(theirs) == len(KINDS)
        for (_, record), found in zip(theirs, differences(ours, theirs), strict=True):
            assert found.mean() < 0.5, list(KINDS)[record]
            # Beyond a shrunk crop's edge DALI repeats the last pixel and Pillow has none.
            assert (found <= 8).float().mean() > 0.999, list(KINDS)[record]


def test_sixteen_bits_of_grey_are_clipped_in_both_backends(tmp_path):
    pixels = np.asarray(Image.fromarray(picture(3)).convert("L")).astype(np.uint16) * 2
    path = write_store(tmp_path / "x.lmdb", [encoded(pixels, "PNG")], sizes=[pixels.shape])
    transform = EvalTransform(size=96, resize=112)
    ours, theirs = (epochs_of(make, path, transform) for make in (dali, classic))
    assert_alike(differences(ours, theirs))
    clipped = np.minimum(pixels, 255).astype(np.uint8)
    path = write_store(tmp_path / "y.lmdb", [encoded(clipped, "PNG")], sizes=[pixels.shape])
    assert_alike(differences(ours, epochs_of(classic, path, transform)))


@pytest.fixture(scope="module")
def odd_path(test_data, tmp_path_factory):
    """A store of the odd files that both backends decode."""
    root = tmp_path_factory.mktemp("odd")
    header, *rows = [
        line.split("\t") for line in (test_data / "odd-images" / "MANIFEST.tsv").read_text().splitlines()
    ]
    (root / "images" / "odd").mkdir(parents=True)
    for row in rows:
        columns = dict(zip(header, row, strict=True))
        if columns["pillow"] == columns["dali_cpu"] == "ok":
            raw = (test_data / "odd-images" / columns["file"]).read_bytes()
            (root / "images" / "odd" / f"{columns['file']}.jpg").write_bytes(raw)
    # A few of more pixels would only take long.
    convert(root / "images", root / "odd.lmdb", settings=ConvertSettings(on_bad="skip", max_pixels=1_500_000))
    return root / "odd.lmdb"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", ["train", "eval", "jitter"])
def test_odd_files_look_alike(odd_path, name):
    ours, theirs = (epochs_of(make, odd_path, TRANSFORMS[name]) for make in (dali, classic))
    assert len(theirs) > 140
    found = differences(ours, theirs)
    assert_alike(found)
    with open_store(odd_path) as store:
        names = [store.name(record) for _, record in theirs]
    assert [name for name, image in zip(names, found, strict=True) if image.mean() >= 1] == []


def test_the_nearest_pixel_is_the_same_unless_two_are_equally_near(tmp_path):
    """On the border of two pixels DALI takes the one, Pillow the other: rounding in float32 and float64."""
    pictures = [picture(seed) for seed in range(24)]
    values = [encoded(pixels, "PNG") for pixels in pictures]
    path = write_store(tmp_path / "x.lmdb", values, sizes=[pixels.shape[:2] for pixels in pictures])
    transform = TrainTransform(size=96, interpolation="nearest", flip=0.0)
    ours, theirs = (epochs_of(make, path, transform) for make in (dali, classic))
    num_ties = 0
    for key, shape in zip(theirs, planned(path, transform, theirs).shapes, strict=True):
        # Output pixel i is taken at (i + 1/2) * length / 96.
        rows, columns = ((2 * np.arange(96) + 1) * length % (2 * 96) == 0 for length in shape)
        is_tie = torch.from_numpy(rows[:, None] | columns[None, :])
        assert torch.equal(ours[key][:, ~is_tie], theirs[key][:, ~is_tie])
        num_ties += is_tie.sum()
    assert 0 < num_ties < 24 * 96 * 96 / 4


# --- whole images and windows


@pytest.mark.parametrize("name", TRANSFORMS)
def test_windows_cut_out_of_whole_pictures_are_those_decoded_alone(picture_path, name):
    whole, windows = (
        epochs_of(dali, picture_path, TRANSFORMS[name], epochs=2, decode=decode) for decode in ("image", "window")
    )
    assert len(whole) == len(windows) == 48
    assert all(torch.equal(whole[key], windows[key]) for key in windows)


@pytest.mark.parametrize("name", ["train", "eval", "everything"])
def test_windows_cut_out_of_whole_photos_are_those_decoded_alone(photo_path, name):
    whole, windows = (
        epochs_of(dali, photo_path, TRANSFORMS[name], decode=decode, dtype="float32")
        for decode in ("image", "window")
    )
    assert whole.keys() == windows.keys()
    assert len(whole) > 100
    assert all(torch.equal(whole[key], windows[key]) for key in windows)


# --- torchvision's functions


@pytest.fixture(scope="module")
def plain(picture_path):
    """Crops and flips alone; what is added to them changes neither."""
    return epochs_of(dali, picture_path, TrainTransform(size=64))


def planned(path, transform, keys):
    """The augmentation of (epoch, record) pairs of one epoch, row by row."""
    with open_store(path) as store:
        records = np.array([record for _, record in keys])
        sizes = store.gather("height", records), store.gather("width", records)
        return transform.augment(records, *sizes, seed=4, epoch=0)


@pytest.mark.parametrize("make", [dali, classic])
@pytest.mark.parametrize("name", ["brightness", "saturation"])
def test_brightness_and_saturation_are_torchvisions(picture_path, plain, make, name):
    transform = TrainTransform(size=64, **{name: 0.8})
    images = epochs_of(make, picture_path, transform)
    factors = getattr(planned(picture_path, transform, plain), name)
    adjust = {"brightness": F.adjust_brightness, "saturation": F.adjust_saturation}[name]
    expected = {key: adjust(plain[key], float(factor)) for key, factor in zip(plain, factors, strict=True)}
    assert_alike_to_torchvision(images, expected)


@pytest.mark.parametrize("make", [dali, classic])
def test_grayscale_is_torchvisions(picture_path, plain, make):
    images = epochs_of(make, picture_path, TrainTransform(size=64, grayscale=1.0))
    expected = {key: F.rgb_to_grayscale(image, num_output_channels=3) for key, image in plain.items()}
    assert_alike_to_torchvision(images, expected)
    for image in images.values():
        assert (image.amax(dim=0) - image.amin(dim=0)).max() <= 1


@pytest.mark.parametrize("make", [dali, classic])
def test_contrast_is_about_mid_grey(picture_path, plain, make):
    transform = TrainTransform(size=64, contrast=0.8)
    images = epochs_of(make, picture_path, transform)
    factors = planned(picture_path, transform, plain).contrast
    expected = {
        key: (128 + float(factor) * (plain[key].float() - 128)).clamp(0, 255)
        for key, factor in zip(plain, factors, strict=True)
    }
    assert_alike_to_torchvision(images, expected)


@pytest.mark.parametrize("make", [dali, classic])
def test_hue_keeps_the_brightness_and_turns_the_colours(picture_path, plain, make):
    images = epochs_of(make, picture_path, TrainTransform(size=64, hue=0.5))
    luma = torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)
    for key, image in images.items():
        unclipped = (image.amin(dim=0) > 0) & (image.amax(dim=0) < 255)
        change = ((image.float() - plain[key].float()) * luma).sum(dim=0)[unclipped]
        assert change.abs().mean() < 1
    assert differences(images, plain).mean() > 10


def assert_alike_to_torchvision(images, expected):
    found = differences(images, expected)
    # Both backends' crops may differ by one grey level, which factors up to 1.8 multiply; torchvision truncates.
    assert found.mean() < 1
    assert (found <= 8).float().mean() > 0.999


MEAN_GREYS = torch.tensor([124.0, 116.0, 104.0])  # 255 x IMAGENET_MEAN, rounded
MEAN_COLORS = {
    "uint8": MEAN_GREYS,
    "float32": (MEAN_GREYS / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD),
}
MEAN_COLORS["float16"] = MEAN_COLORS["float32"].half()


def erased_windows(path, transform, keys):
    """The (top, left, height, width) in the output of each image's erased rectangle, by (epoch, record)."""
    plans = planned(path, transform, keys)
    windows = np.concatenate([plans.erase_anchor, plans.erase_shape], axis=1).astype(int)
    flipped = plans.mirror == 1  # planned for the image before its flip
    windows[flipped, 1] = transform.size - windows[flipped, 1] - windows[flipped, 3]
    return dict(zip(keys, windows.tolist(), strict=True))


@pytest.mark.parametrize("make", [dali, classic])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", MEAN_COLORS)
def test_erasing_is_torchvisions_with_the_mean_colour(picture_path, make, dtype, layout):
    transform, arguments = TrainTransform(size=64, erase=0.7), {"dtype": dtype, "layout": layout}
    plain = epochs_of(make, picture_path, TrainTransform(size=64), **arguments)
    images = epochs_of(make, picture_path, transform, **arguments)
    windows = erased_windows(picture_path, transform, list(plain))
    for key, window in windows.items():
        expected = F.erase(plain[key], *window, MEAN_COLORS[dtype].to(plain[key].dtype).reshape(3, 1, 1))
        assert torch.allclose(images[key].float(), expected.float(), rtol=2e-3, atol=1e-6)
        untouched = F.erase(images[key], *window, torch.zeros(3, 1, 1))
        assert torch.equal(untouched, F.erase(plain[key], *window, torch.zeros(3, 1, 1)))
    assert 8 < sum(height > 0 for _, _, height, _ in windows.values()) < 24


@pytest.mark.parametrize("dtype", MEAN_COLORS)
def test_both_backends_erase_the_same_pixels_with_the_same_value(picture_path, dtype):
    transform = TrainTransform(size=64, erase=1.0)
    ours, theirs = (epochs_of(make, picture_path, transform, dtype=dtype) for make in (dali, classic))
    for key, (top, left, height, width) in erased_windows(picture_path, transform, list(theirs)).items():
        erased = [image[key][:, top : top + height, left : left + width] for image in (ours, theirs)]
        assert erased[0].numel() > 0
        assert torch.allclose(*erased, rtol=2e-3 if dtype == "float16" else 1e-5, atol=1e-6)


# --- distributions, measured in pixels

DRAWS_EPOCHS = 15
NUM_GREYS = 40


@pytest.fixture(scope="module")
def grey_path(tmp_path_factory):
    """A store of 40 images of one grey, 100."""
    value = encoded(np.full((32, 32, 3), 100, np.uint8))
    path = tmp_path_factory.mktemp("grey") / "grey.lmdb"
    return write_store(path, [value] * NUM_GREYS, sizes=[(32, 32)] * NUM_GREYS)


def ks_distance(ours, theirs):
    """Largest distance between the two empirical distribution functions."""
    every = np.sort(np.concatenate([ours, theirs]))
    shares = [np.searchsorted(np.sort(part), every, side="right") / len(part) for part in (ours, theirs)]
    return np.abs(shares[0] - shares[1]).max()


# Two-sample Kolmogorov-Smirnov, one false alarm in 10,000.
KS_LIMIT = 2.23 * np.sqrt(2 / (DRAWS_EPOCHS * NUM_GREYS))


@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_factors_seen_in_pixels_are_distributed_as_color_jitters(grey_path, name):
    images = epochs_of(dali, grey_path, TrainTransform(size=8, **{name: 0.6}), epochs=DRAWS_EPOCHS, batch_size=40)
    grey = torch.stack(list(images.values())).float().mean(dim=(1, 2, 3)).numpy()
    ours = grey / 100 if name == "brightness" else (grey - 128) / (100 - 128)
    jitter = ColorJitter(**{name: 0.6})
    torch.manual_seed(0)
    place = ("brightness", "contrast").index(name) + 1
    drawn = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)[place]
        for _ in range(len(ours))
    ]
    step = 1 / (100 if name == "brightness" else 28)  # of a grey level; pixels hold no less
    assert ks_distance(np.round(ours / step), np.round(np.array(drawn) / step)) < KS_LIMIT
    assert ours.min() < 0.4 + 0.05 + step
    assert ours.max() > 1.6 - 0.05 - step


def test_windows_seen_in_pixels_are_distributed_as_random_erasings(grey_path):
    size = 32
    images = epochs_of(dali, grey_path, TrainTransform(size=size, erase=1.0), epochs=DRAWS_EPOCHS, batch_size=40)
    erased = torch.stack(list(images.values()))[:, 0] != 100
    torch.manual_seed(0)
    windows = [
        RandomErasing.get_params(torch.empty(3, size, size), (0.02, 0.33), (0.3, 3.3), [0])
        for _ in range(len(erased))
    ]
    drawn = torch.zeros(len(windows), size, size, dtype=torch.bool)
    for image, (top, left, height, width, _) in zip(drawn, windows, strict=True):
        image[top : top + height, left : left + width] = True
    measures = {
        "height": lambda mask: mask.any(dim=2).sum(dim=1),
        "width": lambda mask: mask.any(dim=1).sum(dim=1),
        "area": lambda mask: mask.sum(dim=(1, 2)),
        "top": lambda mask: mask.any(dim=2).int().argmax(dim=1),
        "left": lambda mask: mask.any(dim=1).int().argmax(dim=1),
    }
    for name, measure in measures.items():
        assert ks_distance(measure(erased).numpy(), measure(drawn).numpy()) < KS_LIMIT, name
