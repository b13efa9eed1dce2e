import copy
import gc
import io
import itertools
import json
import multiprocessing
import os
import pickle
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from image_sets import make_image_folder, record_of, save_damaged, save_grey, save_noise
from nvidia.dali import Pipeline
from PIL import Image
from samplers import EpochSampler
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as F

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.errors import DeviceError, RecordError, SourceError, StateError, StoreError
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.dataset import ImageFolderLMDB
from dali_lmdb.loaders.prefetch import Prefetcher
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import IMAGENET_MEAN, IMAGENET_STD, EvalTransform, TrainTransform
from dali_lmdb.plan.batches import Planner
from dali_lmdb.plan.order import StepPlan, epoch_order
from dali_lmdb.plan.sampling import AllRecords
from dali_lmdb.store import open_store

TRAIN = TrainTransform(size=16)
EVAL = EvalTransform(size=16, resize=18)
NUM_RECORDS = 24


def dali_on_the_cpu(data, **arguments):
    return DaliLoader(data, **{"device": "cpu", "num_threads": 1} | arguments)


def dali_on_the_gpu(data, **arguments):
    return DaliLoader(data, **{"device": "cuda", "num_threads": 2} | arguments)


def torch_here(data, **arguments):
    return TorchLoader(data, **{"num_workers": 0} | arguments)


def torch_in_workers(data, **arguments):
    return TorchLoader(data, **{"num_workers": 1} | arguments)


DALI = pytest.param(dali_on_the_cpu, id="dali")
GPU = pytest.param(dali_on_the_gpu, id="dali-gpu", marks=pytest.mark.gpu)
TORCH = pytest.param(torch_here, id="torch")
WORKERS = pytest.param(torch_in_workers, id="torch-workers")


@pytest.fixture(params=[DALI, GPU, TORCH, WORKERS])
def make(request, store_path):
    """Makes loaders of one backend over the store of grey images; they are closed at the test's end."""
    made = []

    def make_loader(data=store_path, **arguments):
        loader = request.param(data, **{"transform": TRAIN, "batch_size": 4, "return_index": True} | arguments)
        made.append(loader)
        return loader

    yield make_loader
    for loader in made:
        loader.close()


@pytest.fixture(scope="module")
def labels(store_path):
    with open_store(store_path) as store:
        return store.labels.tolist()


@pytest.fixture(scope="module")
def noise_path(tmp_path_factory):
    """A store of 20 noise images, JPEG and PNG, whose every pixel differs, so crops show."""
    root = tmp_path_factory.mktemp("noise")
    for number in range(20):
        folder = root / "images" / str(number % 4)
        folder.mkdir(parents=True, exist_ok=True)
        options = {"format": "PNG"} if number % 2 else {"format": "JPEG", "quality": 95, "subsampling": 0}
        save_noise(folder / f"{number:02}.jpg", seed=number, size=(40 + number, 70 - number), **options)
    convert(root / "images", root / "noise.lmdb")
    return root / "noise.lmdb"


def greys(images, transform=TRAIN):
    """The grey level of each image of a normalised batch; checks that it is one."""
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (transform.mean, transform.std))
    pixels = (images.float().cpu() * std + mean) * 255
    assert pixels.flatten(1).std(dim=1).max() < 2
    return pixels.mean(dim=(1, 2, 3)).tolist()


def epoch_of(loader):
    """Records of one epoch, a list for each step; checks that pixels, labels and records belong together."""
    all_labels = loader.store.labels
    steps = []
    for images, labels, records in loader:
        assert [record_of(grey) for grey in greys(images, loader.planner.transform)] == records.tolist()
        assert labels.tolist() == all_labels[records.numpy()].tolist()
        assert len(images) == len(labels) == len(records)
        steps.append(records.tolist())
    return steps


def flat(steps):
    return [record for step in steps for record in step]


# --- order: every backend gives exactly what the plan says


def planned(*, epoch=0, start=0, seed=0, shuffle="full", **steps):
    plan = StepPlan(num_positions=NUM_RECORDS, **steps)
    order = epoch_order(NUM_RECORDS, seed=seed, epoch=epoch, shuffle=shuffle)
    records = []
    while (positions := plan.positions(start)) is not None:
        records.append(order(positions).tolist())
        start = plan.end_of_step(start)
    return records


@pytest.mark.parametrize("last_batch", ["drop", "pad", "short"])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 5), (2, 7), (3, 8)])
def test_ranks_see_the_planned_records_in_the_planned_steps(make, last_batch, world_size, batch_size):
    for rank in range(world_size):
        place = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "last_batch": last_batch}
        loader = make(seed=3, **place)
        expected = planned(seed=3, **place)
        assert len(loader) == len(expected)
        assert epoch_of(loader) == expected


@pytest.mark.parametrize("shuffle", ["full", "block", "none"])
def test_every_shuffle_is_followed(make, shuffle):
    loader = make(shuffle=shuffle, seed=9)
    assert epoch_of(loader) == planned(shuffle=shuffle, seed=9, batch_size=4)


def test_listed_records_take_the_place_of_all(make):
    indices = [5, 5, 23, 0, 7, 9, 11]
    assert epoch_of(make(sampler=indices, last_batch="short")) == [[5, 5, 23, 0], [7, 9, 11]]
    seen = []
    for rank in range(2):
        loader = make(sampler=indices, shuffle="full", batch_size=2, rank=rank, world_size=2, last_batch="short")
        seen += flat(epoch_of(loader))
    assert sorted(seen) == sorted(indices)


def test_weights_draw_records_and_resume_where_they_were(make):
    weights = [0.0] * 20 + [1, 2, 3, 4]
    loader = make(weights=weights, seed=4)
    whole = epoch_of(loader)
    assert len(flat(whole)) == 24
    assert set(flat(whole)) <= {20, 21, 22, 23}
    loader.set_epoch(0)
    next(iter(loader))
    resumed = make(weights=weights, seed=4, batch_size=10, last_batch="short")
    resumed.load_state_dict(loader.state_dict())
    assert flat(epoch_of(resumed)) == flat(whole)[4:]
    with pytest.raises(StateError, match="weights"):
        make(seed=4).load_state_dict(loader.state_dict())


def test_a_torch_sampler_decides_the_order(make):
    sampler = EpochSampler(24, seed=2)
    loader = make(sampler=sampler)
    epochs = [flat(epoch_of(loader)) for _ in range(2)]
    for epoch, found in enumerate(epochs):
        sampler.set_epoch(epoch)
        assert found == list(sampler)


def test_more_ranks_than_records_evaluate_every_record_once(make):
    seen = []
    for rank in (0, 5, 6, 29):
        loader = make(transform=EVAL, batch_size=2, rank=rank, world_size=30)
        steps = epoch_of(loader)
        assert len(steps) == len(loader) <= 1
        assert epoch_of(loader) == steps  # the next epoch too
        seen.append(steps)
    expected = [
        planned(shuffle="none", batch_size=2, rank=rank, world_size=30, last_batch="short")
        for rank in (0, 5, 6, 29)
    ]
    assert seen == expected


def test_iterating_again_is_the_next_epoch(make):
    loader = make()
    for epoch in range(3):
        assert loader.epoch == epoch
        assert epoch_of(loader) == planned(epoch=epoch, batch_size=4)


def test_an_epoch_can_be_set_at_any_time(make):
    loader = make()
    for epoch in (7, 0, 3, 3, 1_000_000):
        loader.set_epoch(epoch)
        assert epoch_of(loader) == planned(epoch=epoch, batch_size=4)


def test_an_epoch_below_zero_is_a_value_error(make):
    loader = make()
    with pytest.raises(ValueError, match="epoch is -1"):
        loader.set_epoch(-1)
    assert epoch_of(loader) == planned(batch_size=4)


def test_setting_each_epoch_as_usual_changes_nothing(make):
    loader = make()
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert epoch_of(loader) == planned(epoch=epoch, batch_size=4)


def test_after_an_early_break_the_next_epoch_is_whole(make):
    loader = make()
    for epoch, steps in enumerate([1, 2, 5, 3]):
        seen = [records.tolist() for _, _, records in itertools.islice(loader, steps)]
        assert seen == planned(epoch=epoch, batch_size=4)[:steps]
    assert epoch_of(loader) == planned(epoch=4, batch_size=4)


def test_after_an_exception_in_the_consumer_the_next_epoch_is_whole(make):
    loader = make()

    def consume():
        for _ in loader:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    assert epoch_of(loader) == planned(epoch=1, batch_size=4)


def test_an_iterator_that_was_not_used_takes_nothing_from_others(make):
    loader = make()
    unused = iter(loader)
    used = iter(loader)
    seen = [next(used)[2].tolist()]
    iter(loader)
    seen += [records.tolist() for _, _, records in used]
    assert seen == planned(epoch=0, batch_size=4)
    assert [records.tolist() for _, _, records in unused] == planned(epoch=1, batch_size=4)


def cut_short(iterator, *, because):
    """Check that an iterator says, every time, why its epoch ended after one step."""
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"epoch 0 was cut short at position 4 of 24: {because}"):
            next(iterator)


def test_an_iterator_says_that_a_newer_one_has_begun(make):
    loader = make()
    older = iter(loader)
    next(older)
    newer = iter(loader)
    seen = [next(newer)[2].tolist()]
    cut_short(older, because="another iterator began epoch 1")
    seen += [records.tolist() for _, _, records in newer]
    assert seen == planned(epoch=1, batch_size=4)
    assert list(newer) == []
    cut_short(older, because="another iterator began epoch 1")


def test_a_loop_is_not_cut_short_in_silence_by_a_look_at_a_batch(make):
    loader, steps = make(), []

    def look_at_a_batch_in_the_loop():
        for _, _, records in loader:
            steps.append(records.tolist())
            next(iter(loader))

    with pytest.raises(RuntimeError, match="use one iterator at a time"):
        look_at_a_batch_in_the_loop()
    assert steps == planned(batch_size=4)[:1]
    with pytest.raises(RuntimeError, match="use one iterator at a time"):
        list(zip(loader, loader, strict=True))


def test_an_iterator_says_that_the_loader_was_moved(make):
    loader = make()
    state = loader.state_dict()
    for move, because in (
        (lambda: loader.set_epoch(0), r"set_epoch\(0\) was called"),
        (lambda: loader.load_state_dict(state), "load_state_dict was called"),
    ):
        iterator = iter(loader)
        next(iterator)
        move()
        cut_short(iterator, because=because)
    assert epoch_of(loader) == planned(batch_size=4)


def test_several_loaders_read_one_store_at_once(make, store_path):
    with open_store(store_path) as store:
        loaders = [make(store, seed=0), make(store, seed=1), make(store, seed=0, transform=EVAL)]
        columns = list(zip(*(list(loader) for loader in loaders), strict=True))
    for number, (seed, shuffle) in enumerate([(0, "full"), (1, "full"), (0, "none")]):
        seen = [row[number][2].tolist() for row in columns]
        assert seen == planned(seed=seed, shuffle=shuffle, batch_size=4)


def test_the_transform_chooses_shuffle_and_last_batch(make):
    assert epoch_of(make(transform=TRAIN, batch_size=5)) == planned(batch_size=5, last_batch="drop")
    assert epoch_of(make(transform=EVAL, batch_size=5)) == planned(
        batch_size=5, last_batch="short", shuffle="none"
    )


@pytest.mark.parametrize(("last_batch", "records"), [("short", NUM_RECORDS), ("pad", 30)])
def test_a_batch_larger_than_the_data_set_holds_all_of_it(make, last_batch, records):
    steps = epoch_of(make(batch_size=30, last_batch=last_batch))
    assert [len(step) for step in steps] == [records]
    assert set(flat(steps)) == set(range(NUM_RECORDS))


def test_many_short_epochs_follow_each_other(make):
    loader = make(batch_size=24)
    for epoch in range(20):
        assert epoch_of(loader) == planned(epoch=epoch, batch_size=24)


# --- what a batch is


def test_two_tensors_by_default_and_the_records_when_asked(make):
    images, labels = next(iter(make(return_index=False)))
    assert images.shape == (4, 3, 16, 16)
    assert (labels.dtype, labels.shape) == (torch.int64, (4,))
    *_, records = next(iter(make(return_index=True)))
    assert (records.dtype, records.shape, records.device.type) == (torch.int64, (4,), "cpu")


@pytest.mark.parametrize("transform", [TRAIN, EVAL], ids=["train", "eval"])
def test_dtypes_and_layouts_are_of_the_same_pixels(make, noise_path, transform):
    def batch(**arguments):
        images, _, records = next(iter(make(noise_path, transform=transform, batch_size=6, seed=2, **arguments)))
        assert images.shape == (6, 3, 16, 16)
        return images.cpu(), records.tolist()

    pixels, records = batch(dtype="uint8")
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    assert pixels.float().std() > 10
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (pixels.float() / 255 - mean) / std
    for dtype, error in [("float32", 1e-4), ("float16", 2e-3)]:
        for layout in ("NCHW", "NHWC"):
            images, again = batch(dtype=dtype, layout=layout)
            assert again == records
            assert images.dtype == getattr(torch, dtype)
            memory = torch.channels_last if layout == "NHWC" else torch.contiguous_format
            assert images.is_contiguous(memory_format=memory)
            assert (images.float() - expected).abs().max() < error
    images, _ = batch(dtype="uint8", layout="NHWC")
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, pixels)


def test_mean_std_and_size_are_the_transforms(make):
    transform = TrainTransform(size=10, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1))
    images, _, records = next(iter(make(transform=transform)))
    assert images.shape == (4, 3, 10, 10)
    assert [record_of(grey) for grey in greys(images, transform)] == records.tolist()


def test_batches_that_are_kept_do_not_change(make):
    loader = make()
    kept = list(loader)
    for _ in range(3):
        for _ in loader:
            pass
    for images, _, records in kept:
        assert [record_of(grey) for grey in greys(images)] == records.tolist()


def images_by_record(loader, *, epoch=0):
    loader.set_epoch(epoch)
    return {
        record: image
        for images, _, records in loader
        for record, image in zip(records.tolist(), images.clone().cpu(), strict=True)
    }


def test_augmentation_depends_on_neither_batch_size_nor_rank(make, noise_path):
    whole = images_by_record(make(noise_path, batch_size=20, dtype="uint8"))
    parts = {}
    for rank in range(3):
        loader = make(noise_path, batch_size=3, rank=rank, world_size=3, last_batch="short", dtype="uint8")
        parts |= images_by_record(loader)
    assert whole.keys() == parts.keys() == set(range(20))
    assert all(torch.equal(whole[record], parts[record]) for record in whole)


def test_augmentation_changes_with_the_epoch_and_the_seed(make, noise_path):
    loader = make(noise_path, batch_size=20, dtype="uint8")
    first, second = images_by_record(loader, epoch=0), images_by_record(loader, epoch=1)
    other = images_by_record(make(noise_path, batch_size=20, dtype="uint8", seed=1))
    again = images_by_record(loader, epoch=0)
    assert not any(torch.equal(first[record], second[record]) for record in first)
    assert not any(torch.equal(first[record], other[record]) for record in first)
    assert all(torch.equal(first[record], again[record]) for record in first)


def test_evaluation_is_the_same_in_every_epoch(make, noise_path):
    loader = make(noise_path, transform=EVAL, batch_size=7, dtype="uint8")
    first, second = images_by_record(loader, epoch=0), images_by_record(loader, epoch=5)
    assert all(torch.equal(first[record], second[record]) for record in range(20))


def torchvisions(store, record, transform, *, seed=0, epoch=0):
    """What torchvision's functions make of a record, with the planned window and flip."""
    image = Image.open(io.BytesIO(store.read(record))).convert("RGB")
    size = [transform.size, transform.size]
    if isinstance(transform, EvalTransform):
        return F.pil_to_tensor(F.center_crop(F.resize(image, transform.resize), size))
    height, width = np.array([[image.height], [image.width]], dtype=np.int32)
    planned = transform.augment(np.array([record]), height, width, seed=seed, epoch=epoch)
    image = F.resized_crop(image, *planned.anchors[0].tolist(), *planned.shapes[0].tolist(), size)
    return F.pil_to_tensor(F.hflip(image) if planned.mirror[0] else image)


@pytest.mark.parametrize("transform", [TrainTransform(size=32), EvalTransform(size=32, resize=36)])
def test_pixels_are_torchvisions_for_the_planned_window_and_flip(make, noise_path, transform):
    images = images_by_record(make(noise_path, transform=transform, batch_size=10, dtype="uint8"), epoch=0)
    assert len(images) == 20
    with open_store(noise_path) as store:
        for record, found in images.items():
            difference = (found.int() - torchvisions(store, record, transform).int()).abs().float()
            # Noise resized is the worst case; a window that is off by one pixel gives 20 and more.
            assert difference.mean() < 1.5, record


@pytest.mark.parametrize("transform", [TrainTransform(), EvalTransform()], ids=["train", "eval"])
def test_photos_look_as_with_pillow_and_torchvision(make, test_data, tmp_path_factory, transform):
    path = tmp_path_factory.getbasetemp() / "photos.lmdb"
    if not path.exists():
        convert(test_data / "photos", path, settings=ConvertSettings(on_bad="skip"))
    loader = make(path, transform=transform, batch_size=24, dtype="uint8", last_batch="short", seed=1)
    differences = []
    with open_store(path) as store:
        for images, labels, records in loader:
            assert labels.tolist() == store.labels[records.numpy()].tolist()
            for image, record in zip(images.cpu(), records.tolist(), strict=True):
                if record % 3 == 0:
                    differences.append(
                        (image.int() - torchvisions(store, record, transform, seed=1).int()).abs().float()
                    )
    assert len(differences) == 40
    every = torch.stack(differences)
    assert every.mean() < 1
    assert every.flatten(1).mean(dim=1).max() < 2
    assert (every <= 8).float().mean() > 0.999


ADDED = {
    "brightness": {"brightness": 0.5},
    "contrast": {"contrast": 0.5},
    "saturation": {"saturation": 0.9},
    "hue": {"hue": 0.4},
    "grayscale": {"grayscale": 0.5},
    "erase": {"erase": 0.9},
    "all": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2, "erase": 0.25},
    "cubic": {"interpolation": "cubic"},
    "lanczos": {"interpolation": "lanczos"},
    "nearest": {"interpolation": "nearest"},
}


@pytest.mark.parametrize("backend", [DALI, GPU])
@pytest.mark.parametrize("added", ADDED)
def test_what_may_be_added_to_a_crop_looks_the_same_in_both_backends(noise_path, backend, added):
    transform = TrainTransform(size=32, **ADDED[added])
    arguments = {"transform": transform, "batch_size": 20, "return_index": True, "dtype": "uint8"}
    with backend(noise_path, **arguments) as ours, torch_here(noise_path, **arguments) as classic:
        found, expected = images_by_record(ours), images_by_record(classic)
    differences = torch.stack(
        [(found[record].int() - expected[record].int()).abs() for record in expected]
    ).float()
    assert differences.mean() < 2
    plain = images_by_record(torch_here(noise_path, **arguments | {"transform": TrainTransform(size=32)}))
    assert sum(torch.equal(plain[record], expected[record]) for record in plain) < 15  # it does something


def test_the_size_of_a_batch_follows_the_schedule(make):
    loader = make(transform=TrainTransform(size=8, size_schedule=((1, 12), (3, 20))))
    assert [next(iter(loader))[0].shape[-2:] for _ in range(4)] == [(8, 8), (12, 12), (12, 12), (20, 20)]
    loader.set_epoch(1)
    assert {images.shape for images, _, _ in loader} == {(4, 3, 12, 12)}
    assert epoch_of(loader) == planned(epoch=2, batch_size=4)


# --- resuming


def test_a_state_goes_on_with_the_next_step(make):
    for steps in (0, 1, 3, 6):
        loader = make()
        iterator = iter(loader)
        for _ in range(steps):
            next(iterator)
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = make()
        resumed.load_state_dict(state)
        assert epoch_of(resumed) == planned(batch_size=4)[steps:]
        assert epoch_of(resumed) == planned(epoch=1, batch_size=4)


def test_the_state_after_a_whole_epoch_is_the_next_epochs_beginning(make):
    loader = make()
    loader.set_epoch(4)
    list(loader)
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    assert resumed.epoch == 5
    assert epoch_of(resumed) == planned(epoch=5, batch_size=4)


def test_a_state_may_be_loaded_in_the_middle_of_another_epoch(make):
    loader = make()
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    list(iterator)
    next(iter(loader))
    loader.load_state_dict(state)
    assert epoch_of(loader) == planned(batch_size=4)[2:]


def test_a_resumed_epoch_goes_on_when_the_loop_sets_it(make):
    loader = make()
    loader.set_epoch(2)
    next(iter(loader))
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    resumed.set_epoch(resumed.epoch)
    assert epoch_of(resumed) == planned(epoch=2, batch_size=4)[1:]
    resumed.set_epoch(0)
    assert epoch_of(resumed) == planned(epoch=0, batch_size=4)


def test_resuming_at_other_sizes_sees_every_other_record_with_the_same_augmentation(make, noise_path):
    expected = images_by_record(make(noise_path, batch_size=20, dtype="uint8"), epoch=3)
    seen = {}

    def run(state, *, world_size, batch_size, steps):
        states = []
        for rank in range(world_size):
            loader = make(
                noise_path,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                last_batch="short",
                dtype="uint8",
            )
            loader.load_state_dict(state)
            for images, _, records in itertools.islice(loader, steps):
                for image, record in zip(images.cpu(), records.tolist(), strict=True):
                    assert record not in seen
                    seen[record] = image.clone()
            states.append(loader.state_dict())
        assert all(state == states[0] for state in states)
        return states[0]

    first = make(noise_path, batch_size=20)
    first.set_epoch(3)
    state = first.state_dict()
    for world_size, batch_size, steps in [(4, 1, 1), (3, 2, 1), (2, 1, 1)]:
        state = json.loads(json.dumps(run(state, world_size=world_size, batch_size=batch_size, steps=steps)))
    assert (state["epoch"], state["position"]) == (3, 12)
    run(state, world_size=1, batch_size=5, steps=100)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[record], expected[record]) for record in expected)


def test_a_rank_with_a_step_left_but_none_in_a_whole_epoch_resumes(make):
    """Of 24 records and 26 ranks, rank 13 has none; of the last 23 records it has one."""
    place = {"batch_size": 1, "rank": 13, "world_size": 26}
    loader = make(transform=EVAL, **place)
    assert len(loader) == 0
    loader.load_state_dict(loader.state_dict() | {"position": 1})
    expected = planned(**place, last_batch="short", shuffle="none", start=1)
    assert len(expected) == 1
    assert epoch_of(loader) == expected
    assert epoch_of(loader) == []


def test_states_are_small_and_of_plain_types(make):
    state = make(seed=np.int64(5)).state_dict()
    assert len(json.dumps(state)) < 500
    assert {type(value) for value in state.values()} <= {int, str}
    loader = make(seed=5)
    loader.load_state_dict(state)
    loader.set_epoch(np.int64(2))
    assert {type(value) for value in loader.state_dict().values()} <= {int, str}


def test_states_of_other_data_seeds_or_orders_are_refused_with_both_sides(make, noise_path):
    state = make(seed=1).state_dict()
    for loader, both in [
        (make(seed=2), ("1", "2")),
        (make(seed=1, shuffle="none"), ("full", "none")),
        (make(noise_path, seed=1), ("24", "20")),
    ]:
        with pytest.raises(StateError) as info:
            loader.load_state_dict(state)
        assert all(repr(side) in str(info.value) or side in str(info.value) for side in both)
        assert "\n" not in str(info.value)
        before = loader.state_dict()
        assert (before["epoch"], before["position"]) == (0, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"position": -1},
        {"position": 25},
        {"position": "3"},
        {"position": 2.5},
        {"position": None},
        {"epoch": -1},
        {"epoch": "0"},
        {"more": 1},
    ],
    ids=str,
)
def test_impossible_states_are_refused(store_path, change):
    with torch_here(store_path, transform=TRAIN, batch_size=4) as loader:
        with pytest.raises(StateError):
            loader.load_state_dict(loader.state_dict() | change)
        for state in (None, {}, [], "state", 3):
            with pytest.raises(StateError):
                loader.load_state_dict(state)


def test_states_of_one_backend_continue_in_the_other(store_path):
    with (
        dali_on_the_cpu(store_path, transform=TRAIN, batch_size=4, return_index=True) as one,
        torch_here(store_path, transform=TRAIN, batch_size=4, return_index=True) as other,
    ):
        next(iter(one))
        other.load_state_dict(one.state_dict())
        assert epoch_of(other) == planned(batch_size=4)[1:]


# --- after an exception


LOADERS_CODE = ("/dali_lmdb/loaders/", "/nvidia/dali/plugin/")


def interrupted(function, *, at_line):
    """Call a function, and interrupt it before the given line, of all the lines of loaders that it runs.

    Returns:
        Whether it ran so many.
    """
    lines = itertools.count()

    def trace(frame, event, _):
        if not any(part in frame.f_code.co_filename for part in LOADERS_CODE):
            return None
        if (
            frame.f_code is Prefetcher.close.__code__
        ):  # garbage collection may run it, and there interrupts are lost
            return None
        if event == "line" and next(lines) == at_line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_iterator_goes_on_with_the_state_wherever_it_was_interrupted(make, steps_before):
    loader = make()
    stride = 20 if isinstance(loader, TorchLoader) and loader._num_workers else 7
    for line in itertools.count(0, stride):
        loader.set_epoch(3 * line)  # not the epoch of which batches are under way
        iterator = iter(loader)
        for _ in range(steps_before):
            next(iterator)
        if not interrupted(lambda iterator=iterator: next(iterator), at_line=line):
            break
        state = loader.state_dict()
        rest = planned(epoch=state["epoch"], start=state["position"], batch_size=4)
        assert [records.tolist() for _, _, records in iterator] == rest
        assert len(rest) in (6 - steps_before, 5 - steps_before)
        assert epoch_of(loader) == planned(epoch=state["epoch"] + 1, batch_size=4)
    assert line > 20


def test_a_state_of_an_interrupted_step_resumes_in_the_loader_itself(make):
    loader = make()
    for line in (10, 20):
        loader.set_epoch(0)
        iterator = iter(loader)
        next(iterator), next(iterator)
        assert interrupted(lambda iterator=iterator: next(iterator), at_line=line)
        loader.load_state_dict(loader.state_dict())
        assert epoch_of(loader) == planned(batch_size=4)[2:]


def test_an_error_that_is_kept_keeps_no_pipeline(store_path):
    """One that waited for the collector might be collected in a forked worker, and hang there."""
    sampler = Shrinking()
    gc.collect()
    before = sum(type(thing) is Pipeline for thing in gc.get_objects())
    gc.disable()
    try:
        with dali_on_the_cpu(store_path, transform=TRAIN, batch_size=4, sampler=sampler) as loader:
            loader.set_epoch(1)
            with pytest.raises(ValueError, match="23 indices"):
                next(iter(loader))
            sampler.mended = True
            assert len(list(loader)) == 6
        del loader
        assert sum(type(thing) is Pipeline for thing in gc.get_objects()) == before
    finally:
        gc.enable()


def test_a_worker_that_dies_is_an_error_and_then_replaced(store_path):
    with torch_in_workers(store_path, transform=TRAIN, batch_size=4, return_index=True) as loader:
        iterator = iter(loader)
        seen = [next(iterator)[2].tolist()]
        (worker,) = loader._run._decoded._workers
        worker.kill()
        worker.join()
        with pytest.raises(RuntimeError, match="exited unexpectedly"):
            seen.extend(records.tolist() for _, _, records in iterator)
        assert seen + [records.tolist() for _, _, records in iterator] == planned(batch_size=4)
        assert epoch_of(loader) == planned(epoch=1, batch_size=4)


class Shrinking(torch.utils.data.Sampler):
    """Has a record less than it says from its second epoch on, until it is mended."""

    def __init__(self):
        self.epoch, self.mended = 0, False

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return NUM_RECORDS

    def __iter__(self):
        return iter(range(NUM_RECORDS if self.epoch == 0 or self.mended else NUM_RECORDS - 1))


def test_an_error_of_a_sampler_is_told_when_its_epoch_is_due(make):
    sampler = Shrinking()
    loader = make(sampler=sampler)
    expected = planned(shuffle="none", batch_size=4)
    for _ in range(2):
        loader.set_epoch(0)
        assert epoch_of(loader) == expected
        iterator = iter(loader)
        for _ in range(3):
            with pytest.raises(ValueError, match="23 indices in epoch 1"):
                next(iterator)
            assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 0)
    sampler.mended = True
    assert [records.tolist() for _, _, records in iterator] == expected


def test_a_sampler_that_fails_at_once_is_told_at_once_and_may_be_mended(make):
    sampler = Shrinking()
    loader = make(sampler=sampler)
    loader.set_epoch(1)
    with pytest.raises(ValueError, match="23 indices in epoch 1"):
        next(iter(loader))
    sampler.mended = True
    loader.set_epoch(1)
    assert epoch_of(loader) == planned(shuffle="none", batch_size=4)


# --- arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": -3},
        {"dtype": "float64"},
        {"layout": "CHW"},
        {"device": "tpu"},
        {"shuffle": "random"},
        {"last_batch": "keep"},
        {"rank": 1},
        {"world_size": 2},
        {"rank": 2, "world_size": 2},
        {"on_bad": "ignore"},
        {"transform": None},
        {"quarantine": "/no/such/folder/bad.jsonl"},
    ],
    ids=str,
)
def test_wrong_arguments_are_value_errors_when_the_loader_is_made(make, arguments):
    with pytest.raises(ValueError, match=str(next(iter(arguments)))):
        make(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_threads": 0},
        {"prefetch_queue_depth": 0},
        {"readahead_bytes": -1},
        {"hw_decoder_load": -0.1},
        {"hw_decoder_load": 1.5},
        {"hw_decoder_load": float("nan")},
    ],
    ids=str,
)
def test_wrong_arguments_for_dali_are_value_errors(store_path, arguments):
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))} is "):
        DaliLoader(store_path, **{"transform": TRAIN, "batch_size": 4, "device": "cpu"} | arguments)


def test_a_batch_size_that_is_no_integer_is_a_type_error(make):
    with pytest.raises(TypeError):
        make(batch_size=4.0)


def test_too_few_records_for_one_step_is_a_value_error_that_names_both(make):
    with pytest.raises(ValueError, match=r"24 records.* 25"):
        make(batch_size=25)
    with pytest.raises(ValueError, match=r"24 records.* 26"):
        make(batch_size=13, rank=0, world_size=2)
    make(batch_size=12, rank=0, world_size=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", [DaliLoader, TorchLoader])
def test_a_missing_gpu_is_a_device_error_when_the_loader_is_made(store_path, kind):
    with pytest.raises(DeviceError, match="cuda") as info:
        kind(store_path, transform=TRAIN, batch_size=4, device="cuda")
    assert "\n" not in str(info.value)


def test_a_missing_store_is_a_store_error(make, tmp_path):
    with pytest.raises(StoreError, match=r"nothing\.lmdb"):
        make(tmp_path / "nothing.lmdb")


def test_a_loader_says_what_it_holds(make):
    loader = make(batch_size=5, rank=1, world_size=2)
    assert loader.num_records == 24
    assert loader.classes == ["ant", "bee", "cat"]
    assert len(loader) == 2


def test_a_store_without_image_sizes_is_refused_or_read(make, image_folder, tmp_path):
    convert(image_folder, tmp_path / "x.lmdb", settings=ConvertSettings(check="none"))
    path, refused = tmp_path / "x.lmdb", None
    try:
        assert epoch_of(make(path)) == planned(batch_size=4)
    except StoreError as error:
        refused = str(error)
    assert refused is None or "--check" in refused


def write_own_part(store_path, folder, rank):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=3)
    with torch_here(store_path, transform=EVAL, batch_size=5, return_index=True) as loader:
        (folder / str(rank)).write_text(json.dumps(flat(epoch_of(loader))))
    torch.distributed.destroy_process_group()


def test_rank_and_world_size_are_the_process_groups(store_path, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_own_part, args=(store_path, tmp_path, rank)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    parts = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert parts[0] == [0, 1, 2, 3, 4, 15, 16, 17]
    assert sorted(record for part in parts for record in part) == list(range(24))


# --- closing


def test_a_closed_loader_is_closed(make):
    loader = make()
    iterator = iter(loader)
    next(iterator)
    unused = iter(loader)
    loader.close()
    loader.close()
    cut_short(iterator, because="the loader was closed")
    for use in (lambda: iter(loader), lambda: next(unused)):
        with pytest.raises(RuntimeError, match="is closed; make a new one"):
            use()


def test_a_loader_is_a_context_manager(make):
    with make() as loader:
        assert epoch_of(loader) == planned(batch_size=4)
    with pytest.raises(RuntimeError, match="closed"):
        iter(loader)


def test_a_loader_that_was_never_used_closes(make):
    make().close()


def descriptors_and_threads():
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(threading.enumerate())


@pytest.mark.parametrize("backend", [DALI, GPU, TORCH, WORKERS])
def test_closed_loaders_leave_no_threads_processes_or_descriptors(store_path, backend):
    def use():
        with backend(store_path, transform=TRAIN, batch_size=4) as loader:
            next(iter(loader))

    use()
    before = descriptors_and_threads()
    for _ in range(4):
        use()
    after = descriptors_and_threads()
    assert all(late <= early + 1 for late, early in zip(after, before, strict=True)), (before, after)
    assert not multiprocessing.active_children()


def test_a_closed_loader_lets_go_of_the_map_at_once(image_folder, tmp_path):
    path = tmp_path / "images.lmdb"
    convert(image_folder, path)

    def is_mapped():
        with open("/proc/self/maps") as file:
            return str(path) in file.read()

    gc.collect()
    gc.disable()
    try:
        with dali_on_the_cpu(path, transform=TRAIN, batch_size=4) as loader:
            next(iter(loader))
            assert is_mapped()
        del loader
        assert not is_mapped()
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", [DALI, GPU, TORCH, WORKERS])
def test_a_loader_that_is_dropped_without_closing_goes_away(store_path, backend):
    def use():
        loader = backend(store_path, transform=TRAIN, batch_size=4)
        next(iter(loader))
        return weakref.ref(loader)

    use()
    before = descriptors_and_threads()
    gone = [use() for _ in range(3)]
    after = descriptors_and_threads()
    assert all(reference() is None for reference in gone)
    assert all(late <= early + 1 for late, early in zip(after, before, strict=True)), (before, after)


@pytest.mark.soak
@pytest.mark.parametrize("backend", [DALI, GPU, WORKERS])
def test_hundreds_of_epochs_need_no_more_memory_descriptors_or_threads(store_path, backend):
    def resident_bytes():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with backend(store_path, transform=TrainTransform(size=64), batch_size=4) as loader:
        for epoch in range(1000):
            for _ in loader:
                pass
            if epoch == 200:
                before, memory = descriptors_and_threads(), resident_bytes()
        assert descriptors_and_threads() == before
        assert resident_bytes() < memory + 20e6


def test_stats_count_what_was_handed_out(make):
    loader = make()
    list(loader)
    next(iter(loader))
    stats = loader.stats()
    assert stats["images"] == 28
    sizes = loader.store.gather("num_bytes", np.arange(NUM_RECORDS))
    seen = [record for batch in planned(batch_size=4) + planned(batch_size=4, epoch=1)[:1] for record in batch]
    assert stats["bytes_read"] == sizes[seen].sum()
    assert stats["queue_fill"] >= 0
    assert stats["images_per_s"] > 0
    assert stats["wait_s"] >= 0
    assert 0 <= stats["wait_fraction"] <= 1


def use_in_a_fork(iterator):
    """What a forked process says that uses an iterator of a loader."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            next(iterator)
            os.write(writing, b"a batch")
        except BaseException as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking beside threads, which is the matter here
@pytest.mark.parametrize("backend", [DALI, TORCH])
def test_a_loader_that_was_used_says_in_a_forked_process_that_it_cannot_be(store_path, backend):
    with backend(store_path, transform=TRAIN, batch_size=4) as loader:
        assert use_in_a_fork(iter(loader)) == "a batch"
        iterator = iter(loader)
        next(iterator)
        assert "make a new loader here" in use_in_a_fork(iterator)
        assert "make a new loader here" in use_in_a_fork(iter(loader))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forgotten_pipeline_is_not_collected_in_a_forked_process(store_path):
    gc.collect()
    gc.disable()
    try:
        loader = dali_on_the_cpu(store_path, transform=TRAIN, batch_size=4)
        next(iter(loader))
        loader.itself = loader
        del loader
        pid = os.fork()
        if pid == 0:
            gc.collect()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    finally:
        gc.enable()
        gc.collect()


@pytest.mark.parametrize("use", [pickle.dumps, copy.deepcopy])
def test_a_loader_cannot_be_pickled_and_says_so(make, use):
    with pytest.raises(TypeError, match="make one in each process"):
        use(make())


# --- records that do not decode


BAD = (9, 22)


@pytest.fixture(scope="module")
def bad_path(tmp_path_factory):
    """As ``store_path``, but records 9 and 22 are PNG files with a damaged middle."""
    root = tmp_path_factory.mktemp("bad")
    folder = make_image_folder(root / "images")
    for record in BAD:
        (path,) = folder.rglob(f"{record:03}.jpg")
        save_damaged(path)
    convert(folder, root / "bad.lmdb")
    return root / "bad.lmdb"


def test_a_bad_record_is_named_in_one_line(make, bad_path):
    loader = make(bad_path, transform=EVAL)
    iterator = iter(loader)
    next(iterator), next(iterator)
    with pytest.raises(RecordError) as info:
        next(iterator)
    message = str(info.value)
    assert "\n" not in message
    assert str(bad_path) in message
    assert "record 9 (bee/009.jpg)" in message
    assert "no longer valid" not in message


def test_after_a_bad_record_the_loader_goes_on(make, bad_path):
    loader = make(bad_path, transform=EVAL)
    with pytest.raises(RecordError):
        list(loader)
    loader.set_epoch(5)
    seen = [records.tolist() for _, _, records in itertools.islice(loader, 2)]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_bad_record_of_an_epoch_that_was_left_concerns_nobody(make, bad_path):
    loader = make(bad_path, transform=EVAL)
    for _ in range(4):
        for images, _, records in itertools.islice(loader, 2):
            assert [record_of(grey) for grey in greys(images, EVAL)] == records.tolist()


def test_substitutes_take_the_place_of_bad_records(make, bad_path, caplog):
    loader = make(bad_path, transform=EVAL, on_bad="substitute")
    for epoch in range(3):
        steps = epoch_of(loader)
        assert [len(step) for step in steps] == [4] * 6
        for step, whole in zip(steps, planned(batch_size=4, shuffle="none"), strict=True):
            for shown, asked in zip(step, whole, strict=True):
                assert shown == asked or (asked in BAD and shown in whole and shown not in BAD)
        assert loader.epoch == epoch + 1
    assert [bad.index for bad in loader.bad_records] == list(BAD)
    assert [bad.name for bad in loader.bad_records] == ["bee/009.jpg", "cat/022.jpg"]
    assert all(bad.cause for bad in loader.bad_records)
    assert loader.stats()["substituted"] == 6
    assert len([message for message in caplog.messages if "bee/009.jpg" in message]) == 1


@pytest.mark.parametrize("transform", [TRAIN, EVAL], ids=["train", "eval"])
def test_a_batch_of_bad_records_only_shows_records_that_follow(make, tmp_path, transform):
    folder = make_image_folder(tmp_path / "images", num_records=8, classes=("one",))
    for record in (2, 3):
        save_damaged(folder / "one" / f"{record:03}.jpg")
    convert(folder, tmp_path / "x.lmdb")
    loader = make(tmp_path / "x.lmdb", transform=transform, batch_size=2, shuffle="none", on_bad="substitute")
    for _ in range(2):
        first, bad, third, fourth = epoch_of(loader)
        assert (first, third, fourth) == ([0, 1], [4, 5], [6, 7])
        assert set(bad) == {4}
    assert [record.index for record in loader.bad_records] == [2, 3]


@pytest.mark.parametrize("batch_size", [3, 12])
def test_substitutes_are_counted_when_they_are_shown_not_when_they_are_prepared(make, bad_path, batch_size):
    loader = make(bad_path, transform=EVAL, on_bad="substitute", batch_size=batch_size)
    for epoch in range(3):
        list(loader)
        assert loader.stats()["substituted"] == 2 * (epoch + 1)


def test_pillows_cause_of_a_bad_record_says_the_same_every_time(tmp_path):
    folder = tmp_path / "images" / "one"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(b"these are no pixels" * 50)
    save_grey(folder / "4.jpg", 3)
    convert(tmp_path / "images", tmp_path / "x.lmdb", settings=ConvertSettings(check="none"))
    with torch_here(tmp_path / "x.lmdb", transform=EVAL, batch_size=5, on_bad="substitute") as loader:
        list(loader)
        causes = {bad.cause for bad in loader.bad_records}
    assert len(causes) == 1
    assert " at 0x" not in causes.pop()


def test_the_state_counts_substituted_records_as_seen(make, bad_path):
    loader = make(bad_path, transform=EVAL, on_bad="substitute", batch_size=5)
    iterator = iter(loader)
    next(iterator), next(iterator)
    resumed = make(bad_path, transform=EVAL, on_bad="substitute", batch_size=24)
    resumed.load_state_dict(loader.state_dict())
    (step,) = epoch_of(resumed)
    assert len(step) == 14
    assert step[:12] == list(range(10, 22))


# --- the image folder and the map-style data set


def test_an_image_folder_is_read_in_place(image_folder, store_path):
    with (
        torch_here(image_folder, transform=TRAIN, batch_size=4, return_index=True) as folder,
        torch_here(store_path, transform=TRAIN, batch_size=4, return_index=True) as store,
    ):
        assert folder.classes == store.classes
        for ours, theirs in zip(folder, store, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_folders_that_are_no_image_folders_are_source_errors(tmp_path):
    (tmp_path / "class").mkdir()
    with pytest.raises(SourceError) as info:
        torch_here(tmp_path, transform=TRAIN, batch_size=4)
    assert "\n" not in str(info.value)


def test_items_are_image_folders_pixel_for_pixel(tmp_path):
    folder = tmp_path / "images"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    save_noise(folder / "a" / "1.jpg", seed=1)
    save_noise(folder / "a" / "2.jpg", seed=2, progressive=True, subsampling=2)
    save_noise(folder / "a" / "3.png", seed=3)
    Image.new("L", (20, 30), 77).save(folder / "b" / "grey.jpg")
    Image.new("CMYK", (20, 30), (10, 200, 30, 40)).save(folder / "b" / "cmyk.jpg")
    Image.new("P", (20, 30), 7).save(folder / "b" / "palette.png")
    Image.new("RGBA", (20, 30), (1, 2, 3, 4)).save(folder / "b" / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    save_noise(folder / "b" / "turned.jpg", seed=4, exif=exif)
    convert(folder, tmp_path / "x.lmdb")
    ours, theirs = ImageFolderLMDB(tmp_path / "x.lmdb"), ImageFolder(str(folder))
    assert len(ours) == len(theirs) == 8
    assert (ours.classes, ours.class_to_idx, ours.targets) == (theirs.classes, theirs.class_to_idx, theirs.targets)
    expected = [(os.path.relpath(path, folder), label) for path, label in theirs.samples]
    assert ours.samples == ours.imgs == expected
    for (image, label), (expected, target) in zip(ours, theirs, strict=True):
        assert (image.mode, image.size, label) == ("RGB", expected.size, target)
        assert type(label) is int
        assert np.array_equal(np.asarray(image), np.asarray(expected))


def test_items_are_transformed(store_path):
    data = ImageFolderLMDB(store_path, transform=lambda image: image.size, target_transform=lambda label: -label)
    assert data[23] == ((93, 109), -2)


def test_indices_are_a_lists(store_path):
    data = ImageFolderLMDB(store_path)
    assert data[-1][1] == 2
    assert np.array_equal(data[-24][0], data[0][0])
    assert data[np.int64(3)][1] == 0
    for index in (24, -25, 10**9):
        with pytest.raises(IndexError):
            data[index]


def test_a_bad_item_is_a_record_error(bad_path):
    data = ImageFolderLMDB(bad_path)
    with pytest.raises(RecordError, match=r"record 9 \(bee/009\.jpg\)"):
        data[9]
    data[8]


def test_the_data_set_pickles(store_path):
    data = pickle.loads(pickle.dumps(ImageFolderLMDB(store_path)))
    assert len(data) == 24
    assert len(pickle.dumps(data)) < 10_000


def grey_and_label(image):
    return int(np.asarray(image).mean())


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_the_data_set_works_in_workers_before_and_after_the_parent_read(store_path, labels, method):
    data = ImageFolderLMDB(store_path, transform=grey_and_label)

    def read():
        loader = DataLoader(data, batch_size=6, num_workers=1, multiprocessing_context=method)
        return [
            (record_of(grey), label)
            for greys_, labels_ in loader
            for grey, label in zip(greys_.tolist(), labels_.tolist(), strict=True)
        ]

    expected = list(enumerate(labels))
    assert read() == expected
    assert [(record_of(grey), label) for grey, label in data] == expected
    if method == "fork":  # the others start Python anew: nothing of the parent comes along
        assert read() == expected


# --- planning without images


class Labels:
    """Stands for a store where only labels are asked for."""

    def __init__(self, num_records):
        self.num_records = num_records

    def __len__(self):
        return self.num_records

    def gather(self, name, records):
        return records


@pytest.mark.parametrize("shuffle", ["full", "block", "none"])
@pytest.mark.parametrize(("batch_size", "world_size"), [(7, 3), (64, 2), (5000, 1)])
def test_plans_are_the_order_whatever_place_is_asked_for(shuffle, batch_size, world_size):
    num_records = 9_001
    whole = epoch_order(num_records, seed=1, epoch=4, shuffle=shuffle)(np.arange(num_records))
    seen = []
    for rank in range(world_size):
        steps = StepPlan(
            num_positions=num_records,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            last_batch="short",
        )
        sampling = AllRecords(num_records, seed=1, shuffle=shuffle)
        planner = Planner(Labels(num_records), transform=TRAIN, steps=steps, sampling=sampling, seed=1)
        plans = list(planner.plans(4, 0))
        for plan in plans:
            assert np.array_equal(plan.records, whole[steps.positions(plan.start)])
        for plan in plans[:: max(1, len(plans) // 10)]:  # out of order and again
            assert np.array_equal(planner.plan(4, plan.start).records, plan.records)
        seen += [record for plan in plans for record in plan.records.tolist()]
    assert sorted(seen) == list(range(num_records))


def test_a_store_of_greys_is_told_apart(tmp_path):
    """The proof in the data works: neighbours' greys are not confused."""
    save_grey(tmp_path / "x.jpg", 11)
    assert record_of(np.asarray(Image.open(tmp_path / "x.jpg")).mean()) == 11
