import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomErasing, RandomResizedCrop
from torchvision.transforms import functional as F

from dali_lmdb.plan.augment import EvalTransform, TrainTransform
from dali_lmdb.plan.random import key_of, mix, uniform

DRAWS = 3000
KS_LIMIT = 2.23 * math.sqrt(2 / DRAWS)  # two-sample Kolmogorov-Smirnov, one false alarm in 10,000
IMAGE_SIZES = [(375, 500), (500, 375), (224, 224), (64, 1024), (1024, 64), (200, 290), (9, 7)]

PINNED = {
    "anchors": [[9, 40], [16, 4], [0, 469]],
    "shapes": [[348, 416], [162, 153], [64, 85]],
    "mirror": [0, 1, 0],
    "key": 15671754871817308195,
    "uniform": [0.9697972181034258, 0.10891208370981986],
}


def augment(transform, sizes, *, records=None, seed=0, epoch=0):
    heights, widths = np.array(sizes, dtype=np.int32).reshape(-1, 2).T
    records = np.arange(len(heights)) if records is None else np.asarray(records)
    return transform.augment(records, heights, widths, seed=seed, epoch=epoch)


def ks_distance(ours, theirs):
    """Largest distance between the two empirical distribution functions."""
    every = np.sort(np.concatenate([ours, theirs]))
    ours, theirs = np.sort(ours), np.sort(theirs)
    return np.abs(
        np.searchsorted(ours, every, side="right") / len(ours)
        - np.searchsorted(theirs, every, side="right") / len(theirs)
    ).max()


@pytest.mark.parametrize("size", IMAGE_SIZES, ids=str)
@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.25, 0.9), (0.5, 1.2))], ids=["default", "other"]
)
def test_crops_are_distributed_as_torchvisions(size, scale, ratio):
    found = augment(TrainTransform(scale=scale, ratio=ratio), [size] * DRAWS)
    ours = np.concatenate([found.anchors, found.shapes], axis=1)
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(DRAWS)])
    measures = {
        "top": lambda c: c[:, 0],
        "left": lambda c: c[:, 1],
        "height": lambda c: c[:, 2],
        "width": lambda c: c[:, 3],
        "area": lambda c: c[:, 2] * c[:, 3],
        "aspect": lambda c: c[:, 3] / c[:, 2],
        "middle y": lambda c: 2 * c[:, 0] + c[:, 2],
        "middle x": lambda c: 2 * c[:, 1] + c[:, 3],
        "bottom": lambda c: c[:, 0] + c[:, 2],
    }
    distances = {name: ks_distance(measure(ours), measure(theirs)) for name, measure in measures.items()}
    assert max(distances.values()) < KS_LIMIT, distances


@pytest.mark.parametrize("transform", [TrainTransform(), EvalTransform(), EvalTransform(size=32, resize=32)])
def test_windows_are_inside_the_image(transform):
    sides = [1, 2, 3, 10, 37, 224, 256, 500, 3000, 65_500]
    sizes = np.array([(height, width) for height in sides for width in sides] * 10)
    found = augment(transform, sizes)
    assert (found.anchors >= 0).all()
    assert (found.shapes >= 1).all()
    assert (found.anchors + found.shapes <= sizes).all()
    assert (found.roi_start >= 0).all()
    assert (found.roi_end <= found.shapes + 1e-2).all()
    assert (found.roi_end > found.roi_start).all()
    assert set(np.unique(found.mirror)) <= {0, 1}


def test_dtypes_and_shapes_are_what_dali_is_told():
    for transform in (TrainTransform(), EvalTransform()):
        found = augment(transform, [(30, 40)] * 5)
        for name in ("anchors", "shapes"):
            assert (getattr(found, name).dtype, getattr(found, name).shape) == (np.int32, (5, 2))
        for name in ("roi_start", "roi_end", "size", "erase_anchor", "erase_shape"):
            assert (getattr(found, name).dtype, getattr(found, name).shape) == (np.float32, (5, 2))
        for name in ("hue", "saturation", "brightness", "contrast"):
            assert (getattr(found, name).dtype, getattr(found, name).shape) == (np.float32, (5,))
        assert (found.mirror.dtype, found.mirror.shape) == (np.int32, (5,))


def test_the_region_of_interest_of_a_train_crop_is_its_window():
    found = augment(TrainTransform(), [(300, 400)] * 50)
    assert (found.roi_start == 0).all()
    assert (found.roi_end == found.shapes).all()


def test_extreme_images_get_the_central_window_within_the_aspect_limits():
    transform = TrainTransform()
    found = augment(transform, [(10, 4000)] * 20 + [(4000, 10)] * 20)
    assert {tuple(shape) for shape in found.shapes[:20].tolist()} == {(10, 13)}
    assert {tuple(anchor) for anchor in found.anchors[:20].tolist()} == {(0, (4000 - 13) // 2)}
    assert {tuple(shape) for shape in found.shapes[20:].tolist()} == {(13, 10)}
    assert {tuple(anchor) for anchor in found.anchors[20:].tolist()} == {((4000 - 13) // 2, 0)}


def test_a_crop_of_everything_is_everything():
    found = augment(TrainTransform(scale=(1, 1), ratio=(1, 1)), [(50, 50)] * 10)
    assert (found.anchors == 0).all()
    assert (found.shapes == 50).all()


EVERYTHING = TrainTransform(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1, grayscale=0.2, erase=0.5)


@pytest.mark.parametrize("transform", [TrainTransform(), EVERYTHING, EvalTransform()])
def test_many_records_at_once_are_as_one_at_a_time_in_any_order(transform):
    random = np.random.default_rng(0)
    sizes = random.integers(1, 600, (200, 2))
    records = random.permutation(10**6)[:200]
    whole = augment(transform, sizes, records=records, seed=4, epoch=9)
    for n in range(0, 200, 7):
        one = augment(transform, sizes[n : n + 1], records=records[n : n + 1], seed=4, epoch=9)
        for array, single in zip(whole, one, strict=True):
            assert np.array_equal(array[n : n + 1], single)
    backwards = augment(transform, sizes[::-1], records=records[::-1], seed=4, epoch=9)
    for array, other in zip(whole, backwards, strict=True):
        assert np.array_equal(array, other[::-1])


def test_no_records_have_no_augmentation():
    found = augment(TrainTransform(), np.empty((0, 2)))
    assert {len(array) for array in found} == {0}


def test_flips_come_with_their_probability():
    for probability in (0, 0.1, 0.5, 1):
        found = augment(TrainTransform(flip=probability), [(40, 50)] * 10_000)
        spread = math.sqrt(probability * (1 - probability) / 10_000)
        assert abs(found.mirror.mean() - probability) <= 4 * spread


def test_flips_and_crops_know_nothing_of_each_other_nor_of_the_epoch_seed_or_record():
    def draw(**key):
        found = augment(TrainTransform(), [(375, 500)] * 20_000, **key)
        return np.column_stack([found.mirror, found.anchors, found.shapes]).astype(float)

    first = draw()
    limit = 5 / math.sqrt(len(first))
    mirror = first[:, 0]
    for column in range(1, 5):
        assert abs(np.corrcoef(mirror, first[:, column])[0, 1]) < limit
    for other in (draw(epoch=1), draw(seed=1), np.roll(first, 1, axis=0)):
        for column in range(5):
            assert abs(np.corrcoef(first[:, column], other[:, column])[0, 1]) < limit
    assert abs(np.corrcoef(np.arange(len(first)), mirror)[0, 1]) < limit


def test_the_same_seed_epoch_and_record_get_the_same_again():
    once, again = (augment(TrainTransform(), [(375, 500)] * 100, seed=3, epoch=8) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        assert np.array_equal(a, b)


def test_size_and_normalisation_do_not_change_the_crop():
    small = augment(TrainTransform(size=32, mean=(0, 0, 0), std=(1, 1, 1)), [(375, 500)] * 50)
    large = augment(TrainTransform(size=224), [(375, 500)] * 50)
    assert np.array_equal(small.anchors, large.anchors)
    assert np.array_equal(small.mirror, large.mirror)


def test_the_flip_probability_does_not_change_the_crop():
    never = augment(TrainTransform(flip=0), [(375, 500)] * 50)
    always = augment(TrainTransform(flip=1), [(375, 500)] * 50)
    assert np.array_equal(never.anchors, always.anchors)


def test_what_is_added_does_not_change_the_crop_or_the_flip():
    plain, more = augment(TrainTransform(), [(375, 500)] * 50), augment(EVERYTHING, [(375, 500)] * 50)
    for name in ("anchors", "shapes", "mirror", "size"):
        assert np.array_equal(getattr(plain, name), getattr(more, name))


def test_without_colour_and_erasing_nothing_changes_colour_or_is_erased():
    for transform in (TrainTransform(), EvalTransform()):
        found = augment(transform, [(375, 500)] * 50)
        assert not transform.changes_color
        assert not transform.erases
        assert set(found.hue) | set(found.erase_shape.flat) == {0}
        assert set(found.saturation) | set(found.brightness) | set(found.contrast) == {1}


def test_colour_factors_are_uniform_in_color_jitters_ranges():
    found = augment(EVERYTHING, [(50, 60)] * DRAWS)
    coloured = found.saturation > 0
    assert abs(coloured.mean() - 0.8) < 0.03  # the others are grey
    for factors, low, high in [
        (found.brightness, 0.6, 1.4),
        (found.contrast, 0.7, 1.3),
        (found.saturation[coloured], 0.8, 1.2),
        (found.hue, -36, 36),
    ]:
        even = np.linspace(low, high, len(factors))
        assert ks_distance(factors, even) < KS_LIMIT
        assert low - 1e-5 <= factors.min()
        assert factors.max() <= high + 1e-5
    strong = augment(TrainTransform(brightness=3), [(50, 60)] * 1000)
    assert 0 <= strong.brightness.min()
    assert 3.5 < strong.brightness.max() <= 4


def test_colour_factors_know_nothing_of_each_other():
    found = augment(EVERYTHING, [(375, 500)] * 20_000)
    columns = [found.mirror, found.anchors[:, 0], found.brightness, found.contrast, found.hue, found.saturation]
    table = np.corrcoef(np.array(columns, dtype=float))
    assert np.abs(table - np.eye(len(columns))).max() < 5 / math.sqrt(20_000)


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.02, 0.33), (0.3, 3.3)), ((0.3, 0.9), (1, 4))], ids=["default", "large"]
)
def test_erased_rectangles_are_distributed_as_torchvisions(scale, ratio):
    transform = TrainTransform(size=100, erase=1, erase_scale=scale, erase_ratio=ratio)
    found = augment(transform, [(50, 60)] * DRAWS)
    ours = np.concatenate([found.erase_anchor, found.erase_shape], axis=1)
    ours = ours[ours[:, 2] > 0]
    torch.manual_seed(1)
    image = torch.zeros(3, 100, 100)
    theirs = [RandomErasing.get_params(image, scale, ratio, [0.0])[:4] for _ in range(DRAWS)]
    # Where ten tries fail, torchvision gives back the whole image, and nothing of it changes.
    theirs = np.array([window for window in theirs if window[2:] != (100, 100)])
    assert abs(len(ours) - len(theirs)) < 0.03 * DRAWS
    for column in range(4):
        assert ks_distance(ours[:, column], theirs[:, column]) < KS_LIMIT
    assert (ours[:, :2] + ours[:, 2:] <= 100).all()


def test_a_flip_does_not_change_which_pixels_of_the_output_are_erased():
    never, always = (augment(TrainTransform(flip=flip, erase=0.5), [(50, 60)] * 1000) for flip in (0, 1))
    assert np.array_equal(never.erase_shape, always.erase_shape)
    assert np.array_equal(never.erase_anchor[:, 0], always.erase_anchor[:, 0])
    erased = never.erase_shape[:, 1] > 0
    ends = never.erase_anchor[:, 1] + never.erase_shape[:, 1]
    assert np.array_equal(always.erase_anchor[erased, 1], 224 - ends[erased])
    assert not always.erase_anchor[~erased].any()


def test_the_erased_colour_is_the_rounded_mean():
    assert TrainTransform().erased_color == (124, 116, 104)
    assert TrainTransform(mean=(-1, 0.5, 2)).erased_color == (0, 128, 255)


def test_rectangles_are_erased_with_their_probability():
    for probability in (0, 0.25, 1):
        found = augment(TrainTransform(erase=probability), [(50, 60)] * 10_000)
        spread = math.sqrt(probability * (1 - probability) / 10_000)
        assert abs((found.erase_shape[:, 0] > 0).mean() - probability) <= 4 * spread + 1e-3


def test_the_size_follows_its_schedule():
    transform = TrainTransform(size=128, size_schedule=((2, 160), (5, 224)))
    sizes = [set(augment(transform, [(300, 400)] * 3, epoch=epoch).size.flat) for epoch in range(7)]
    assert sizes == [{128}, {128}, {160}, {160}, {160}, {224}, {224}]
    assert [transform.size_at(epoch) for epoch in (0, 2, 100)] == [128, 160, 224]


def test_pinned_augmentations_do_not_change():
    """A change of these is a change of every run that is resumed."""
    found = augment(
        TrainTransform(), [(375, 500), (500, 375), (64, 1024)], records=[0, 1, 1_281_166], seed=42, epoch=3
    )
    assert found.anchors.tolist() == PINNED["anchors"]
    assert found.shapes.tolist() == PINNED["shapes"]
    assert found.mirror.tolist() == PINNED["mirror"]
    assert int(key_of(1, 2)) == PINNED["key"]
    assert int(mix(np.array([1], dtype=np.uint64))[0]) == 0x910A2DEC89025CC1  # SplitMix64 from state 1
    assert uniform(key_of(0, 0), np.array([0, 1]), 0).tolist() == PINNED["uniform"]


def test_uniform_numbers_are_uniform_in_every_draw():
    for draw in (0, 1, 39, 40, 1000):
        numbers = uniform(key_of(1, 1), np.arange(20_000), draw)
        assert 0 <= numbers.min()
        assert numbers.max() < 1
        counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
        statistic = ((counts - 400) ** 2 / 400).sum()
        assert abs(statistic - 49) < 5 * math.sqrt(98)


def test_the_order_of_key_numbers_matters():
    keys = {int(key_of(a, b)) for a in range(-20, 20) for b in range(-20, 20)}
    assert len(keys) == 1600


EVAL_SIZES = [(375, 500), (500, 375), (256, 256), (257, 256), (300, 1023), (3000, 2001), (200, 150), (100, 333)]


@pytest.mark.parametrize("size", EVAL_SIZES, ids=str)
@pytest.mark.parametrize(("crop", "resize"), [(224, 256), (128, 146), (64, 64), (225, 256)])
def test_eval_windows_show_what_resize_and_center_crop_show(size, crop, resize):
    """A ramp stays a ramp under linear resizing: its values say where torchvision's crop lies in the image."""
    height, width = size
    found = augment(EvalTransform(size=crop, resize=resize), [size])
    start = (found.anchors + found.roi_start)[0].astype(float)
    end = (found.anchors + found.roi_end)[0].astype(float)
    for axis, length in enumerate(size):
        ramp = torch.arange(length, dtype=torch.float32)
        image = (ramp[:, None] if axis == 0 else ramp[None, :]).expand(height, width)[None]
        seen = F.center_crop(F.resize(image, resize, antialias=True), [crop, crop])[0]
        line = seen[:, crop // 2] if axis == 0 else seen[crop // 2]
        scale = (end[axis] - start[axis]) / crop
        expected = start[axis] + (np.arange(crop) + 0.5) * scale - 0.5
        # The image's own edge bends the ramp within the filter's reach.
        inside = (expected > 1.5 * scale + 1) & (expected < length - 2 - 1.5 * scale)
        assert inside.sum() > crop / 2
        # The filter's weights are sampled, which makes the ramp ripple about the line.
        slope = np.polyfit(expected[inside], line.numpy()[inside], 1)[0]
        assert abs(slope - 1) < 4e-4
        assert abs((line.numpy() - expected)[inside].mean()) < 0.02


@pytest.mark.parametrize("size", [*EVAL_SIZES, (1, 1), (2, 900), (65_500, 8)], ids=str)
def test_eval_windows_hold_everything_the_filter_reaches(size):
    found = augment(EvalTransform(), [size])
    anchor, shape = found.anchors[0], found.shapes[0]
    start, end = found.roi_start[0], found.roi_end[0]
    scale = (end - start) / 224
    reach = np.maximum(scale, 1)
    assert ((start >= reach) | (anchor == 0)).all()
    assert ((shape - end >= reach) | (anchor + shape == size)).all()


def test_eval_ignores_seed_and_epoch():
    a = augment(EvalTransform(), [(375, 500)] * 3, seed=1, epoch=1)
    b = augment(EvalTransform(), [(375, 500)] * 3, seed=2, epoch=5)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert (a.mirror == 0).all()


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (TrainTransform, {"size": 0}),
        (TrainTransform, {"scale": (0, 1)}),
        (TrainTransform, {"scale": (0.5, 0.1)}),
        (TrainTransform, {"ratio": (0, 1)}),
        (TrainTransform, {"ratio": (2, 1)}),
        (TrainTransform, {"flip": 1.5}),
        (TrainTransform, {"flip": -0.1}),
        (TrainTransform, {"mean": (0.5,)}),
        (TrainTransform, {"std": (0, 1, 1)}),
        (TrainTransform, {"brightness": -0.1}),
        (TrainTransform, {"hue": 0.6}),
        (TrainTransform, {"grayscale": 2}),
        (TrainTransform, {"erase": -1}),
        (TrainTransform, {"erase_scale": (0.5, 0.2)}),
        (TrainTransform, {"erase_ratio": (0, 0.2)}),
        (TrainTransform, {"interpolation": "sinc"}),
        (TrainTransform, {"size_schedule": ((5, 100), (2, 50))}),
        (TrainTransform, {"size_schedule": ((5, 0),)}),
        (EvalTransform, {"size": -1}),
        (EvalTransform, {"size": 224, "resize": 200}),
    ],
    ids=str,
)
def test_wrong_settings_are_value_errors(kind, arguments):
    with pytest.raises(ValueError, match="expected"):
        kind(**arguments)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(AttributeError):
        TrainTransform().size = 3
    with pytest.raises(TypeError):
        TrainTransform(224)
