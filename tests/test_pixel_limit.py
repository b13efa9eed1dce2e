"""How many pixels an image may have: what its store was converted with, not what Pillow's global says."""

import os
import struct

import numpy as np
import pytest
from damage import NO_IMAGE, giant_png, grey_image, write_store
from odd_kinds import COLOR, GREY, saved, tiff
from PIL import Image

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.errors import ConversionError, RecordError
from dali_lmdb.inspect import verify
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.dataset import ImageFolderLMDB
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import EvalTransform, TrainTransform

PILLOWS_LIMIT = Image.MAX_IMAGE_PIXELS
EVAL = EvalTransform(size=16, resize=16)
TRAIN = TrainTransform(size=16, scale=(0.9, 1.0))
FORMATS = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {},
    "GIF": {},
    "GIF that restores its background": {"disposal": 2, "save_all": True},
    "BMP": {},
    "TIFF": {},
    "TIFF, compressed": {"compression": "tiff_lzw"},
    "JPEG2000": {},
    "AVIF": {},
    "PPM": {},
}


@pytest.fixture
def formats_path(tmp_path):
    """A store of 48 x 40 pixels in every format that is read."""
    (tmp_path / "images" / "all").mkdir(parents=True)
    for number, (name, options) in enumerate(FORMATS.items()):
        format = name.split()[0].strip(",")
        (tmp_path / "images" / "all" / f"{number:03}.jpg").write_bytes(saved(COLOR, format, **options))
    convert(tmp_path / "images", tmp_path / "x.lmdb")
    return tmp_path / "x.lmdb"


@pytest.fixture(params=[700, 1000], ids=["where Pillow refuses", "where Pillow warns"])
def low_limit(request, monkeypatch):
    """A program that lets Pillow open next to nothing."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", request.param)
    yield
    assert request.param == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("transform", [EVAL, TRAIN], ids=["eval", "train"])
@pytest.mark.parametrize("workers", [0, 1])
def test_both_loaders_read_what_a_store_holds_whatever_pillows_limit(formats_path, low_limit, workers, transform):
    loaders = [
        TorchLoader(formats_path, transform=transform, batch_size=4, last_batch="short", num_workers=workers),
        DaliLoader(formats_path, transform=transform, batch_size=4, last_batch="short", device="cpu"),
    ]
    for loader in loaders:
        with loader:
            assert sum(len(labels) for _, labels in loader) == len(FORMATS)


def test_image_folder_lmdb_reads_what_a_store_holds_whatever_pillows_limit(formats_path, low_limit):
    dataset = ImageFolderLMDB(formats_path)
    assert [dataset[index][0].size for index in range(len(FORMATS))] == [COLOR.size] * len(FORMATS)


def test_verify_finds_no_fault_with_what_a_store_holds_whatever_pillows_limit(formats_path, low_limit):
    assert verify(formats_path, decode=True).damage == ()


def test_a_conversion_goes_by_its_own_limit_and_leaves_pillows_alone(formats_path, low_limit, tmp_path):
    before, during = Image.MAX_IMAGE_PIXELS, []
    for settings in (ConvertSettings(check="decode"), ConvertSettings(transcode=True, resize=20)):
        target = tmp_path / f"{settings.check}.lmdb"
        convert(
            tmp_path / "images",
            target,
            settings=settings,
            progress=lambda _: during.append(Image.MAX_IMAGE_PIXELS),
        )
        assert verify(target, decode=True).clean
    assert set(during) == {before}


def test_images_beyond_pillows_own_limit_pass_if_the_conversion_lets_them(tmp_path):
    (tmp_path / "images" / "all").mkdir(parents=True)
    side = 13_400
    assert side * side > 2 * PILLOWS_LIMIT
    Image.new("1", (side, side), 1).save(tmp_path / "images" / "all" / "0.png")
    with pytest.raises(ConversionError, match="bad"):
        convert(tmp_path / "images", tmp_path / "default.lmdb")
    convert(tmp_path / "images", tmp_path / "x.lmdb", settings=ConvertSettings(max_pixels=side * side))
    assert verify(tmp_path / "x.lmdb", decode=True).damage == ()


def giant_gif():
    screen = b"GIF89a" + struct.pack("<HHBBB", 60_000, 50_000, 0x80, 0, 0) + bytes(6)
    control = b"\x21\xf9\x04\x08\0\0\0\0"  # restores the background, so Pillow makes one on opening
    return screen + control + b"," + struct.pack("<HHHHB", 0, 0, 60_000, 50_000, 0) + b"\x02\x02\x44\x01\0;"


def giant_webp():
    webp = saved(COLOR, "WEBP", lossless=True)
    at = webp.index(b"VP8L") + 9
    bits = struct.unpack_from("<I", webp, at)[0] >> 28 << 28 | 15_999 << 14 | 14_999
    return webp[:at] + struct.pack("<I", bits) + webp[at + 4 :]


GIANTS = {
    "PNG": (giant_png(), "60000 x 50000"),
    "GIF": (giant_gif(), "60000 x 50000"),
    "WebP": (giant_webp(), "15000 x 16000"),
    "TIFF": (tiff(bytes(9), photometric=2, t256=[60_000], t257=[50_000]), "60000 x 50000"),
}


@pytest.mark.parametrize(("file", "size"), GIANTS.values(), ids=GIANTS)
def test_a_header_that_claims_a_giant_is_refused_in_the_words_for_a_jpeg(tmp_path, file, size):
    (tmp_path / "images" / "all").mkdir(parents=True)
    (tmp_path / "images" / "all" / "0.jpg").write_bytes(grey_image(0))
    (tmp_path / "images" / "all" / "1.jpg").write_bytes(file)
    settings = ConvertSettings(max_pixels=20_000, on_bad="skip")
    (report,) = convert(tmp_path / "images", tmp_path / "x.lmdb", settings=settings).reports
    reason = f"{size} pixels, more than the limit of 20000"
    with open(report, encoding="utf-8") as lines:
        assert lines.read().splitlines()[1:] == [f"all/1.jpg\t{reason}"]


@pytest.mark.parametrize(("file", "size"), GIANTS.values(), ids=GIANTS)
def test_a_record_that_claims_more_than_the_index_says_is_a_bad_record(tmp_path, file, size):
    path = write_store(tmp_path / "x.lmdb", [grey_image(0), file], sizes=[(60, 44), (60, 44)])
    reason = f"{size} pixels, more than the limit of {2 * PILLOWS_LIMIT}"
    with TorchLoader(path, transform=EVAL, batch_size=1, num_workers=0) as loader:
        steps = iter(loader)
        next(steps)
        with pytest.raises(RecordError, match=f"record 1 .*{reason}"):
            next(steps)
    assert any(reason in line and "record 1" in line for line in verify(path).damage)


def test_images_of_a_folder_have_the_limit_that_the_program_sets(tmp_path, monkeypatch):
    (tmp_path / "images" / "all").mkdir(parents=True)
    COLOR.save(tmp_path / "images" / "all" / "0.png")
    with TorchLoader(tmp_path / "images", transform=EVAL, batch_size=1, num_workers=0) as loader:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
        with pytest.raises(RecordError, match="48 x 40 pixels, more than the limit of 1400"):
            list(loader)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert len(list(loader)) == 1


def test_a_file_of_another_format_starts_no_program(tmp_path, monkeypatch):
    """Pillow decodes EPS with Ghostscript."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "images" / "all").mkdir(parents=True)
    GREY.save(tmp_path / "images" / "all" / "0.jpg")
    for number, format in enumerate(("EPS", "ICO", "TGA", "PCX"), start=1):
        (tmp_path / "images" / "all" / f"{number}.jpg").write_bytes(saved(COLOR, format))
    settings = ConvertSettings(check="decode", transcode=True, on_bad="skip")
    summary = convert(tmp_path / "images", tmp_path / "x.lmdb", settings=settings)
    with open(summary.reports[0], encoding="utf-8") as report:
        assert report.read().splitlines()[1:] == [f"all/{number}.jpg\t{NO_IMAGE}" for number in range(1, 5)]
    assert not (tmp_path / "was-run").exists()
    assert np.asarray(ImageFolderLMDB(tmp_path / "x.lmdb")[0][0]).shape == (40, 48, 3)
