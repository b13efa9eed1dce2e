"""Which way of decoding fits into a GPU's memory, and how much is preallocated; no GPU is needed to compute it."""

import inspect
import itertools
import logging
import re
from dataclasses import fields, replace

import pytest
from damage import write_store
from graphs import settings

from dali_lmdb.images.gpu_decoder import gpu_decoder
from dali_lmdb.loaders.backends import open_loader
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.gpu_memory import Decoding, choose_decoding, held_bytes, preallocated_bytes, preallocation
from dali_lmdb.loaders.graph_settings import log_decoding, usual_size
from dali_lmdb.loaders.settings import DaliSettings
from dali_lmdb.loaders.versions import has_fancy_windows, nvimagecodec_version, nvjpeg_version
from dali_lmdb.plan.augment import EvalTransform, TrainTransform
from dali_lmdb.store import open_store

GIB = 1 << 30
IMAGENET = {"height": 500, "width": 600, "batch_size": 256, "num_threads": 8, "hw_decoder_load": 0.65}


# --- decode="auto"


@pytest.mark.parametrize(
    ("decode", "decode_device", "device", "image_bytes", "expected"),
    [
        ("auto", None, "cuda", 20 * GIB, ("image", "gpu")),
        ("auto", None, "cuda", 20 * GIB + 1, ("window", "cpu")),  # more than a quarter of the GPU's 80 GiB
        ("auto", "gpu", "cuda", 20 * GIB, ("image", "gpu")),
        ("auto", "gpu", "cuda", 20 * GIB + 1, ("window", "gpu")),
        ("auto", "cpu", "cuda", 1, ("window", "cpu")),
        ("auto", "cpu", "cuda", 100 * GIB, ("window", "cpu")),
        ("auto", None, "cpu", 100 * GIB, ("window", "cpu")),
        ("auto", "cpu", "cpu", 1, ("window", "cpu")),
        # What was asked for is done, however large.
        ("image", None, "cuda", 100 * GIB, ("image", "gpu")),
        ("image", "cpu", "cuda", 100 * GIB, ("image", "cpu")),
        ("image", None, "cpu", 100 * GIB, ("image", "cpu")),
        ("window", None, "cuda", 1, ("window", "gpu")),
        ("window", "cpu", "cuda", 1, ("window", "cpu")),
        ("window", None, "cpu", 1, ("window", "cpu")),
    ],
)
def test_the_way_of_decoding_is_what_was_asked_for_and_fits(decode, decode_device, device, image_bytes, expected):
    dali = DaliSettings(decode=decode, decode_device=decode_device)
    gpu_bytes = 80 * GIB if device == "cuda" else 0
    assert choose_decoding(dali, device=device, image_bytes=image_bytes, gpu_bytes=gpu_bytes) == Decoding(
        *expected
    )


@pytest.mark.parametrize(
    ("nvjpeg", "expected"),
    [(None, False), ((12, 4, 0), False), ((13, 1, 9), False), ((13, 2, 0), True), ((14, 0, 0), True)],
)
def test_windows_have_fancy_upsampling_from_nvjpeg_13_2_on(nvjpeg, expected):
    assert has_fancy_windows(nvjpeg) == expected


def test_reports_name_the_installed_versions():
    codec, jpeg = nvimagecodec_version(), nvjpeg_version()
    numbers = re.fullmatch(r"nvJPEG ([\d.]+) \(nvImageCodec ([\d.]+)\)", gpu_decoder()).groups()
    found = [tuple(map(int, number.split(".")[:3])) for number in numbers]
    assert found == [jpeg, codec]


def test_versions_are_read_without_a_gpu():
    assert nvimagecodec_version() >= (0, 5, 0)
    assert nvjpeg_version() is not None
    assert nvjpeg_version() >= (12, 0, 0)


# --- what is preallocated


def test_usual_images_are_preallocated_for_as_dali_does_by_default():
    assert preallocation(**IMAGENET, budget_bytes=GIB) == (500, 600, 16 << 20, 8 << 20)


def test_large_images_have_buffers_of_their_size_while_they_fit():
    few = {"batch_size": 8, "num_threads": 1, "hw_decoder_load": 0.0}
    found = preallocation(height=3000, width=4000, **few, budget_bytes=GIB)
    assert found == (3000, 4000, 36_000_000, 36_000_000)


@pytest.mark.parametrize("budget_bytes", [0, 1, 1 << 20, GIB, 8 * GIB])
def test_what_is_preallocated_never_exceeds_the_budget(budget_bytes):
    sizes = [(0, 0), (1, 1), (375, 500), (3000, 4000), (65_500, 65_500)]
    for (height, width), batch_size, num_threads, hw_decoder_load in itertools.product(
        sizes, [1, 64, 256, 2048], [1, 8, 70, 256], [0.0, 0.01, 0.65, 1.0]
    ):
        own = {"batch_size": batch_size, "num_threads": num_threads, "hw_decoder_load": hw_decoder_load}
        found = preallocation(height=height, width=width, **own, budget_bytes=budget_bytes)
        assert min(found) >= 0
        assert found.height_hint <= height
        assert found.width_hint <= width
        assert preallocated_bytes(settings("cuda", **own, **found._asdict())) <= budget_bytes
        assert 2 * (num_threads + 1) * found.host_memory_padding <= budget_bytes


def test_a_large_batch_of_large_images_takes_half_of_the_budget_for_the_engine():
    found = preallocation(**IMAGENET | {"height": 3000, "width": 4000}, budget_bytes=GIB)
    engine = 192 * 3 * found.height_hint * found.width_hint  # 0.65 x 256, rounded up to whole rounds of the engine
    assert 0.99 * GIB / 2 < engine <= GIB / 2
    assert found.width_hint / found.height_hint == pytest.approx(4 / 3, rel=0.01)


# --- what is held


def test_the_estimate_of_what_is_held_counts_every_batch_in_work():
    graph = settings("cuda", batch_size=256, hw_decoder_load=0.0, num_threads=1, device_memory_padding=0)
    image, output = 3 * 375 * 500, 3 * 224 * 224
    window = replace(graph, decode="window")
    on_cpu = replace(graph, decode="window", decode_device="cpu")
    one_batch = 256 * (output + 2 * output)  # as uint8, then as float16
    with_consumer = 256 * 2 * output
    assert held_bytes(graph, pixels=375 * 500) == 2 * (256 * 2 * image + one_batch) + with_consumer
    assert held_bytes(window, pixels=375 * 500) == 2 * (256 * image + one_batch) + with_consumer
    assert held_bytes(on_cpu, pixels=375 * 500) == held_bytes(window, pixels=375 * 500)
    deeper = replace(graph, prefetch_queue_depth=3)
    assert held_bytes(deeper, pixels=375 * 500) == 3 * (256 * 2 * image + one_batch) + with_consumer
    assert held_bytes(settings("cpu"), pixels=375 * 500) == 0


def test_only_nvjpeg_preallocates_on_the_gpu():
    graph = settings("cuda")
    assert preallocated_bytes(graph) == 64 * 3 * 500 * 600 + 4 * (16 << 20)  # four threads: three and the caller
    assert preallocated_bytes(replace(graph, decode_device="cpu")) == 0


def test_the_largest_scheduled_size_counts():
    transform = TrainTransform(size=64, size_schedule=((2, 160), (5, 128)))
    assert (transform.largest_size, EvalTransform(size=96).largest_size) == (160, 96)
    small, large = (settings("cuda") for _ in range(2))
    small, large = replace(small, transform=TrainTransform(size=64)), replace(large, transform=transform)
    assert held_bytes(large, pixels=1) > held_bytes(small, pixels=1)


# --- the loader


def test_a_loader_on_the_cpu_decodes_windows_and_holds_no_gpu_memory(store_path, caplog):
    caplog.set_level(logging.INFO, logger="dali_lmdb")
    with DaliLoader(store_path, transform=TrainTransform(), batch_size=4, device="cpu") as loader:
        assert (loader.graph.decode, loader.graph.decode_device) == ("window", "cpu")
        assert loader.graph.fancy_upsampling
        assert loader.gpu_memory_bytes == loader.stats()["gpu_memory_bytes"] == 0
    assert caplog.records == []  # there was nothing to choose


@pytest.mark.parametrize(
    ("changes", "dali", "level", "message"),
    [
        ({}, {}, "INFO", "whole images are decoded on the GPU"),
        (
            {"decode": "window", "decode_device": "cpu"},
            {"decode_device": "cpu"},
            "INFO",
            "crop windows .* the CPU",
        ),
        ({"decode": "image", "decode_device": "cpu"}, {"decode": "image"}, "INFO", "whole images .* on the CPU"),
        (
            {"decode": "window", "decode_device": "cpu"},
            {},
            "WARNING",
            "crop windows .* on the CPU; a batch's whole images would take too much",
        ),
        (
            {"decode": "window", "fancy_upsampling": False},
            {"decode_device": "gpu"},
            "WARNING",
            "on the GPU; a batch's .*; without fancy upsampling of chroma",
        ),
        ({"decode": "window", "fancy_upsampling": False}, {"decode": "window"}, "INFO", "the GPU; without fancy"),
    ],
)
def test_the_log_says_how_images_are_decoded_and_warns_if_they_do_not_fit(
    store_path, caplog, changes, dali, level, message
):
    caplog.set_level(logging.INFO, logger="dali_lmdb")
    with open_store(store_path) as store:
        log_decoding(store, DaliSettings(**dali), settings("cuda", **changes))
    (record,) = caplog.records
    assert record.levelname == level
    assert re.search(message, record.getMessage())


def test_one_giant_does_not_decide_what_is_usual(tmp_path):
    sizes = [(300, 400)] * 100 + [(400, 300)] * 99 + [(9000, 9000)]
    path = write_store(tmp_path / "x.lmdb", [b"not an image"] * len(sizes), sizes=sizes)
    with open_store(path) as store:
        assert usual_size(store) == (400, 400, 300 * 400)


def test_the_loader_has_every_option_of_dali_and_open_loader_hands_them_over(store_path, tmp_path):
    defaults = inspect.signature(DaliLoader).parameters
    assert {field.name: field.default for field in fields(DaliSettings)} == {
        field.name: defaults[field.name].default for field in fields(DaliSettings)
    }
    dali = DaliSettings(prefetch_queue_depth=3, hw_decoder_load=0.25, decode="image", num_threads=7)
    arguments = {
        "transform": TrainTransform(size=16),
        "batch_size": 4,
        "device": "cpu",
        "rank": 0,
        "world_size": 1,
    }
    quarantine = tmp_path / "bad.jsonl"
    for backend in ("dali", "torch"):
        with open_loader(
            store_path, backend=backend, workers=2, dali=dali, quarantine=quarantine, **arguments
        ) as loader:
            assert loader.settings.quarantine == quarantine
            if backend == "dali":
                graph = loader.graph
    assert (graph.num_threads, graph.prefetch_queue_depth, graph.hw_decoder_load) == (2, 3, 0.25)
    assert graph.decode == "image"
