"""What needs a GPU: batches decoded, cropped and normalised there, and the same as on the CPU."""

import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from damage import grey_image, noise_image, store_with
from gpu_checks import assert_alike, by_record, drain, grey_levels, records_of, store_of_pictures, used_bytes
from image_sets import MAX_RECORDS, record_of
from torch.nn.parallel import DistributedDataParallel

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.errors import RecordError
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import EvalTransform, TrainTransform

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[1]
TRAIN = TrainTransform(size=64)
EVAL = EvalTransform(size=64, resize=72)
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2}
GRAPHS = pytest.mark.parametrize("transform", [TRAIN, EVAL], ids=["train", "eval"])


@pytest.fixture
def make():
    """Makes loaders, on the GPU unless told otherwise; they are closed at the test's end."""
    made = []

    def make_loader(store, **arguments):
        defaults = {"transform": EVAL, "batch_size": 8, "num_threads": 2, "return_index": True}
        made.append(DaliLoader(store, **{"device": "cuda"} | defaults | arguments))
        return made[-1]

    yield make_loader
    for loader in made:
        loader.close()


@pytest.fixture(scope="module")
def grey_path(tmp_path_factory):
    """A store of 24 grey images, each of its own grey."""
    return store_with(tmp_path_factory.mktemp("grey") / "grey.lmdb", {}, num_records=24)


@pytest.fixture(scope="module")
def noise_path(tmp_path_factory):
    """A store of 24 images of noise, in which any crop that is off shows."""
    return store_with(tmp_path_factory.mktemp("noise") / "noise.lmdb", {}, num_records=24, image=noise_image)


@pytest.fixture(scope="module")
def picture_path(tmp_path_factory):
    """A store of pictures that look like photos."""
    return store_of_pictures(tmp_path_factory.mktemp("pictures") / "pictures.lmdb")


# --- order, pixels and labels


@GRAPHS
@pytest.mark.parametrize("last_batch", ["drop", "pad", "short"])
def test_pixels_labels_and_indices_belong_together(make, grey_path, transform, last_batch):
    loader = make(grey_path, transform=transform, batch_size=5, last_batch=last_batch)
    reference = make(
        grey_path, transform=transform, batch_size=5, last_batch=last_batch, device="cpu", resize="dali"
    )
    for _ in range(3):
        steps = [records_of(batch) for batch in loader]
        assert len(steps) == len(loader)
        assert steps == [records_of(batch) for batch in reference]


def test_every_record_is_evaluated_once_at_any_world_size(make, grey_path):
    for world_size in (1, 2, 5):
        seen = [
            record
            for rank in range(world_size)
            for batch in make(grey_path, rank=rank, world_size=world_size, batch_size=3)
            for record in records_of(batch)
        ]
        assert sorted(seen) == list(range(24))


TRANSFORMS = {
    "train": TrainTransform(size=96),
    "eval": EvalTransform(size=96, resize=112),
    "jitter": TrainTransform(size=96, **JITTER),
    "erase": TrainTransform(size=96, erase=1.0),
    "cubic": TrainTransform(size=96, interpolation="cubic"),
    "lanczos": EvalTransform(size=96, resize=112, interpolation="lanczos"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_pictures_look_as_on_the_cpu(make, picture_path, name):
    arguments = {"transform": TRANSFORMS[name], "dtype": "uint8", "last_batch": "short"}
    ours = by_record(make(picture_path, **arguments))
    theirs = by_record(make(picture_path, device="cpu", resize="dali", **arguments))
    assert len(theirs) == 24
    assert_alike(ours, theirs, mean=1.5, share=0.995)


@GRAPHS
def test_photos_look_as_on_the_cpu(make, test_data, tmp_path, transform):
    convert(test_data / "photos", tmp_path / "photos.lmdb", settings=ConvertSettings(on_bad="skip"))
    arguments = {"transform": transform, "dtype": "uint8", "last_batch": "short", "sampler": range(0, 120, 4)}
    ours = by_record(make(tmp_path / "photos.lmdb", **arguments))
    theirs = by_record(make(tmp_path / "photos.lmdb", device="cpu", resize="dali", **arguments))
    assert_alike(ours, theirs, mean=1, share=0.999)


@pytest.mark.parametrize("hw_decoder_load", [0.0, 0.65, 1.0])
def test_the_share_of_the_hardware_engine_changes_nothing_to_be_seen(make, picture_path, hw_decoder_load):
    arguments = {"transform": TRAIN, "dtype": "uint8", "last_batch": "short"}
    ours = by_record(make(picture_path, hw_decoder_load=hw_decoder_load, **arguments))
    theirs = by_record(make(picture_path, device="cpu", resize="dali", **arguments))
    assert_alike(ours, theirs, mean=1.5, share=0.995)


def test_crops_are_not_off_by_a_pixel(make, noise_path):
    """In noise, a window moved by one pixel gives a mean difference of 20 grey levels and more."""
    for transform in (TRAIN, EVAL):
        arguments = {"transform": transform, "dtype": "uint8", "last_batch": "short"}
        ours = by_record(make(noise_path, **arguments))
        theirs = by_record(make(noise_path, device="cpu", resize="dali", **arguments))
        assert torch.stack([(ours[record] - theirs[record]).abs() for record in theirs]).mean() < 5


def test_the_size_follows_its_schedule(make, grey_path):
    loader = make(grey_path, transform=TrainTransform(size=32, size_schedule=((1, 48), (2, 96))))
    for size in (32, 48, 96):
        shapes = {tuple(images.shape[1:]) for images, _, _ in loader}
        assert shapes == {(3, size, size)}


# --- what a batch is


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_batches_are_of_the_asked_type_and_layout_on_the_current_device(make, grey_path, dtype, layout):
    images, labels, records = next(iter(make(grey_path, dtype=dtype, layout=layout)))
    device = torch.device("cuda", torch.cuda.current_device())
    assert (images.device, labels.device, records.device) == (device, device, torch.device("cpu"))
    assert (images.dtype, labels.dtype, records.dtype) == (getattr(torch, dtype), torch.int64, torch.int64)
    assert images.shape == (8, 3, 64, 64)
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    assert images.is_contiguous(memory_format=memory_format)


def test_channels_last_is_a_view_of_what_dali_made(make, grey_path):
    images, *_ = next(iter(make(grey_path, layout="NHWC", dtype="float16")))
    assert images._is_view()
    assert images._base.shape == (8, 64, 64, 3)
    assert images._base.data_ptr() == images.data_ptr()


def test_the_current_device_at_the_time_of_making_counts(make, grey_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(1):
        loader = make(grey_path)
    for images, labels, _ in loader:
        assert {images.device, labels.device} == {torch.device("cuda", 1)}


def test_batches_are_ready_on_the_stream_that_is_current(make, grey_path):
    """Work on a side stream right after ``next``, with nothing waited for in between, sees whole batches."""
    stream = torch.cuda.Stream()
    loader = make(grey_path, transform=TRAIN, batch_size=12, dtype="uint8")
    found = []
    with torch.cuda.stream(stream):
        for _ in range(20):
            for images, labels, records in loader:
                found.append((images.float().mean(dim=(1, 2, 3)), labels + 1, records))
    torch.cuda.synchronize()
    assert len(found) == 40
    for greys, labels, records in found:
        assert [record_of(grey) for grey in greys.cpu()] == records.tolist()
        assert (labels - 1).tolist() == records.tolist()


def test_batches_that_are_kept_do_not_change(make, grey_path):
    kept = [(batch, batch[0].clone()) for batch in make(grey_path, batch_size=4)]
    torch.cuda.synchronize()
    for batch, copy in kept:
        assert torch.equal(batch[0], copy)
        records_of(batch)


@GRAPHS
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_network_trains_and_evaluates_on_batches(make, grey_path, transform, layout):
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(8, 24),
    ).cuda()  # fmt: skip
    if layout == "NHWC":
        network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    loader = make(grey_path, transform=transform, layout=layout, dtype="float16", batch_size=24)
    losses = []
    for _ in range(30):
        for images, labels, _ in loader:
            with torch.autocast("cuda", dtype=torch.float16):
                loss = torch.nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


# --- epochs


def test_after_an_early_break_the_next_epoch_is_whole(make, grey_path):
    loader = make(grey_path, batch_size=4)
    for stop in (0, 1, 2, 5):
        list(itertools.islice(loader, stop))
        assert sorted(record for batch in loader for record in records_of(batch)) == list(range(24))


def test_training_and_evaluation_loaders_take_turns(make, grey_path):
    train, evaluate = make(grey_path, transform=TRAIN), make(grey_path)
    for _ in range(3):
        assert sorted(record for batch in train for record in records_of(batch)) == list(range(24))
        assert [record for batch in evaluate for record in records_of(batch)] == list(range(24))


def test_a_state_goes_on_at_another_batch_size_on_the_gpu_or_the_cpu(make, noise_path):
    """Equal pixels on the GPU hold for the CUDA decoder: a batch decides which of its images the engine takes."""
    arguments = {"transform": TRAIN, "dtype": "uint8", "last_batch": "short", "hw_decoder_load": 0.0}
    whole = make(noise_path, batch_size=4, **arguments)
    expected = by_record(whole)
    first = make(noise_path, batch_size=4, **arguments)
    seen = [int(record) for _, _, records in itertools.islice(first, 3) for record in records]
    for device in ("cuda", "cpu"):
        resumed = make(noise_path, batch_size=7, device=device, **arguments)
        resumed.load_state_dict(first.state_dict())
        rest = by_record(resumed)
        assert sorted([*seen, *rest]) == list(range(24))
        found = torch.stack([(rest[record] - expected[record]).abs() for record in rest])
        assert found.max() == 0 if device == "cuda" else found.mean() < 5


# --- bad records: what no decoder takes, on whatever device


@pytest.mark.parametrize("damage", ["text", "nothing", "zeros", "header cut off", "frame header zeroed"])
@GRAPHS
def test_a_bad_record_is_named_and_the_iterator_goes_on(make, tmp_path, damage, transform):
    path = store_with(tmp_path / "x.lmdb", {9: damage})
    iterator = iter(make(path, transform=transform, shuffle="none", batch_size=4))
    assert records_of(next(iterator)) == [0, 1, 2, 3]
    assert records_of(next(iterator)) == [4, 5, 6, 7]
    with pytest.raises(RecordError) as info:
        next(iterator)
    assert str(info.value).startswith(f"{path}: record 9 (c09/009.jpg): not a decodable image: DALI: ")
    assert "\n" not in str(info.value)
    assert list(iterator) == []


@pytest.mark.parametrize("bad", [(0,), (11,), (1, 2), (1, 6, 8), (4, 5, 6, 7)], ids=str)
def test_substitutes_are_those_of_the_cpu(make, tmp_path, bad):
    path = store_with(tmp_path / "x.lmdb", dict.fromkeys(bad, "text"))
    for transform in (TRAIN, EVAL):
        arguments = {"transform": transform, "on_bad": "substitute", "batch_size": 4}
        ours, theirs = make(path, **arguments), make(path, device="cpu", resize="dali", **arguments)
        for epoch in range(3):
            steps = [records_of(batch) for batch in ours]
            assert steps == [records_of(batch) for batch in theirs]
            assert [len(step) for step in steps] == [4, 4, 4]
            assert ours.stats()["substituted"] == len(bad) * (epoch + 1)
        assert sorted(record.index for record in ours.bad_records) == list(bad)


def test_damage_that_a_decoder_may_notice_or_not_spoils_no_other_record(make, tmp_path):
    kinds = ("no scan", "scan cut off", "huffman table zeroed", "size zeroed", "png with a damaged middle")
    path = store_with(tmp_path / "x.lmdb", dict(zip((1, 5, 9, 13, 17), kinds, strict=True)), num_records=20)
    loader = make(path, on_bad="substitute", batch_size=4)
    for _ in range(2):
        for step, (images, labels, records) in enumerate(loader):
            assert labels.tolist() == records.tolist()
            good = [place for place in range(4) if place != 1]
            assert records[good].tolist() == [4 * step + place for place in good]
            greys = grey_levels(images[good]).mean(dim=(1, 2, 3))
            assert [record_of(grey) for grey in greys] == records[good].tolist()
    assert {record.index for record in loader.bad_records} <= {1, 5, 9, 13, 17}


# --- memory and threads


def exercise(path):
    """Make a loader, use it, close it; the bytes in use while it was open."""
    arguments = {"transform": TrainTransform(), "batch_size": 128, "last_batch": "pad", "num_threads": 2}
    with DaliLoader(path, device="cuda", **arguments) as loader:
        drain(loader)
        drain(loader)
        return used_bytes()


def test_closing_frees_the_gpus_memory(grey_path):
    exercise(grey_path)  # what CUDA and DALI load once stays
    before = used_bytes()
    for _ in range(3):
        assert exercise(grey_path) > before + (100 << 20)  # two batches of 77 MB at least
        # Others may use the GPU too, hence not to the byte.
        assert used_bytes() < before + (32 << 20)


def test_failed_pipelines_free_the_gpus_memory(make, tmp_path):
    path = store_with(tmp_path / "x.lmdb", dict.fromkeys((1, 6, 8), "text"))
    loader = make(path, transform=TrainTransform(), batch_size=4)
    errors = []

    def epoch():
        iterator = iter(loader)
        while True:
            try:
                next(iterator)
            except StopIteration:
                return
            except RecordError as error:
                errors.append(error)  # kept, as a log might

    epoch()
    before = used_bytes()
    for _ in range(5):
        epoch()
    assert len(errors) >= 6
    assert used_bytes() < before + (64 << 20)


def test_many_epochs_need_no_more_memory_or_threads(make, grey_path):
    loader = make(grey_path, transform=TRAIN, batch_size=8)
    for _ in range(5):
        drain(loader)
    before, threads = used_bytes(), len(os.listdir("/proc/self/task"))
    for _ in range(100):
        drain(loader)
    assert used_bytes() < before + (32 << 20)
    assert len(os.listdir("/proc/self/task")) <= threads


def test_closed_loaders_leave_no_threads(grey_path):
    exercise(grey_path)
    threads = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        exercise(grey_path)
    assert len(os.listdir("/proc/self/task")) <= threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dali_lmdb")]


# --- the classic path on a GPU


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3), ("uint8", 0)])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_torch_loader_moves_its_batches_to_the_gpu(grey_path, num_workers, dtype, tolerance):
    arguments = {"transform": EVAL, "batch_size": 8, "dtype": dtype, "layout": "NHWC", "return_index": True}
    with (
        TorchLoader(grey_path, device="cuda", num_workers=num_workers, **arguments) as loader,
        TorchLoader(grey_path, device="cpu", num_workers=0, **arguments) as reference,
    ):
        for batch, (expected, _, _) in zip(loader, reference, strict=True):
            assert {batch[0].device.type, batch[1].device.type} == {"cuda"}
            assert batch[0].is_contiguous(memory_format=torch.channels_last)
            records_of(batch)
            torch.testing.assert_close(batch[0].cpu(), expected, rtol=0, atol=tolerance)


# --- several GPUs: NCCL, one rank on each


def part_of_a_run(rank, world_size, path, folder):
    """One rank: a short DDP training, then an evaluation; writes what it saw."""
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=world_size,
        device_id=torch.device("cuda", rank),
    )
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network = DistributedDataParallel(network.cuda(), device_ids=[rank])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    trained, evaluated = [], []
    arguments = {"batch_size": 2, "device": "cuda", "num_threads": 1, "return_index": True, "on_bad": "substitute"}
    with (
        DaliLoader(path, transform=TRAIN, **arguments) as train,
        DaliLoader(path, transform=EVAL, **arguments) as eval_,
    ):
        for _ in range(2):
            trained.append([])
            for batch in train:
                loss = torch.nn.functional.cross_entropy(network(batch[0]), batch[1] % 4)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                trained[-1] += records_of(batch)
            evaluated.append([record for batch in eval_ for record in records_of(batch)])
        count = torch.tensor([len(evaluated[0])], device="cuda")
        torch.distributed.all_reduce(count)
    weight = next(network.parameters()).detach().flatten().tolist()
    result = {"trained": trained, "evaluated": evaluated, "count": count.item(), "weight": weight}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def test_a_rank_on_each_gpu_trains_and_evaluates(tmp_path):
    world_size = torch.cuda.device_count()
    path = store_with(tmp_path / "x.lmdb", {5: "text"}, num_records=min(MAX_RECORDS, 2 * world_size + 7))
    torch.multiprocessing.spawn(part_of_a_run, (world_size, path, tmp_path), nprocs=world_size)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    for epoch in range(2):
        steps = {len(rank["trained"][epoch]) for rank in ranks}
        assert len(steps) == 1
        evaluated = [record for rank in ranks for record in rank["evaluated"][epoch]]
        assert len(evaluated) == ranks[0]["count"] == min(MAX_RECORDS, 2 * world_size + 7)
        assert 5 not in evaluated
        assert set(range(len(evaluated))) - set(evaluated) == {5}
    assert all(rank["weight"] == ranks[0]["weight"] for rank in ranks)


def test_the_command_trains_on_every_gpu(tmp_path):
    for name, seed in (("train", 0), ("val", 1)):
        for number in range(24):
            folder = tmp_path / name / ("bright" if number % 2 else "dark")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02}.jpg").write_bytes(grey_image((number % 2) * 18 + (number + seed) % 4))
        convert(tmp_path / name, tmp_path / f"{name}.lmdb")
    options = {
        "--train": tmp_path / "train.lmdb",
        "--val": tmp_path / "val.lmdb",
        "--arch": "resnet18",
        "--size": 64,
        "--batch-size": 2,
        "--epochs": 2,
        "--device": "cuda",
        "--workers": 1,
        "--world-size": torch.cuda.device_count(),
        "--log-json": tmp_path / "log.jsonl",
    }
    arguments = [str(word) for option in options.items() for word in option]
    command = [sys.executable, "-m", "dali_lmdb.train", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "val_top1" in line]
    assert len(evaluations) == 2
    assert all(np.isfinite(line["val_loss"]) for line in evaluations)
