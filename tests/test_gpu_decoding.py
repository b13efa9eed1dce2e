"""How a GPU decodes: by which decoder, with which pixels, within which memory.

Most of it runs on a CPU too, so that the checks themselves are tested where there is no GPU.

Nothing here decodes windows on a GPU in the tests' own process: nvImageCodec issue 55 reports crashes.
"""

import gc
import itertools
import threading

import pytest
import torch
from gpu_checks import (
    assert_alike,
    by_record,
    drain,
    grey_levels,
    store_of_giants,
    store_of_pictures,
    used_bytes,
)
from gpu_steps.isolated import Step, run_step

from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import EvalTransform, TrainTransform

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
TRAIN = TrainTransform(size=96)
EVAL = EvalTransform(size=96, resize=112)
LIMIT_S = 120
GPU = pytest.mark.gpu
WINDOWS = pytest.mark.xfail(reason="nvImageCodec issue 55: windows fail on A100 and crash on H100", strict=False)

MODES = [
    pytest.param("cpu", "window", "cpu", id="cpu: window"),
    pytest.param("cuda", "image", "gpu", id="gpu: image", marks=GPU),
    pytest.param("cuda", "window", "gpu", id="gpu: window", marks=[GPU, WINDOWS]),
    pytest.param("cuda", "image", "cpu", id="gpu: image on the cpu", marks=GPU),
    pytest.param("cuda", "window", "cpu", id="gpu: window on the cpu", marks=GPU),
]


@pytest.fixture(scope="module")
def picture_path(tmp_path_factory):
    """A store of 24 pictures that look like photos, 18 of which nvJPEG decodes at least."""
    return store_of_pictures(tmp_path_factory.mktemp("pictures") / "pictures.lmdb")


@pytest.fixture
def make(picture_path):
    """Makes loaders of pictures that give every record and its index; they are closed at the test's end."""
    made = []

    def make_loader(path=picture_path, **arguments):
        usual = {"batch_size": 8, "last_batch": "short", "return_index": True, "num_threads": 2}
        made.append(DaliLoader(path, **usual | arguments))
        return made[-1]

    yield make_loader
    for loader in made:
        loader.close()


def run(function, **arguments):
    """Run a step of the report in a process of its own; its rows, if nothing is wrong."""
    found = run_step(Step(name=function, function=function, arguments=arguments, limit_s=LIMIT_S))
    assert found.status == "ok", f"{found.cause}\n{found.log}"
    return found.rows


# --- decode modes


@pytest.mark.parametrize(("device", "decode", "decode_device"), MODES)
def test_each_mode_decodes_where_it_says(picture_path, device, decode, decode_device):
    rows = run(
        "gpu_steps.decoding:route",
        store=str(picture_path),
        device=device,
        batch_size=24,
        decode=decode,
        decode_device=decode_device,
    )
    images = {row["decoder"]: row["images"] for row in rows}
    assert images["failed, next tried"] == images["window refused"] == 0
    on_cpu = images.get("libjpeg_turbo_decoder", 0)
    assert on_cpu >= 18 if decode_device == "cpu" else on_cpu <= 1  # the CMYK one


@pytest.mark.parametrize(("device", "decode", "decode_device"), MODES)
def test_each_mode_gives_the_cpus_pixels(picture_path, device, decode, decode_device):
    rows = run(
        "gpu_steps.decoding:pixels",
        store=str(picture_path),
        device=device,
        decode=decode,
        decode_device=decode_device,
    )
    assert [(row["transform"], row["against"]) for row in rows] == list(
        itertools.product(("train", "eval"), ("DALI on the CPU", "Pillow"))
    )
    assert {row["images"] for row in rows} == {24}


@DEVICES
def test_both_places_of_decoding_show_the_same_records(make, device):
    places = ["cpu", "gpu"] if device == "cuda" else ["cpu", None]
    ours, theirs = (
        by_record(make(transform=TRAIN, dtype="uint8", device=device, decode_device=place)) for place in places
    )
    assert_alike(ours, theirs, mean=1.5, share=0.995)


# --- erase


@DEVICES
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_erased_pictures_look_as_elsewhere_in_every_type_and_layout(make, picture_path, device, dtype, layout):
    """On a GPU as with DALI on the CPU, there as with Pillow."""
    transform = TrainTransform(size=96, erase=1.0)
    arguments = {"transform": transform, "dtype": dtype, "layout": layout}
    with (
        make(device="cpu", **arguments)
        if device == "cuda"
        else TorchLoader(
            picture_path, **arguments, batch_size=8, last_batch="short", return_index=True, num_workers=0
        )
    ) as reference:
        theirs = by_record(reference)
    ours = by_record(make(device=device, **arguments))
    if dtype != "uint8":
        ours, theirs = ({record: grey_levels(image)[0] for record, image in one.items()} for one in (ours, theirs))
    assert_alike(ours, theirs, mean=1.5, share=0.995)


# --- batches that are short, many loaders, other work on the GPU


@DEVICES
def test_a_run_that_begins_with_a_short_batch_shows_what_a_whole_one_does(make, device):
    arguments = {"transform": TRAIN, "dtype": "uint8", "batch_size": 16, "device": device}
    expected = [by_record([batch]) for batch in itertools.chain(*itertools.repeat(make(**arguments), 2))]
    loader = make(**arguments)
    loader.load_state_dict(make(**arguments).state_dict() | {"position": 16})
    found = [by_record([batch]) for batch in itertools.chain(*itertools.repeat(loader, 2))]
    assert [len(step) for step in found] == [8, 16, 8]
    for ours, theirs in zip(found, expected[1:], strict=True):
        assert_alike(ours, theirs, mean=1.5, share=0.995)


@DEVICES
def test_a_short_first_batch_does_not_cap_the_hardware_engine(picture_path, device):
    arguments = {"store": str(picture_path), "device": device, "batch_size": 16, "positions": [0, 16]}
    whole, resumed = run("gpu_checks:resumed_batches", **arguments)
    assert (whole["sizes"], resumed["sizes"]) == ([16, 8, 16, 8], [8, 16, 8])
    if device == "cuda" and not whole["largest"]:
        pytest.skip("no hardware engine in nvImageCodec's log")
    assert resumed["largest"] == whole["largest"]


@DEVICES
def test_loaders_that_take_turns_do_not_disturb_each_other(make, device):
    """Equal pixels hold for the CUDA decoder; how two loaders share the hardware engine is not documented."""
    both = [
        {"transform": transform, "dtype": "uint8", "device": device, "hw_decoder_load": 0.0}
        for transform in (TRAIN, EVAL)
    ]
    expected = [by_record(make(**arguments)) for arguments in both]
    steps = list(zip(*(make(**arguments) for arguments in both), strict=True))  # all are kept
    for batches, alone in zip(zip(*steps, strict=True), expected, strict=True):
        found = by_record(batches)
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[record], alone[record]) for record in alone)


@DEVICES
@pytest.mark.parametrize("hw_decoder_load", [0.0, 1.0])
def test_pixels_are_right_while_the_device_is_busy(make, device, hw_decoder_load):
    """An H100's engine does not keep to the stream's order (torchvision issue 9606), so it must be waited for."""
    arguments = {"transform": EVAL, "dtype": "uint8", "batch_size": 4}
    expected = by_record(make(device="cpu", resize="dali", **arguments))
    loader = make(device=device, hw_decoder_load=hw_decoder_load, **arguments)
    size, num_epochs = (4096, 10) if device == "cuda" else (64, 1)
    load = torch.rand(size, size, device=device)
    for _ in range(num_epochs):
        shown = []
        for images, labels, records in loader:
            for _ in range(10):
                load = load @ load
                load /= load.norm()
            shown.append((images.clone(), labels, records))
        found = by_record(shown)
        assert found.keys() == expected.keys()
        for record, image in found.items():
            difference = (image - expected[record]).abs()
            assert difference.mean() < 3, record
            assert (difference > 32).float().mean() < 0.01, record


# --- memory


@DEVICES
def test_images_of_12_megapixels_stay_within_the_memory_budget(make, tmp_path, device):
    """64 threads would preallocate 2.3 GB for them. What a batch needs comes on top of the budget."""
    path = store_of_giants(tmp_path / "giants.lmdb", num_records=8)
    before = used_bytes() if device == "cuda" else 0
    arguments = {"decode": "image", "num_threads": 64, "preallocation_bytes": 256 << 20}
    loader = make(path, transform=TRAIN, dtype="uint8", device=device, **arguments)
    drain(loader)
    estimated = loader.stats()["gpu_memory_bytes"]
    if device == "cpu":
        assert estimated == 0
        return
    assert estimated < 2 << 30
    assert used_bytes() - before < 1.5 * estimated + (512 << 20)  # DALI's kernels, and buffers that grow by steps


@pytest.mark.gpu
def test_a_lack_of_memory_is_not_blamed_on_records(picture_path):
    first, second = run(
        "gpu_steps.faults:out_of_memory", store=str(picture_path), batch_size=24, left_bytes=64 << 20
    )
    assert first["bad records"] == 0
    assert second["images"] == 24


@DEVICES
def test_a_loader_that_is_dropped_in_the_middle_of_a_step_leaves_nothing(picture_path, device):
    """Without ``close``, with batches in flight, while a batch of it is still in use."""

    def drop():
        loader = DaliLoader(
            picture_path, transform=TrainTransform(), batch_size=24, device=device, num_threads=2, dtype="float32"
        )
        images, _ = next(iter(loader))
        del loader
        gc.collect()
        return images

    kept = drop()
    copy = kept.clone()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dali_lmdb")]
    before = used_bytes() if device == "cuda" else 0
    for _ in range(5):
        drop()
    assert torch.equal(kept, copy)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dali_lmdb")]
    if device == "cuda":
        assert used_bytes() < before + (64 << 20)
