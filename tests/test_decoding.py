"""Images decoded in processes of their own: what ends a decoder is named, what passes trains."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from odd_kinds import COLOR, saved
from PIL import Image

from dali_lmdb import DaliLoader, EvalTransform, TorchLoader, TrainTransform, open_store
from dali_lmdb.convert import convert
from dali_lmdb.convert.settings import ConvertSettings
from dali_lmdb.decoding.dali import DaliDecoder
from dali_lmdb.decoding.examiner import Examination, Examiner, Room
from dali_lmdb.images.checking import check_jpeg
from dali_lmdb.images.header import read_header
from dali_lmdb.images.opening import BadImageError
from dali_lmdb.images.reencoding import Change

ROOT = Path(__file__).resolve().parents[1]


def jpeg(number, *, comment=b"", **options):
    """A photo-sized JPEG of noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), "JPEG", comment=comment, **options)


def examined(*images, **settings):
    with Examiner(Examination(**settings)) as examiner:
        return examiner.examine([(data, read_header(data)) for data in images])


def folder_of(path, images):
    for name, data in images.items():
        (path / "a").mkdir(parents=True, exist_ok=True)
        (path / "a" / name).write_bytes(data)
    return path


@pytest.fixture
def planted(monkeypatch):
    """Makes decoding processes crash on ``CRASH``, see ``planted/sitecustomize.py``."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests' / 'planted'}:{ROOT}")


def reported(store):
    lines = Path(f"{store}.bad.tsv").read_text().splitlines()[1:]
    return dict(line.split("\t") for line in lines)


def test_an_image_that_crashes_the_decoder_is_named_and_the_rest_is_stored(tmp_path, planted):
    images = {f"{number:02}.jpg": jpeg(number) for number in range(40)}
    images["17.jpg"] = jpeg(17, comment=b"CRASH")
    images["30.jpg"] = jpeg(30, comment=b"CRASH")
    source, target = folder_of(tmp_path / "source", images), tmp_path / "s.lmdb"
    convert(source, target, settings=ConvertSettings(check="decode", on_bad="skip"))
    assert reported(target) == dict.fromkeys(("a/17.jpg", "a/30.jpg"), "the decoder crashed: SIGSEGV")
    store = open_store(target)
    assert [store.name(record) for record in range(len(store))] == [
        f"a/{name}" for name in sorted(images) if name not in ("17.jpg", "30.jpg")
    ]


@pytest.mark.parametrize("options", [["--transcode"], ["--resize", "64"]])
def test_re_encoding_survives_it_too(tmp_path, planted, options):
    images = {"0.png": saved(COLOR, "PNG"), "1.jpg": jpeg(1, comment=b"CRASH"), "2.jpg": jpeg(2)}
    source, target = folder_of(tmp_path / "source", images), tmp_path / "s.lmdb"
    command = [sys.executable, "scripts/convert.py", str(source), str(target), "--check", "decode", *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 of 3 images are bad" in done.stderr
    assert reported(target) == {"a/1.jpg": "the decoder crashed: SIGSEGV"}


def test_verify_names_a_record_that_crashes_the_decoder(tmp_path, planted):
    images = {f"{number}.jpg": jpeg(number, comment=b"CRASH" if number == 1 else b"") for number in range(3)}
    target = tmp_path / "s.lmdb"
    convert(folder_of(tmp_path / "source", images), target)
    command = [sys.executable, "-m", "dali_lmdb", "verify", str(target), "--decode"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{target}: record 1 (a/1.jpg): the decoder crashed: SIGSEGV" in done.stdout + done.stderr


def test_no_process_is_started_where_nothing_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("dali_lmdb.decoding.examiner.Isolated", None)
    convert(folder_of(tmp_path / "source", {"0.jpg": jpeg(0)}), tmp_path / "s.lmdb")
    with pytest.raises(TypeError):
        convert(tmp_path / "source", tmp_path / "t.lmdb", settings=ConvertSettings(check="decode"))


def test_a_closed_examiner_ends_threads_that_wait_for_an_image_or_for_room(planted):
    image = jpeg(0, comment=b"SPIN")
    header = read_header(image)._replace(height=10_000, width=10_000)  # all the room there is
    failures, examiner = [], Examiner(Examination())

    def wait():
        try:
            examiner.examine([(image, header)])
        except RuntimeError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    before = children()
    for thread in threads:
        thread.start()
    while children() == before:
        pass
    examiner.close()
    for thread in threads:
        thread.join(10)
    assert failures == ["the process that decodes is closed"] * 3


def test_pixels_that_are_decoded_at_once_are_limited_over_all_threads():
    room, entered = Room(100), []

    def enter(pixels):
        with room.taken(pixels):
            entered.append(pixels)

    small, large = threading.Thread(target=enter, args=(40,)), threading.Thread(target=enter, args=(1000,))
    with room.taken(60):
        small.start()
        small.join()
        large.start()
        large.join(0.5)
        assert large.is_alive(), "an image beyond the limit has to wait until it is alone"
        assert entered == [40]
    large.join()
    assert entered == [40, 1000]


def test_a_process_with_a_large_image_is_not_kept():
    large, before = saved(Image.new("L", (5_000, 4_000)), "PNG"), children()
    with Examiner(Examination()) as examiner:
        examiner.examine([(large, read_header(large))])
        assert children() == before


def test_threads_that_come_and_go_share_a_process():
    image, before = jpeg(0), children()
    with Examiner(Examination()) as examiner:
        for _ in range(3):  # as verify does for each file of a store
            thread = threading.Thread(target=examiner.examine, args=([(image, read_header(image))],))
            thread.start()
            thread.join()
        assert len(children() - before) == 1


def test_the_files_of_a_conversion_share_a_process(tmp_path):
    source = folder_of(tmp_path / "source", {f"{number}.jpg": jpeg(number) for number in range(4)})
    seen, before = set(), children()
    settings = ConvertSettings(check="decode")
    convert(
        source,
        tmp_path / "s.lmdb",
        settings=settings,
        shards=4,
        num_threads=1,
        commit_records=1,
        progress=lambda _: seen.update(children() - before),
    )
    assert len(seen) == 1
    assert children() <= before


def children():
    """Processes that this one has started and that still run, those of other tests too."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(pid) for task in tasks for pid in (task / "children").read_text().split()}


def test_good_images_are_unchanged_and_bad_ones_have_the_decoder_that_refused_them():
    good, cut = jpeg(0), jpeg(0)[:-1000]
    png = saved(COLOR, "PNG")
    damaged_png = bytearray(png)
    damaged_png[len(png) // 2] ^= 1
    verdicts = examined(good, cut, png, bytes(damaged_png))
    assert [(verdict.change, verdict.data) for verdict in verdicts] == [(Change.NONE, None)] * 4
    assert verdicts[0].reason is verdicts[2].reason is None
    assert verdicts[1].reason.startswith("damaged: ")
    assert verdicts[3].reason.startswith("Pillow cannot decode it: ")


def test_what_only_dali_refuses_is_bad(tmp_path):
    """OpenCV, which decodes PNM for DALI, takes no more than 2^20 pixels a row."""
    (verdict,) = examined(saved(Image.new("RGB", (1_100_000, 1)), "PPM"))
    assert verdict.reason.startswith("DALI does not decode it: ")


def test_one_pixel_tells_whether_dali_decodes_a_jpeg(test_data):
    """For what passes the strict check; of the others some decode in part."""
    dali, num_decoded = DaliDecoder(), 0
    for path in sorted((test_data / "odd-images").iterdir()):
        data = path.read_bytes()
        try:
            header = read_header(data)
            if header.kind.is_jpeg:
                check_jpeg(data, header.kind)
        except BadImageError:
            continue
        if header.kind.is_jpeg:
            outcomes = [_outcome(dali.sizes, [data]), _outcome(dali.pixels, data)]
            assert outcomes[0] == outcomes[1], path
            num_decoded += outcomes[0]
    assert num_decoded > 50


def _outcome(decode, argument):
    try:
        decode(argument)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("settings", [{"check": "decode"}, {"transcode": True}], ids=["check", "transcode"])
def test_what_is_certified_trains(test_data, tmp_path, settings):
    """No record of such a store is bad, in either loader, in training or evaluation, whole or by window."""
    shutil.copytree(test_data / "odd-images", tmp_path / "source" / "odd")
    target = tmp_path / "s.lmdb"
    convert(tmp_path / "source", target, settings=ConvertSettings(on_bad="skip", **settings))
    assert len(open_store(target)) > 100
    options = {"batch_size": 16, "last_batch": "short"}
    train, evaluation = TrainTransform(size=32), EvalTransform(size=32, resize=40)
    for loader in (
        DaliLoader(target, transform=train, device="cpu", decode="window", **options),
        DaliLoader(target, transform=evaluation, device="cpu", decode="image", **options),
        TorchLoader(target, transform=train, num_workers=0, **options),
        TorchLoader(target, transform=evaluation, num_workers=0, **options),
    ):
        with loader:
            assert sum(len(images) for images, _ in loader) == len(open_store(target))
