import collections
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_pipeline_graph import Graph

from dali_lmdb.compare import BACKENDS, CompareSettings, Comparison, Round, compare_throughput
from dali_lmdb.compare.__main__ import main
from dali_lmdb.compare.confidence import interval_of
from dali_lmdb.compare.dali_reader import batches_of, define_reader
from dali_lmdb.compare.repeat import RepeatedStore
from dali_lmdb.compare.report import driver_of
from dali_lmdb.compare.table import markdown, table
from dali_lmdb.compare.throughput import (
    _data_by_backend,
    _in_own_process,
    _measurements,
    _open_loader,
    _reader_window,
    resolve,
)
from dali_lmdb.compare.transforms_v2 import V2Loader
from dali_lmdb.compare.usage import storage_bytes
from dali_lmdb.compare.window import Window, measure, warm_up_steps
from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.errors import DeviceError, RecordError, SourceError, StoreError, StoreNotFoundError
from dali_lmdb.loaders.folder import FolderStore, open_data
from dali_lmdb.store import open_store

NUM_CLASSES, PER_CLASS = 2, 5
QUICK = CompareSettings(
    batch_size=4, rounds=2, seconds=0.05, workers=1, size=16, device="cpu", only=("torch", "dali"), arch=None
)
ALL = replace(QUICK, only=())


def make_folder(path, *, per_class=PER_CLASS):
    """Record i is an image of grey level 20 i."""
    for label in range(NUM_CLASSES):
        folder = path / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            grey = 20 * (label * per_class + number)
            Image.new("RGB", (40, 30), (grey,) * 3).save(folder / f"{number}.jpg")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("stores") / "train.lmdb"
    convert(folder, target)
    return target


def settings(**overrides):
    return CompareSettings(**{**vars(QUICK), **overrides})


def test_every_backend_is_measured_in_every_round_and_training_too(store, folder):
    used = replace(ALL, arch="auto", size=32, batch_size=None)
    result = compare_throughput(store, images=folder, settings=used)
    assert (result.settings.arch, result.settings.train_batch_size) == ("resnet18", 8)
    loading = ["files", "torch", "torch-v2", "dali", "dali-image", "reader", "decode"]
    training = ["model", "torch+model", "dali+model"]
    assert [found.backend for found in result.measurements] == loading + training
    for found in result.measurements:
        assert len(found.rounds) == len(found.ratios) == 2
        assert min(found.rounds) > 0
        assert found.base == ("torch" if found.backend in loading else "torch+model")
        assert 0 < found.cores < 2 * len(os.sched_getaffinity(0))
        assert found.memory_bytes > 50e6  # Python with torch
        assert (found.read_bytes_per_image is None) == (storage_bytes() is None)
        for window in found.windows:
            assert window.cpu_s_per_image * window.images_per_s == pytest.approx(window.cores)
    assert result.conclusion.startswith("dali gives ")
    assert table(result).splitlines()[-1] == result.conclusion


def test_without_an_image_folder_only_the_store_is_read(store):
    assert list(_data_by_backend(open_store(store), None, ALL)) == [
        "torch",
        "torch-v2",
        "dali",
        "dali-image",
        "decode",
    ]


def test_only_some_can_be_measured_and_the_first_is_the_base_without_torch(store):
    result = compare_throughput(store, settings=settings(rounds=1, only=("decode", "dali")))
    assert [(found.backend, found.base) for found in result.measurements] == [("dali", "dali"), ("decode", "dali")]
    with pytest.raises(ValueError, match=r"only: '', modle cannot be measured here, .* decode, model, torch"):
        compare_throughput(store, settings=settings(only=("", "modle"), arch="auto"))
    with pytest.raises(ValueError, match="files, tarot cannot be measured here, only torch, torch-v2, dali"):
        compare_throughput(store, settings=settings(only=("dali", "files", "tarot")))


def rounds_of(random, *, slowdown, noise=0.03, rounds=5):
    """Rounds of two backends; the machine's speed changes from round to round by more than either's noise."""
    speeds = []
    for _ in range(rounds):
        machine, own, other = random.lognormal(7, 0.3), random.lognormal(0, noise), random.lognormal(0, noise)
        window = Window(0.0, 0.001, 1.0, 0)
        values = {"torch": machine * own, "dali": machine * other * (1 - slowdown)}
        windows = {name: window._replace(images_per_s=value) for name, value in values.items()}
        speeds.append(Round(number=1, windows=windows))
    return speeds


def test_a_slowdown_of_10_percent_is_told_apart_from_noise_and_none_is_claimed_without_it():
    random = np.random.default_rng(0)

    def share_claimed(**planted):
        found = [_measurements(rounds_of(random, **planted))[1].interval for _ in range(400)]
        return np.mean([interval.high < 1 for interval in found]), np.mean(
            [interval.low > 1 for interval in found]
        )

    assert share_claimed(slowdown=0.1, noise=0.015) == (pytest.approx(1, abs=0.02), 0)
    slower, faster = share_claimed(slowdown=0.0)
    assert slower + faster < 0.025  # 1 % is expected


def test_one_round_claims_nothing():
    assert not interval_of([1.9]).differs
    assert interval_of([1.9, 1.9, 1.9]).differs


MODEL = "times T: the model is the limit"
NEITHER = "which is not told apart from 1: neither is shown to be the limit"
SAME = (97, 101, 100)


@pytest.mark.parametrize(
    ("dali", "both", "sentence"),
    [
        (
            (210, 213, 214),
            (80, 81, 81),
            f"2.13 {MODEL}; training reaches 81% of the model alone",
        ),
        ((50, 51, 52), SAME, "0.51 times T: dali is the limit; training is not told apart from the model alone"),
        ((12345, 12345, 12345), None, f"123 {MODEL}"),
        (SAME, (50, 50, 51), f"1.00 times T, {NEITHER}; training reaches 50% of the model alone"),
        ((90, 120, 130), None, f"1.20 times T, {NEITHER}"),
        ((400,), None, f"4.00 times T, {NEITHER}"),
    ],
)
def test_the_conclusion_claims_a_limit_only_where_the_interval_shows_one(dali, both, sentence):
    model = (100, 100, 100)[: len(dali)]
    speeds = {"dali": dali, "model": model} | ({} if both is None else {"dali+model": both})
    window = Window(0.0, 0.001, 1.0, 0)
    rounds = [
        Round(number=1, windows={name: window._replace(images_per_s=speeds[name][place]) for name in speeds})
        for place in range(len(dali))
    ]
    result = Comparison(
        **dict.fromkeys(("store", "num_records", "image_bytes", "versions", "machine", "decoding")),
        failed={},
        settings=replace(QUICK, arch="resnet18"),
        measurements=_measurements(rounds),
    )
    assert result.conclusion == "dali gives " + sentence.replace("T", "what resnet18 takes here")


def test_ratio_is_the_median_of_the_ratios_inside_rounds(store):
    seen = []
    result = compare_throughput(store, settings=settings(rounds=3), progress=seen.append)
    ratios = [one.images_per_s["dali"] / one.images_per_s["torch"] for one in seen[1:]]
    measured = {found.backend: found for found in result.measurements}
    assert measured["dali"].ratio == sorted(ratios)[1]
    assert measured["torch"].ratio == 1


def test_warm_up_is_reported_but_not_counted(store):
    seen = []
    result = compare_throughput(store, settings=QUICK, progress=seen.append)
    assert [one.number for one in seen] == [0, 1, 2]
    torch_rounds = result.measurements[0].rounds
    assert torch_rounds == [one.images_per_s["torch"] for one in seen[1:]]


def test_order_of_the_backends_is_reversed_from_round_to_round(store, folder):
    seen = []
    order = ["files", "torch", "dali"]
    compare_throughput(store, images=folder, settings=settings(only=tuple(order)), progress=seen.append)
    assert [list(one.images_per_s) for one in seen] == [order, order[::-1], order]


def test_workers_of_a_backend_are_gone_when_its_window_is_over(store):
    left = []
    compare_throughput(
        store,
        settings=settings(workers=2, only=("torch", "torch-v2", "dali")),
        progress=lambda _: left.extend(multiprocessing.active_children()),
    )
    assert left == []


def test_workers_of_torchvisions_parts_last_so_that_what_they_take_is_counted(store):
    used = settings()
    loader = V2Loader(
        open_store(store), transform=used.transform, batch_size=4, num_workers=1, seed=0, device="cpu"
    )
    seen = []
    for _ in range(2):
        assert sum(len(labels) for _, labels in loader) == 8
        seen.append([child.pid for child in multiprocessing.active_children()])
    assert len(seen[0]) == 1
    assert seen[0] == seen[1]


@pytest.mark.parametrize("task", ["train", "eval"])
def test_backends_of_a_round_yield_the_same_batches(store, folder, task):
    found = []
    for backend, data in (("files", open_data(folder)), ("torch", open_store(store)), ("dali", open_store(store))):
        with _open_loader(backend, RepeatedStore(data, times=3), settings(task=task)) as loader:
            loader.set_epoch(1)
            batches = [(images.clone(), labels.clone()) for images, labels in loader]
            assert len(batches) == 30 // 4  # full batches only
            found.append([torch.cat(part) for part in zip(*batches, strict=True)])
    for images, labels in found[1:]:
        assert torch.equal(labels, found[0][1])
        # Flat grey images: the records lie 0.35 apart after normalising, decoders differ by less than 0.05.
        assert (images - found[0][0]).abs().max() < 0.05


def test_batches_prefetched_before_the_window_do_not_count():
    workers = 3

    class Loader:
        def __iter__(self):
            for _ in range(2 * workers):  # what they have prefetched
                yield None, range(10**15)
            while True:
                yield None, range(1)

    assert measure(Loader(), settings(workers=workers), burst=workers).images_per_s < 10**9


def test_batch_size_is_cut_down_to_the_records_of_the_store(store):
    result = compare_throughput(store, settings=settings(rounds=1, batch_size=500))
    assert result.settings.batch_size == 10


def test_settings_of_the_result_say_what_was_used(store):
    result = compare_throughput(store, settings=settings(rounds=1, workers=None, device="auto"))
    assert result.settings.workers >= 1
    assert result.settings.device == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("device", "burst", "steps"), [("cpu", 1, 3), ("cpu", 8, 17), ("cuda", 1, 50), ("cuda", 32, 65)]
)
def test_warm_up_exceeds_what_is_prefetched_and_is_at_least_50_steps_on_a_gpu(device, burst, steps):
    assert warm_up_steps(device, burst=burst) == steps


def test_on_a_gpu_decoding_on_the_cpu_is_a_backend_of_its_own_unless_it_is_chosen(store, folder):
    def backends(**chosen):
        return list(_data_by_backend(open_store(store), folder, settings(device="cuda", only=(), **chosen)))

    assert backends() == ["files", "torch", "torch-v2", "dali", "dali-cpu", "reader", "decode"]
    assert backends(decode_device="gpu") == ["files", "torch", "torch-v2", "dali", "reader", "decode"]


def test_on_a_gpu_images_are_float16_and_channels_last():
    on_gpu = settings(device="cuda")
    assert (on_gpu.dtype, on_gpu.layout) == ("float16", "NHWC")


def test_defaults_on_the_cpu_are_those_of_a_small_machine(store):
    result = compare_throughput(store, settings=settings(rounds=1, batch_size=None))
    used = result.settings
    assert resolve(CompareSettings(device="cpu"), RepeatedStore(open_store(store), times=100)).batch_size == 64
    assert (used.batch_size, used.dtype, used.layout) == (10, "float32", "NCHW")


def test_what_is_decoded_where_can_be_chosen(store):
    result = compare_throughput(store, settings=settings(rounds=1, decode="image", decode_device="cpu"))
    assert result.decoding == {"dali": {"decode": "image", "decode_device": "cpu"}}


def test_the_gpu_cannot_decode_for_the_cpu(store):
    with pytest.raises(ValueError, match="decode_device is 'gpu' with device 'cpu'"):
        compare_throughput(store, settings=settings(decode_device="gpu"))


@pytest.fixture
def rising(tmp_path):
    """Images whose grey level rises from left to right by 120, from 0, 60 and 120."""
    folder = tmp_path / "rising" / "class0"
    folder.mkdir(parents=True)
    for number in range(3):
        row = np.linspace(60 * number, 60 * number + 120, 40).astype(np.uint8)
        Image.fromarray(np.tile(row, (30, 1))).save(folder / f"{number}.jpg", quality=95)
    return folder.parent


def test_the_reader_evaluates_as_the_loader_does(rising, tmp_path):
    convert(rising, tmp_path / "rising.lmdb")
    images, labels = next(batches_of(reader_of(rising, task="eval", batch_size=3)))
    data, used = open_store(tmp_path / "rising.lmdb"), settings(task="eval", batch_size=3)
    with _open_loader("dali", data, used) as loader:
        theirs, their_labels = next(iter(loader))
        assert labels[:, 0].tolist() == their_labels.tolist()
        assert (images - theirs).abs().max() < 0.1  # six of 255 grey levels


def test_the_reader_trains_on_random_crops_and_flips(rising):
    images, _ = next(batches_of(reader_of(rising, batch_size=60)))
    assert (images.dtype, images.shape) == (torch.float32, (60, 3, 16, 16))
    rises = (images[..., -1] - images[..., 0]).mean(dim=(1, 2))  # 120 grey levels are 2.1 after normalising
    assert 10 < (rises > 0).sum() < 50
    assert rises.abs().max() < 2.4
    assert rises.abs().min() < 0.9
    assert len(set(rises.tolist())) > 30


def reader_of(folder, *, device_id=None, decode_device="cpu", **overrides):
    used = settings(**overrides)
    images = FolderStore(folder)
    return define_reader(
        images.files,
        images.labels.tolist(),
        transform=used.transform,
        batch_size=used.batch_size,
        device_id=device_id,
        decode_device=decode_device,
        hw_decoder_load=0.25,
        num_threads=1,
        seed=3,
    )


@pytest.mark.parametrize("task", ["train", "eval"])
@pytest.mark.parametrize("decode_device", ["gpu", "cpu"])
def test_the_reader_of_a_gpu_works_there_after_decoding(folder, task, decode_device):
    way = Graph(reader_of(folder, task=task, device_id=0, decode_device=decode_device)).way_of_the_images()
    on_gpu = decode_device == "gpu"
    decoder = "ImageRandomCrop" if task == "train" else "Image"
    assert [(operator.name, operator.device) for operator in way] == [
        ("readers__File", "cpu"),
        (f"decoders__{decoder}", "mixed" if on_gpu else "cpu"),
        ("Resize", "gpu"),
        ("CropMirrorNormalize", "gpu"),
    ]
    assert way[1].arguments.get("hw_decoder_load") == ("0.250000" if on_gpu else None)
    assert way[3].arguments["output_layout"] == "HWC"


def test_the_reader_goes_on_without_an_end(folder):
    batches = itertools.islice(batches_of(reader_of(folder, batch_size=4)), 6)
    seen = collections.Counter(label for _, labels in batches for label in labels[:, 0].tolist())
    assert sum(seen.values()) == 24


def test_a_reader_that_fails_costs_only_its_row(tmp_path):
    images = make_folder(tmp_path / "images")
    Image.new("L", (40, 30)).save(images / "class1" / "4.jpg", "GIF")  # which DALI does not decode, Pillow does
    Image.new("L", (40, 30)).save(images / "class1" / "3.jpg", "TIFF")  # which torchvision does not decode
    convert(images, tmp_path / "gif.lmdb")
    seen = []
    used = settings(only=("files", "torch", "torch-v2", "dali", "reader", "decode"))
    result = compare_throughput(tmp_path / "gif.lmdb", images=images, settings=used, progress=seen.append)
    assert [found.backend for found in result.measurements] == ["files", "torch", "dali"]
    assert list(result.failed) == ["torch-v2", "reader", "decode"]
    assert "\n" not in result.failed["reader"]
    assert result.failed["torch-v2"].startswith("RuntimeError: decode_image")
    assert f"reader: not measured: {result.failed['reader']}" in table(result).splitlines()
    assert f"* reader: not measured: {result.failed['reader']}" in markdown(result).splitlines()


def test_a_window_in_a_process_of_its_own_is_measured_too(folder):
    assert _in_own_process(_reader_window, FolderStore(folder), QUICK, 1).images_per_s > 0


def test_a_process_that_crashes_is_an_error():
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        _in_own_process(signal.raise_signal, signal.SIGKILL)


def test_the_table_of_a_gpu_says_what_decoding_depends_on(store):
    found = compare_throughput(store, settings=settings(rounds=1))
    on_gpu = replace(
        found,
        settings=replace(found.settings, device="cuda", hw_decoder_load=0.12),
        machine=found.machine | {"gpu": "NVIDIA H100", "driver": "550.54.14"},
        versions=found.versions | {"nvidia-dali-cuda120": "2.4.0", "nvimagecodec": "0.9.0", "nvjpeg": "12.4.0"},
    )
    line = "DALI 2.4.0, nvImageCodec 0.9.0, nvJPEG 12.4.0, driver 550.54.14; hw_decoder_load 0.12, float16 NHWC"
    assert line in table(on_gpu).splitlines()
    assert "driver" not in table(found)


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build  (dvs-builder@U16)",
    ],
    ids=["proprietary", "open"],
)
def test_the_drivers_version_is_what_its_kernel_module_says(text):
    assert driver_of(text) == "550.54.14"
    assert driver_of("") == "unknown"


@pytest.mark.gpu
def test_backends_are_measured_on_the_gpu(store, folder):
    used = settings(device="cuda", only=(), arch="resnet18", size=32)
    result = compare_throughput(store, images=folder, settings=used)
    assert result.machine["gpu"]
    assert result.machine["driver"] != "unknown"
    measured = [found.backend for found in result.measurements]
    assert {*measured, *result.failed} == set(BACKENDS) - {"dali-image"}
    assert min(min(found.rounds) for found in result.measurements) > 0


def test_repeated_store_is_the_store_over_and_over(store):
    once = open_store(store)
    twice = RepeatedStore(once, times=2)
    assert len(twice) == 20
    assert twice.labels.tolist() == once.labels.tolist() * 2
    records = np.array([3, 13, 19])
    assert twice.gather("label", records).tolist() == [0, 0, 1]
    assert [bytes(array) for array in twice.arrays(records)] == [bytes(once.read(i)) for i in (3, 3, 9)]
    assert twice.name(13) == once.name(3) == "class0/3.jpg"
    [(file, offsets, lengths)] = twice.byte_ranges(records)
    [(_, expected_offsets, _)] = once.byte_ranges(records % 10)
    assert file == store
    assert offsets.tolist() == expected_offsets.tolist()
    assert lengths.tolist() == [len(array) for array in twice.arrays(records)]
    assert twice.fingerprint != once.fingerprint
    with pytest.raises(IndexError, match="expected 0 to 19"):
        twice.name(20)


def test_repeated_store_pickles_for_spawned_workers(store):
    twice = pickle.loads(pickle.dumps(RepeatedStore(open_store(store), times=2)))
    assert len(twice) == 20
    assert bytes(twice.read(13)) == bytes(open_store(store).read(3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"rounds": 0},
        {"size": 0},
        {"seconds": 0},
        {"seconds": float("nan")},
        {"workers": 0},
        {"device": "tpu"},
        {"task": "predict"},
        {"decode": "region"},
        {"decode_device": "tpu"},
        {"hw_decoder_load": 2.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*expected"):
        settings(**wrong)


def test_a_model_is_trained_unless_there_is_nothing_to_train(store):
    def arch(**chosen):
        return resolve(CompareSettings(device="cpu", **chosen), open_store(store)).arch

    assert arch() == "resnet18"
    assert arch(task="eval") is arch(arch=None) is None
    loading = compare_throughput(store, settings=settings(arch="auto", rounds=1, only=("dali",)))
    assert loading.settings.arch is None
    with pytest.raises(ValueError, match="only: model cannot be measured here, only torch, torch-v2, dali"):
        compare_throughput(store, settings=settings(arch="auto", task="eval", only=("model",)))


def test_a_model_trains_in_steps_that_a_cpu_takes_in_time(store):
    many = RepeatedStore(open_store(store), times=100)

    def sizes(**chosen):
        used = resolve(CompareSettings(**{"device": "cpu", **chosen}), many)
        return used.batch_size, used.for_training.batch_size

    assert sizes() == (64, 8)
    assert sizes(batch_size=32) == (32, 32)
    assert sizes(batch_size=32, train_batch_size=4) == (32, 4)


def test_a_model_that_cannot_be_trained_costs_only_its_rows(store):
    # BatchNorm refuses one value per channel, which is what an image of 32 pixels leaves at the end.
    used = settings(arch="resnet18", size=32, train_batch_size=1, rounds=1, only=("torch", "model", "torch+model"))
    result = compare_throughput(store, settings=used)
    assert [found.backend for found in result.measurements] == ["torch"]
    assert list(result.failed) == ["model", "torch+model"]
    assert "more than 1 value per channel" in result.failed["model"]
    with pytest.raises(StoreError, match="model cannot be measured: Expected more than 1 value"):
        compare_throughput(store, settings=replace(used, only=("model",)))


def test_a_model_must_exist_and_be_trained():
    with pytest.raises(ValueError, match="no classification model 'resnet1'; did you mean"):
        settings(arch="resnet1")
    with pytest.raises(ValueError, match="arch needs task 'train'"):
        settings(arch="resnet18", task="eval")


def test_missing_store_is_an_error(tmp_path):
    with pytest.raises(StoreNotFoundError):
        compare_throughput(tmp_path / "none.lmdb", settings=QUICK)


@pytest.mark.parametrize("name", ["missing", "file.txt", "empty"])
def test_image_folder_that_is_none_is_an_error(store, tmp_path, name):
    (tmp_path / "file.txt").write_text("no images")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=name):
        compare_throughput(store, images=tmp_path / name, settings=QUICK)


def test_image_folder_of_other_records_is_refused(store, tmp_path):
    other = make_folder(tmp_path / "other", per_class=3)
    with pytest.raises(SourceError, match="6 images of 2 classes are not the 10 records of 2 classes"):
        compare_throughput(store, images=other, settings=QUICK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(store):
    with pytest.raises(DeviceError, match="no usable GPU"):
        compare_throughput(store, settings=settings(device="cuda"))


def test_image_that_cannot_be_decoded_is_an_error(tmp_path):
    images = make_folder(tmp_path / "images")
    (images / "class1" / "4.jpg").write_bytes(b"\xff\xd8 not a JPEG")
    convert(images, tmp_path / "bad.lmdb", settings=ConvertSettings(check="none"))
    with pytest.raises(RecordError, match=re.escape("record 9 (class1/4.jpg)")):
        compare_throughput(tmp_path / "bad.lmdb", settings=QUICK)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


QUICK_OPTIONS = (
    "--batch-size",
    4,
    "--rounds",
    1,
    "--seconds",
    0.05,
    "--workers",
    1,
    "--size",
    16,
    "--device",
    "cpu",
)


def test_command_prints_a_table(store, folder):
    result = run(store, "--images", folder, "--only", "files,torch,dali", *QUICK_OPTIONS)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{store}: 10 records, 0.0 MB"
    assert [line.split()[0] for line in lines[5:8]] == ["files", "torch", "dali"]
    assert lines[6].split()[4:7] == ["1.00", "-", "-"]
    assert "dali    store, DALI (windows decoded on the CPU)" in lines
    assert lines[-1] == "not told apart from torch, with 99 % confidence: files, dali"  # in one round


def test_command_prints_markdown_and_draws_bars(store, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    picture = tmp_path / "bars.png"
    result = run(store, "--only", "torch,dali", "--markdown", "--plot", picture, *QUICK_OPTIONS)
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["", "---", "`torch`", "`dali`"]
    assert len({row.count("|") for row in rows}) == 1
    with Image.open(picture) as drawn:
        drawn.load()
        assert min(drawn.size) > 300
        colors = drawn.convert("RGBA").getcolors(1 << 20)
    assert max(colors)[1][3] == 0  # transparent: for light and dark pages
    assert any(color == (0x3B, 0x76, 0xAF, 255) for _, color in colors)
    assert os.listdir(tmp_path) == ["bars.png"]


@pytest.mark.parametrize("name", ["bars.txt", "none/bars.png"])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(store, tmp_path, name):
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    result = run(store, "--plot", tmp_path / name, *QUICK_OPTIONS)
    assert (result.exit_code, result.stdout) == (1, "")
    assert name in result.stderr
    assert result.stderr.count("\n") == 1


def test_command_prints_one_json_object(store):
    result = run(store, "--task", "eval", "--json", "--only", "torch,dali", *QUICK_OPTIONS)  # trains nothing
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["settings"] == {
        "batch_size": 4,
        "train_batch_size": 4,
        "rounds": 1,
        "seconds": 0.05,
        "workers": 1,
        "size": 16,
        "device": "cpu",
        "decode": "auto",
        "decode_device": None,
        "hw_decoder_load": 0.65,
        "task": "eval",
        "arch": None,
        "only": ["torch", "dali"],
    }
    assert values["images"] == {"dtype": "float32", "layout": "NCHW"}
    assert values["decoding"] == {"dali": {"decode": "window", "decode_device": "cpu"}}
    assert values["failed"] == {}
    assert list(values["backends"]) == ["torch", "dali"]
    speed = values["backends"]["dali"]["images_per_s"]
    assert speed["min"] == speed["median"] == speed["max"] == speed["rounds"][0]
    torch_speed = values["backends"]["torch"]["images_per_s"]["median"]
    assert values["backends"]["dali"]["ratio"] == pytest.approx(speed["median"] / torch_speed)
    assert values["versions"]["torch"] == torch.__version__.split("+")[0]
    assert values["versions"]["nvimagecodec"].count(".") == 2
    assert values["versions"]["nvjpeg"].count(".") == 2
    assert values["machine"]["cores"] >= 1


def test_command_says_in_one_line_what_is_wrong(tmp_path):
    result = run(tmp_path / "none.lmdb", *QUICK_OPTIONS)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: no store at ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("wrong", [("--batch-size", 0), ("--seconds", 0), ("--task", "x"), ()])
def test_wrong_usage_ends_with_code_2(store, wrong):
    arguments = (store, *wrong) if wrong else ()
    assert run(*arguments).exit_code == 2
