"""Every kind of image gives Pillow's pixels in both loaders, whoever decodes it."""

import io
import json
import re

import numpy as np
import pytest
import torch
from classic_databases import make_classic
from click.testing import CliRunner
from odd_kinds import AGREED, COLOR, DIFFERING, HEIGHT, saved
from PIL import Image

from dali_lmdb.cli import main
from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.errors import RecordError
from dali_lmdb.images.agreement import dali_agrees
from dali_lmdb.images.header import read_header
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.opening import BadImageError
from dali_lmdb.inspect import info, verify
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import EvalTransform, TrainTransform
from dali_lmdb.store import open_store

FILES = AGREED | {kind: file for kind, (file, _) in DIFFERING.items()}
SHORT_SIDE = EvalTransform(size=HEIGHT, resize=HEIGHT)  # shows the middle as it is

LUMA = np.array([0.299, 0.587, 0.114])


@pytest.fixture(scope="module")
def kinds_path(tmp_path_factory):
    """A store of all kinds, in order, beside some JPEGs."""
    return stored(tmp_path_factory.mktemp("kinds"), {**FILES, "jpeg": saved(COLOR, "JPEG")})


def stored(folder, files, **settings):
    images = folder / "images" / "all"
    images.mkdir(parents=True)
    for number, file in enumerate(files.values()):
        (images / f"{number:03}.jpg").write_bytes(file)
    convert(folder / "images", folder / "x.lmdb", settings=ConvertSettings(**settings))
    return folder / "x.lmdb"


def dali(path, **arguments):
    return DaliLoader(path, device="cpu", num_threads=1, **arguments)


def dali_on_the_gpu(path, **arguments):
    return DaliLoader(path, device="cuda", num_threads=1, **arguments)


def classic(path, **arguments):
    return TorchLoader(path, num_workers=0, **arguments)


def shown(make, path, *, transform=SHORT_SIDE, **arguments):
    """Images as uint8 (n, size, size, 3), of one epoch."""
    with make(path, transform=transform, batch_size=5, dtype="uint8", shuffle="none", **arguments) as loader:
        return torch.cat([images.cpu().clone() for images, _ in loader]).permute(0, 2, 3, 1).numpy()


def middle(file):
    pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
    top, left = ((side - HEIGHT) // 2 for side in pixels.shape[:2])
    return pixels[top : top + HEIGHT, left : left + HEIGHT]


@pytest.mark.parametrize("make", [dali, classic, pytest.param(dali_on_the_gpu, marks=pytest.mark.gpu)])
def test_every_kind_gives_pillows_pixels(kinds_path, make):
    images = shown(make, kinds_path)
    wrong = [kind for kind, image in zip(FILES, images, strict=False) if (image != middle(FILES[kind])).any()]
    assert wrong == []


def test_crops_of_every_kind_are_the_same_in_both_loaders(kinds_path):
    transform = TrainTransform(size=24)
    ours, theirs = (shown(make, kinds_path, transform=transform, last_batch="short") for make in (dali, classic))
    differences = abs(ours.astype(int) - theirs).mean(axis=(1, 2, 3))
    assert [kind for kind, difference in zip(FILES, differences, strict=False) if difference >= 1] == []


@pytest.mark.parametrize("kind", AGREED)
def test_dali_decodes_itself_what_it_agrees_on(kind):
    assert dali_agrees(AGREED[kind])


@pytest.mark.parametrize("kind", DIFFERING)
def test_pillow_decodes_what_dali_would_show_differently(kind):
    assert not dali_agrees(DIFFERING[kind][0])


def test_a_store_of_jpegs_and_agreed_kinds_goes_to_dali_without_a_copy(tmp_path):
    path = stored(tmp_path, AGREED | {"jpeg": saved(COLOR, "JPEG")})
    with dali(path, transform=SHORT_SIDE, batch_size=4) as loader:
        plan = loader.planner.plan(0, 0)
        encoded = loader._make_feed(plan)[0]
        addresses = [array.ctypes.data for array in loader.store.arrays(plan.records)]
    assert [tensor.data_ptr() for tensor in encoded] == addresses


def test_what_pillow_does_not_decode_is_no_image_for_dali_either(tmp_path):
    cut = {kind: DIFFERING[kind][0][:-1200] for kind in ("tiff of floats", "ppm up to 100", "bmp of 16 bits")}
    path = stored(tmp_path, {"good": AGREED["png"], **cut})
    for make in (dali, classic):
        with make(path, transform=SHORT_SIDE, batch_size=1, shuffle="none") as loader:
            steps = iter(loader)
            next(steps)
            for number in range(1, 4):
                with pytest.raises(RecordError, match=rf"record {number} \(all/00{number}.jpg\): not a decodable"):
                    next(steps)
    with dali(path, transform=SHORT_SIDE, batch_size=4, on_bad="substitute") as loader:
        ((images, _),) = loader
        assert (images == images[0]).all()
        assert "truncated" in loader.bad_records[0].cause


def frames_of(*, bits):
    """A JPEG with a frame header for each of some numbers of bits per sample."""
    jpeg = saved(COLOR, "JPEG")
    start, end = jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xc4")
    frame = jpeg[start:end]
    return jpeg[:start] + b"".join(frame[:4] + bytes([depth]) + frame[5:] for depth in bits) + jpeg[end:]


@pytest.mark.parametrize("bits", [[17], [255], [8, 17]])
def test_a_jpeg_of_impossible_precision_has_a_damaged_header(bits):
    assert dali_agrees(frames_of(bits=[16]))
    assert read_header(frames_of(bits=[16])).kind == Kind.JPEG_CPU_ONLY
    assert not dali_agrees(frames_of(bits=bits))
    with pytest.raises(BadImageError, match=f"damaged header: a JPEG of {bits[-1]} bits per sample"):
        read_header(frames_of(bits=bits))


def test_a_stored_jpeg_of_impossible_precision_is_not_given_to_dali(tmp_path, monkeypatch):
    """DALI rejects it, but in a batch of 32 or more that may crash the process."""
    with monkeypatch.context() as patch:  # earlier versions stored it
        patch.setattr("dali_lmdb.images.header._MAX_BITS", 255)
        path = stored(tmp_path, {"good": saved(COLOR, "JPEG"), "bad": frames_of(bits=[255])})
    with dali(path, transform=SHORT_SIDE, batch_size=2, on_bad="substitute") as loader:
        encoded = loader._make_feed(loader.planner.plan(0, 0))[0]
        assert [tensor.shape() == [0] for tensor in encoded] == [False, True]
        ((images, _),) = loader
        assert (images == images[0]).all()
        assert [record.index for record in loader.bad_records] == [1]


def test_info_counts_what_pillow_decodes_and_the_command_says_what_to_do(kinds_path, tmp_path):
    assert info(kinds_path).by_pillow == len(DIFFERING)
    assert info(kinds_path).decoders.none == 0
    line = re.search(r"on the CPU .*", CliRunner().invoke(main, ["info", str(kinds_path)]).output)[0]
    assert f", {len(DIFFERING)} of them to Pillow" in line
    assert "--transcode" in line
    printed = json.loads(CliRunner().invoke(main, ["info", str(kinds_path), "--json"]).output)
    assert printed["by_pillow"] == len(DIFFERING)
    jpegs = stored(tmp_path, {"jpeg": saved(COLOR, "JPEG")})
    assert info(jpegs).by_pillow == 0
    assert "Pillow" not in CliRunner().invoke(main, ["info", str(jpegs)]).output


def test_transcoding_leaves_nothing_to_pillow_and_keeps_its_pixels(tmp_path):
    path = stored(tmp_path, FILES, transcode=True, quality=100)
    found = info(path)
    assert (found.by_pillow, found.decoders.gpu) == (0, len(FILES))
    assert verify(path, decode=True).clean
    for make in (dali, classic):
        for kind, image in zip(FILES, shown(make, path), strict=True):
            assert abs((image - middle(FILES[kind])) @ LUMA).mean() < 3, kind  # JPEG halves the chroma


def test_a_classic_database_of_every_kind_gives_pillows_pixels(kinds_path, tmp_path):
    path = make_classic(tmp_path / "classic.lmdb", [(file, 0) for file in FILES.values()])
    images = shown(dali, path)
    assert [kind for kind, image in zip(FILES, images, strict=True) if (image != middle(FILES[kind])).any()] == []


def test_sizes_in_the_index_are_those_that_pillow_shows(kinds_path):
    with open_store(kinds_path) as store:
        sizes = list(zip(store.column("width").tolist(), store.column("height").tolist(), strict=True))
    assert sizes[:-1] == [Image.open(io.BytesIO(file)).convert("RGB").size for file in FILES.values()]
