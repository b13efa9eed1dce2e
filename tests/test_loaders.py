import io
import itertools
import json
import multiprocessing

import numpy as np
import pytest
import torch
from image_sets import record_of, save_grey
from loading import (
    DALI,
    EVAL,
    GPU,
    NUM_RECORDS,
    TRAIN,
    cut_short,
    epoch_of,
    flat,
    greys,
    images_by_record,
    planned,
    torch_here,
)
from PIL import Image
from samplers import EpochSampler
from torchvision.transforms import functional as F

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.errors import DeviceError, SourceError, StateError, StoreError
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import IMAGENET_MEAN, IMAGENET_STD, EvalTransform, TrainTransform
from dali_lmdb.plan.batches import Planner
from dali_lmdb.plan.order import StepPlan, epoch_order
from dali_lmdb.plan.sampling import AllRecords
from dali_lmdb.store import open_store

# --- order: every backend gives exactly what the plan says


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
        {"decode": "roi"},
        {"decode_device": "cuda"},
        {"decode_device": "gpu"},  # with device="cpu"
        {"preallocation_bytes": -1},
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
