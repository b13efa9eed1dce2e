"""What follows decoding on the CPU: resized by torch, in threads, into memory that is used again."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import encoded, write_store
from pictures import picture
from PIL import Image

from dali_lmdb import DaliLoader, EvalTransform, RecordError, TorchLoader, TrainTransform
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.scaling import denominators, resized_rgb
from dali_lmdb.loaders.in_flight import read_left_over
from dali_lmdb.store import open_store

ROOT = Path(__file__).resolve().parents[1]
TRAIN = TrainTransform(size=48)


@pytest.fixture(scope="module")
def picture_path(tmp_path_factory):
    """A store of 24 pictures of different sizes."""
    pictures = [picture(seed) for seed in range(24)]
    path = tmp_path_factory.mktemp("pictures") / "x.lmdb"
    return write_store(path, list(map(encoded, pictures)), sizes=[pixels.shape[:2] for pixels in pictures])


@pytest.fixture(scope="module")
def large_path(tmp_path_factory):
    """A store of 8 pictures of 1200 x 1600 pixels."""
    pictures = [np.kron(picture(seed)[:150, :150], np.ones((8, 11, 1), np.uint8))[:, :1600] for seed in range(8)]
    path = tmp_path_factory.mktemp("large") / "x.lmdb"
    return write_store(path, list(map(encoded, pictures)), sizes=[pixels.shape[:2] for pixels in pictures])


def dali(path, **arguments):
    defaults = {"transform": TRAIN, "batch_size": 5, "num_threads": 2, "dtype": "uint8"}
    return DaliLoader(path, device="cpu", **defaults | arguments)


def images_of(loader, *, epochs=1):
    """The images of some epochs by (epoch, record)."""
    images = {}
    with loader:
        for epoch in range(epochs):
            for batch, _, records in loader:
                images |= {(epoch, int(r)): image.clone() for r, image in zip(records, batch, strict=True)}
    return images


# --- pixels


@pytest.mark.parametrize("transform", [TrainTransform(), EvalTransform(), EvalTransform(size=50, resize=61)])
def test_images_differ_from_pillows_in_rounding_only(picture_path, transform):
    arguments = {"transform": transform, "return_index": True, "last_batch": "short"}
    ours = images_of(dali(picture_path, **arguments))
    theirs = images_of(TorchLoader(picture_path, batch_size=5, num_workers=0, dtype="uint8", **arguments))
    found = torch.stack([(ours[key].int() - theirs[key].int()).abs() for key in theirs])
    assert found.max() <= 1
    assert (found == 0).float().mean() > 0.9


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_images_do_not_depend_on_batches_and_threads(picture_path, dtype):
    transform = TrainTransform(size=40, erase=0.5, brightness=0.4, hue=0.1)
    arguments = {"transform": transform, "return_index": True, "last_batch": "short", "dtype": dtype}
    expected = images_of(dali(picture_path, num_threads=1, batch_size=24, **arguments), epochs=6)
    found = images_of(
        dali(picture_path, num_threads=4, batch_size=3, prefetch_queue_depth=3, layout="NHWC", **arguments),
        epochs=6,
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("shorter", range(245, 262))
def test_evaluation_resizes_images_of_nearly_the_outputs_size(shorter, tmp_path):
    sizes = [(shorter, shorter), (shorter, shorter + 9), (shorter + 40, shorter)]
    noise = [np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    path = write_store(tmp_path / "x.lmdb", [encoded(pixels, "PNG") for pixels in noise], sizes=sizes)
    for transform in (EvalTransform(), EvalTransform(size=255, resize=256)):
        arguments = {"transform": transform, "batch_size": 3}
        classic = TorchLoader(path, num_workers=0, device="cpu", dtype="uint8", **arguments)
        with dali(path, **arguments) as ours, classic as theirs:
            found, expected = (next(iter(loader))[0].int() for loader in (ours, theirs))
        assert (found - expected).abs().max() <= 2  # both passes may round otherwise


@pytest.mark.parametrize("size", [(2, 3000), (3000, 2), (1, 20_000)])
def test_a_long_image_is_evaluated_in_little_memory(size, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    path = write_store(tmp_path / "x.lmdb", [encoded(pixels)] * 2, sizes=[size] * 2)
    arguments = {"transform": EvalTransform(), "return_index": True, "last_batch": "short", "batch_size": 2}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = images_of(dali(path, **arguments))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000, (
        "kB; the whole image takes 300 MB"
    )
    theirs = images_of(dali(path, resize="dali", **arguments))
    assert max((ours[key].int() - theirs[key].int()).abs().float().mean() for key in theirs) < 1


# --- memory and threads


def test_a_batch_that_somebody_holds_is_never_written_to(picture_path):
    with dali(picture_path) as loader:
        kept = []
        for _ in range(10):
            for images, _ in loader:
                kept.append((images[1:, :, 10], images.clone()))  # only a view of it is kept
        for view, expected in kept:
            assert torch.equal(view, expected[1:, :, 10])
    assert all(torch.equal(view, expected[1:, :, 10]) for view, expected in kept)


def test_memory_of_dropped_batches_is_used_again(picture_path):
    with dali(picture_path) as loader:
        addresses = [images.data_ptr() for _ in range(10) for images, _ in loader]
    assert len(addresses) == 40
    assert len(set(addresses)) <= 6


THREADS = """
import os, sys
import torch
from dali_lmdb import DaliLoader, EvalTransform, TrainTransform

def num_threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum(not name.startswith("[DALI]") for name in names)

torch.set_num_threads(4)
arguments = {"batch_size": 8, "device": "cpu", "num_threads": 3, "readahead_bytes": 0}
for transform in (EvalTransform(), TrainTransform(brightness=0.5, hue=0.2, erase=0.5)):
    before = num_threads()
    with DaliLoader(sys.argv[1], transform=transform, **arguments) as loader:
        for _ in loader:
            during = num_threads()
        print(during - before, torch.get_num_threads())
"""


def test_neither_torch_nor_numpy_starts_threads(picture_path):
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(picture_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["4 4"] * 2, "the prefetcher and three that finish images"


NOT_CLOSED = """
import sys
from dali_lmdb import DaliLoader, TrainTransform

arguments = {"batch_size": 20, "device": "cpu", "num_threads": 4}
loader = DaliLoader(sys.argv[1], transform=TrainTransform(size=448, brightness=0.4), **arguments)
batches = iter(loader)
next(batches)
print("in the first epoch")
"""


def test_a_program_that_ends_without_closing_its_loader_ends_well(picture_path):
    for _ in range(2):  # one in four aborted
        done = subprocess.run(
            [sys.executable, "-c", NOT_CLOSED, str(picture_path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "in the first epoch\n")


@pytest.mark.parametrize("num_batches", [1, 2, 3])
def test_an_epoch_that_is_left_before_a_bad_batch_is_followed_by_a_whole_one(picture_path, tmp_path, num_batches):
    with open_store(picture_path) as store:
        values = [bytes(store.read(record)) for record in range(24)]
        sizes = list(zip(store.column("height").tolist(), store.column("width").tolist(), strict=True))
    values[14] = b"no image" * 50
    path = write_store(tmp_path / "x.lmdb", values, sizes=sizes)
    with dali(path, transform=EvalTransform(size=16, resize=18), batch_size=4, return_index=True) as loader:
        batches = iter(loader)
        for _ in range(num_batches):
            next(batches)
        loader.set_epoch(3)
        batches = iter(loader)
        assert [next(batches)[2].tolist()[0] for _ in range(3)] == [0, 4, 8]
        with pytest.raises(RecordError, match="record 14 "):
            next(batches)
        assert [records.tolist()[0] for _, _, records in batches] == [16, 20]


# --- what can be asked for

ONLY = "device 'cpu' and 'linear' or 'cubic'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resize": "pillow"}, "resize is 'pillow', expected 'auto', 'dali' or 'torch'"),
        ({"decode_scale": "half"}, "decode_scale is 'half', expected 'exact' or 'fast'"),
        (
            {"resize": "torch", "transform": TrainTransform(interpolation="lanczos")},
            "resize is 'torch' with device 'cpu' and interpolation 'lanczos', expected " + ONLY,
        ),
        (
            {"decode_scale": "fast", "transform": TrainTransform(interpolation="nearest")},
            "decode_scale is 'fast' with device 'cpu' and interpolation 'nearest', expected " + ONLY,
        ),
        (
            {"decode_scale": "fast", "resize": "dali"},
            "decode_scale is 'fast' with resize 'dali', expected resize 'torch' or 'auto'",
        ),
    ],
)
def test_what_cannot_be_is_refused(picture_path, arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dali(picture_path, **arguments)


@pytest.mark.parametrize(
    ("interpolation", "chosen"),
    [("linear", "torch"), ("cubic", "torch"), ("nearest", "dali"), ("lanczos", "dali")],
)
def test_torch_resizes_where_it_has_the_filter(picture_path, interpolation, chosen):
    with dali(picture_path, transform=TrainTransform(interpolation=interpolation)) as loader:
        assert loader.graph.resize == chosen


# --- images decoded at a fraction of their size


def test_an_image_is_reduced_as_far_as_it_stays_as_large_as_the_output():
    kinds = np.array(
        [Kind.JPEG_BASELINE] * 5 + [Kind.JPEG_PROGRESSIVE, Kind.JPEG_GRAYSCALE, Kind.PNG, Kind.JPEG_CPU_ONLY]
    )
    pixels = np.array([(1.9, 9), (2, 2), (3.9, 5), (4, 4), (8, 20), (9, 9), (9, 9), (9, 9), (9, 9)])
    assert denominators(kinds.astype(np.uint8), pixels).tolist() == [1, 2, 2, 4, 8, 8, 8, 1, 1]


@pytest.mark.parametrize("denominator", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(64, 64), (101, 203), (9, 500)])
def test_a_reduced_image_keeps_its_corners(size, denominator):
    height, width = size
    pixels = np.broadcast_to(np.linspace(0, 255, width)[None, :, None], (height, width, 3)).astype(np.uint8)
    box, options = (0, 0, width, height), {"interpolation": "linear", "max_pixels": None}
    image = resized_rgb(encoded(pixels), denominator=denominator, box=box, size=8, **options)
    expected = np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BILINEAR), int)
    assert np.abs(np.asarray(image, int) - expected).max() <= 8


@pytest.mark.parametrize(
    "transform", [TrainTransform(size=64, scale=(0.3, 1.0)), EvalTransform(size=64, resize=72)]
)
def test_reduced_images_show_the_same(large_path, transform):
    arguments = {"transform": transform, "return_index": True, "last_batch": "short"}
    exact = images_of(dali(large_path, **arguments), epochs=3)
    fast = images_of(dali(large_path, decode_scale="fast", **arguments), epochs=3)
    differences = torch.stack([(exact[key].float() - fast[key].float()).abs().mean() for key in exact])
    shifted = torch.stack([(exact[key][:, 1:].float() - fast[key][:, :-1].float()).abs().mean() for key in exact])
    assert differences.max() > 0, "they are reduced"
    assert (differences < 0.5 * shifted).all(), "by less than a shift of one pixel"
    assert differences.mean() < 3


def test_small_images_are_decoded_exactly(picture_path):
    transform = TrainTransform(size=200)
    exact = images_of(dali(picture_path, transform=transform, return_index=True))
    fast = images_of(dali(picture_path, transform=transform, return_index=True, decode_scale="fast"))
    assert all(torch.equal(fast[key], exact[key]) for key in exact)


@pytest.fixture(scope="module")
def cut_path(large_path, tmp_path_factory):
    """``large_path`` with a third record of which the second half is missing."""
    with open_store(large_path) as store:
        values = [bytes(store.read(record)) for record in range(8)]
        sizes = list(zip(store.column("height").tolist(), store.column("width").tolist(), strict=True))
    values[2] = values[2][: len(values[2]) // 2]
    return write_store(tmp_path_factory.mktemp("cut") / "x.lmdb", values, sizes=sizes)


REDUCING = {
    "transform": EvalTransform(size=64, resize=72),
    "decode_scale": "fast",
    "batch_size": 2,
    "return_index": True,
}


def test_a_record_that_cannot_be_reduced_is_named(cut_path):
    with dali(cut_path, **REDUCING) as loader:
        batches = iter(loader)
        assert next(batches)[2].tolist() == [0, 1]
        with pytest.raises(RecordError, match=r"record 2 \(.*\).*truncated"):
            next(batches)
        assert [records.tolist() for _, _, records in batches] == [[4, 5], [6, 7]]


def test_a_record_that_cannot_be_reduced_is_substituted(cut_path):
    with dali(cut_path, on_bad="substitute", **REDUCING) as loader:
        for _ in range(2):
            assert [records.tolist() for _, _, records in loader] == [[0, 1], [3, 3], [4, 5], [6, 7]]
        assert [bad.index for bad in loader.bad_records] == [2]


def test_all_records_of_a_batch_that_cannot_be_reduced_are_named(cut_path, tmp_path):
    with open_store(cut_path) as store:
        values = [bytes(store.read(record)) for record in (2, 0, 2, 2)]
    path = write_store(tmp_path / "x.lmdb", values, sizes=[(1200, 1600)] * 4)
    with dali(path, **REDUCING | {"batch_size": 4}) as loader:
        with pytest.raises(RecordError):
            next(iter(loader))
        assert [bad.index for bad in loader.bad_records] == [0, 2, 3]


def test_a_record_with_another_size_in_the_index_is_bad(large_path, tmp_path):
    with open_store(large_path) as store:
        values = [bytes(store.read(record)) for record in range(4)]
    path = write_store(tmp_path / "x.lmdb", values, sizes=[(1200, 1600), (1200, 3200), (1200, 1600), (1200, 1600)])
    with dali(path, on_bad="substitute", **REDUCING) as loader:
        list(loader)
        assert [(bad.index, bad.cause.split(",")[0]) for bad in loader.bad_records] == [
            (1, "the window is outside of the image")
        ]


def test_records_to_be_reduced_are_in_the_file_of_those_in_flight(large_path, tmp_path):
    with dali(large_path, in_flight_file=tmp_path / "in-flight", **REDUCING) as loader:
        next(iter(loader))
        left_over = read_left_over(tmp_path / "in-flight")
    assert {2, 3} <= set(left_over.records)
