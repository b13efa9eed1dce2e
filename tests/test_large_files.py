"""Files too large for one read, for a record, or to be read at all; most of their bytes are holes."""

import os
import resource
import tarfile
from pathlib import Path

import pytest
from conversions import in_child
from PIL import Image

from dali_lmdb.convert import convert
from dali_lmdb.convert.settings import ConvertSettings
from dali_lmdb.convert.sources import _files, open_source
from dali_lmdb.convert.sources._files import RefusedImageError
from dali_lmdb.errors import ConversionError
from dali_lmdb.inspect import verify
from dali_lmdb.store import open_store, values

GIB = 1 << 30
SPARE_BYTES = 200 << 20  # more address space than the process has, for reading that must not take gigabytes


def _one_image(folder, num_bytes, **options):
    """A class folder with one image file, which ends in a hole if it is to have so many bytes."""
    (folder / "a").mkdir(parents=True)
    path = folder / "a" / "0.jpg"
    Image.new("RGB", (16, 16), (9, 99, 9)).save(path, **{"format": "JPEG"} | options)
    if num_bytes:
        os.truncate(path, num_bytes)
    return path


def _refusal(path):
    """Why a source refuses its only image, read with little memory."""
    (item,) = open_source(path).items()
    with pytest.raises(RefusedImageError) as info:
        item.read()
    return str(info.value)


def _with_little_memory(work):
    def limited():
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + SPARE_BYTES, size + SPARE_BYTES))
        work()

    assert in_child(limited) == 0


def test_a_large_file_that_is_no_image_is_refused_unread(tmp_path):
    path = _one_image(tmp_path / "images", 0)
    path.write_bytes(b"no image")
    os.truncate(path, 3 * GIB)

    def work():
        assert "3,221,225,472 bytes, not a JPEG, PNG, WebP" in _refusal(tmp_path / "images")

    _with_little_memory(work)


def test_a_file_larger_than_a_record_is_refused_unread(tmp_path):
    _one_image(tmp_path / "images", 4 * GIB)

    def work():
        assert "4,294,967,296 bytes, a record holds 4,294,967,295 at most" in _refusal(tmp_path / "images")

    _with_little_memory(work)


def test_a_large_member_of_a_tar_that_is_no_image_is_refused_unread(tmp_path):
    info = tarfile.TarInfo("a/0.jpg")
    info.size = 3 * GIB
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + b"no image")
    os.truncate(tmp_path / "x.tar", 512 + 3 * GIB + 1024)

    def work():
        assert "x.tar: a/0.jpg: 3,221,225,472 bytes, not a JPEG" in _refusal(tmp_path / "x.tar")

    _with_little_memory(work)


def test_a_large_file_that_is_no_image_is_a_bad_image(tmp_path):
    _one_image(tmp_path / "images", 0)
    large = tmp_path / "images" / "a" / "1.jpg"
    large.write_bytes(b"no image")
    os.truncate(large, 3 * GIB)
    target = tmp_path / "x.lmdb"
    with pytest.raises(ConversionError, match="1 of 2 images are bad"):
        convert(tmp_path / "images", target)
    convert(tmp_path / "images", target, settings=ConvertSettings(on_bad="skip"))
    assert len(open_store(target)) == 1
    assert "a/1.jpg\t" in Path(f"{target}.bad.tsv").read_text()
    with pytest.raises(RefusedImageError):  # nothing is bad there
        convert(tmp_path / "images", tmp_path / "y.lmdb", settings=ConvertSettings(check="none"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM"])
def test_a_large_image_of_any_format_is_read(format, tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "_LARGE_BYTES", 0)
    path = _one_image(tmp_path / "images", 0, format=format)
    (item,) = open_source(tmp_path / "images").items()
    assert item.read() == path.read_bytes()


def test_what_one_call_does_not_read_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(values, "_MAX_READ_BYTES", 100)
    path = _one_image(tmp_path / "images", 100_000)
    convert(tmp_path / "images", tmp_path / "x.lmdb")
    assert bytes(open_store(tmp_path / "x.lmdb").read(0)) == path.read_bytes()
    assert verify(tmp_path / "x.lmdb").clean
    with open(path, "rb") as file:
        assert values.read_at(file.fileno(), 500, 99_900) == bytes(100)  # the file ends there


@pytest.mark.skipif("DALI_LMDB_SOAK" not in os.environ, reason="takes 7 GB of memory and 4 GB of disk")
def test_an_image_of_three_gibibytes_is_stored(tmp_path):
    path = _one_image(tmp_path / "images", 3 * GIB)
    convert(tmp_path / "images", tmp_path / "x.lmdb")
    assert verify(tmp_path / "x.lmdb").clean
    assert len(open_store(tmp_path / "x.lmdb").read(0)) == path.stat().st_size
