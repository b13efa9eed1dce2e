import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conversions import SKIP_BAD, CountedSource, add_bad, content, left_beside, refusal, report_of, run_main
from image_sets import save_grey, save_noise
from PIL import Image
from torchvision.datasets import ImageFolder

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.errors import ConversionError, SourceError
from dali_lmdb.images.gpu_decoder import gpu_decoder
from dali_lmdb.images.kinds import Kind
from dali_lmdb.store import open_store

# --- what is found, and in which order


def assert_as_image_folder(folder, target):
    convert(folder, target)
    expected = ImageFolder(str(folder))
    with open_store(target) as store:
        assert store.classes == expected.classes
        assert [store.name(i) for i in range(len(store))] == [
            os.path.relpath(path, folder) for path, _ in expected.samples
        ]
        assert store.labels.tolist() == expected.targets
        for i, (path, _) in enumerate(expected.samples):
            with open(path, "rb") as file:
                assert bytes(store.read(i)) == file.read()


def test_records_are_image_folders_in_order(images, target):
    assert_as_image_folder(images, target)


def test_nested_odd_and_hidden_names_come_in_image_folders_order(tmp_path, target):
    names = [
        "b/10.jpg 9.jpg 01.JPG Z.JPEG a.Jpg é.png _.bmp -.webp .hidden.jpg",
        "b/sub/1.jpg sub/deep/er/2.png sub-a/3.jpg sub.a/4.tif Sub/5.tiff s/6.jpg",
        "B/1.jpg",
        "a b/one two.jpg",
        "é/1.ppm 2.pgm",
        ".dot/1.jpg",
        "10/1.jpg",
        "9/1.jpg",
    ]
    number = 0
    for line in names:
        folder, _, files = line.partition("/")
        for name in [files] if " " in folder or files.startswith("one") else files.split(" "):
            path = tmp_path / "images" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            save_noise(path, seed=number, size=(8, 8 + number)) if path.suffix.lower() != ".pgm" else Image.new(
                "L", (5, 6)
            ).save(path)
            number += 1
    assert_as_image_folder(tmp_path / "images", target)


def test_files_that_are_not_images_and_files_beside_the_classes_are_ignored(images, target):
    save_grey(images / "stray.jpg", 3)
    for name in ("notes.txt", "Thumbs.db", "no_extension", "image.jpg.bak", "image.gif", "image.npy"):
        (images / "ant" / name).write_text("not an image")
    (images / "ant" / "folder.txt").mkdir()
    assert_as_image_folder(images, target)


def test_equal_images_under_two_names_are_two_records(images, target):
    shutil.copy(images / "ant" / "000.jpg", images / "cat" / "zzz.jpg")
    assert convert(images, target).records == 25
    with open_store(target) as store:
        assert bytes(store.read(0)) == bytes(store.read(24))


def test_links_inside_the_folder_are_followed(images, target):
    (images / "bee" / "link.jpg").symlink_to(images / "ant" / "000.jpg")
    (images / "dog").symlink_to(images / "ant", target_is_directory=True)
    assert_as_image_folder(images, target)


def test_a_file_name_that_is_not_utf8_is_converted_with_its_bytes_spelt_out(images, target):
    path = os.path.join(os.fsencode(images), b"ant", b"\xff\n.jpg")
    shutil.copy(images / "ant" / "000.jpg", path)
    assert convert(images, target).records == 25
    with open_store(target) as store:
        names = [store.name(i) for i in range(25)]
    assert len(set(names)) == 25
    assert "ant/\\xff\n.jpg" in names


# --- what is said about each image


def test_kinds_and_sizes_are_what_the_bytes_say_not_the_name(tmp_path, target):
    folder = tmp_path / "images" / "one"
    folder.mkdir(parents=True)
    save_noise(folder / "00.jpg", seed=0, size=(21, 34))
    save_noise(folder / "01.jpg", seed=0, size=(22, 35), progressive=True)
    Image.new("L", (36, 23), 90).save(folder / "02.jpg")
    Image.new("CMYK", (37, 24)).save(folder / "03.jpg")
    for number, (format_, height) in enumerate(
        [("PNG", 25), ("WEBP", 26), ("BMP", 27), ("TIFF", 28), ("PPM", 29)]
    ):
        save_noise(folder / f"{4 + number:02}.jpg", seed=1, size=(height, 40), format=format_)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    save_noise(folder / "09.jpg", seed=2, size=(30, 50), exif=exif)
    summary = convert(tmp_path / "images", target)
    with open_store(target) as store:
        kinds = " ".join(Kind(kind).name.removeprefix("JPEG_") for kind in store.column("kind"))
        assert kinds == "BASELINE PROGRESSIVE GRAYSCALE CMYK PNG WEBP BMP TIFF PNM BASELINE"
        assert store.column("height").tolist() == list(range(21, 31))
        assert store.column("width").tolist() == [34, 35, 36, 37, 40, 40, 40, 40, 40, 50]
    assert (summary.gpu, summary.cpu, summary.none) == (4, 6, 0)


def test_unchecked_images_are_of_unknown_kind_and_size(images, target):
    (images / "ant" / "bad.jpg").write_text("not an image")
    summary = convert(images, target, settings=ConvertSettings(check="none"))
    assert (summary.records, summary.none) == (25, 25)
    with open_store(target) as store:
        assert set(store.column("kind").tolist()) == {Kind.UNKNOWN}
        assert not store.column("height").any()


def test_bad_images_are_all_reported_and_nothing_is_published(images, target):
    bad = add_bad(images)
    message = refusal(images, target)
    assert "3 of 27 images are bad" in message
    assert report_of(target) == bad
    assert not target.exists()


def test_bad_images_are_skipped_when_asked(images, target, image_folder, tmp_path):
    bad = add_bad(images)
    summary = convert(images, target, settings=SKIP_BAD)
    assert (summary.records, summary.skipped) == (24, 3)
    assert report_of(target) == bad
    assert left_beside(target) == ["x.lmdb", "x.lmdb.bad.tsv"]
    convert(image_folder, tmp_path / "good.lmdb")
    assert content(target) == content(tmp_path / "good.lmdb")


def test_after_a_refusal_skipping_reads_no_image_again(images, target):
    add_bad(images)
    refusal(images, target)
    source = CountedSource(images)
    summary = convert(source, target, settings=SKIP_BAD)
    assert (summary.records, summary.skipped) == (24, 3)
    assert source.read == []


def test_after_a_refusal_mended_images_are_converted_with_restart(images, target):
    for name in add_bad(images):
        save_grey(images / name, 5)
        os.utime(images / name, ns=(1, 1))
    (images / "ant" / "!.jpg").write_text("bad")
    refusal(images, target)
    save_grey(images / "ant" / "!.jpg", 5)
    assert "changed since" in refusal(images, target)
    summary = convert(images, target, restart=True)
    assert (summary.records, summary.skipped) == (27, 0)
    assert left_beside(target) == ["x.lmdb"]


@pytest.mark.parametrize("shards", [None, 3])
def test_files_that_are_not_taken_are_listed_with_the_reason_and_stop_nothing(images, target, shards):
    (images / "bee" / "deep").mkdir()
    by_name = "left out: no image file extension"
    in_no_class = "left out: in no class folder"
    others = {
        "ant/Thumbs.db": by_name,
        "bee/deep/notes": by_name,
        "cat/000.jpg.tmp": by_name,
        "labels.csv": in_no_class,
        "stray.jpg": in_no_class,
    }
    for name in others:
        (images / name).write_text("no image")
    summary = convert(images, target, shards=shards)
    assert (summary.records, summary.skipped, summary.left_out) == (24, 0, 5)
    (report,) = summary.reports
    rows = [tuple(line.split("\t")) for line in Path(report).read_text().splitlines()]
    assert rows == [("name", "reason"), *others.items()]


def test_bad_images_and_files_that_are_none_are_listed_in_one_report(images, target):
    bad = add_bad(images)
    (images / "ant" / "Thumbs.db").write_text("no image")
    summary = convert(images, target, settings=SKIP_BAD)
    assert (summary.records, summary.skipped, summary.left_out) == (24, 3, 1)
    assert report_of(target) == [*bad, "ant/Thumbs.db"]
    code, out, _ = run_main(images, target.with_name("y.lmdb"), "--on-bad", "skip")
    assert code == 0
    assert "3 bad images and 1 other files left out, listed in" in out


def test_a_source_of_bad_images_only_makes_no_store(tmp_path, target):
    (tmp_path / "images" / "one").mkdir(parents=True)
    (tmp_path / "images" / "one" / "1.jpg").write_text("bad")
    assert "all 1 images are bad" in refusal(tmp_path / "images", target, settings=SKIP_BAD)
    assert not target.exists()


def test_images_over_the_pixel_limit_are_bad(images, target):
    refusal(images, target, settings=ConvertSettings(max_pixels=60 * 50))
    expected = ImageFolder(str(images))
    too_large = []
    for path, _ in expected.samples:
        with Image.open(path) as image:
            if image.size[0] * image.size[1] > 3000:
                too_large.append(os.path.relpath(path, images))
    assert report_of(target) == too_large
    assert 0 < len(too_large) < 24


def test_a_header_that_claims_a_giant_is_bad_and_not_decoded(images, target):
    raw = bytearray((images / "ant" / "000.jpg").read_bytes())
    at = raw.index(b"\xff\xc0") + 5
    raw[at : at + 4] = (65_500).to_bytes(2, "big") * 2
    (images / "ant" / "giant.jpg").write_bytes(raw)
    summary = convert(images, target, settings=SKIP_BAD)
    assert (summary.records, summary.skipped) == (24, 1)
    assert report_of(target) == ["ant/giant.jpg"]


@pytest.mark.parametrize(
    "settings",
    [{"check": "look"}, {"on_bad": "ignore"}, {"max_pixels": 0}],
    ids=str,
)
def test_wrong_settings_are_value_errors(settings):
    with pytest.raises(ValueError, match="expected"):
        ConvertSettings(**settings)


# --- what is refused


def test_a_missing_source_is_refused(tmp_path, target):
    assert "no such" in refusal(tmp_path / "nothing", target, SourceError)
    assert left_beside(target) == []


def test_a_source_that_is_a_text_file_is_refused(tmp_path, target):
    (tmp_path / "notes.txt").write_text("notes\n")
    refusal(tmp_path / "notes.txt", target, SourceError)
    assert left_beside(target) == []


def test_a_folder_without_class_folders_is_refused(tmp_path, target):
    (tmp_path / "images").mkdir()
    refusal(tmp_path / "images", target, SourceError)
    assert left_beside(target) == []


def test_a_class_without_images_is_refused_by_name(images, target):
    (images / "dog").mkdir()
    (images / "dog" / "notes.txt").touch()
    assert "dog" in refusal(images, target, SourceError)
    assert left_beside(target) == []


def test_a_link_that_leads_nowhere_is_refused_by_name(images, target):
    (images / "ant" / "gone.jpg").symlink_to(images / "nothing.jpg")
    assert "gone.jpg" in refusal(images, target, SourceError)
    assert not target.exists()


def test_a_link_out_of_the_folder_is_refused(images, tmp_path, target):
    save_grey(tmp_path / "outside.jpg", 1)
    (images / "ant" / "out.jpg").symlink_to(tmp_path / "outside.jpg")
    assert "out.jpg" in refusal(images, target, SourceError)
    assert left_beside(target) == []


def test_a_pipe_named_as_an_image_does_not_hang(images, target):
    os.mkfifo(images / "ant" / "pipe.jpg")
    assert "pipe.jpg" in refusal(images, target, SourceError)


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b"mine"), lambda path: path.mkdir()])
def test_an_existing_target_is_refused_and_left_alone(images, target, make):
    make(target)
    before = target.stat()
    message = refusal(images, target)
    assert str(target) in message
    assert left_beside(target) == ["x.lmdb"]
    assert target.stat() == before


def test_a_target_that_is_a_link_to_nothing_is_refused_and_left_alone(images, target, tmp_path):
    target.symlink_to(tmp_path / "other-disk" / "x.lmdb")
    assert str(tmp_path / "other-disk" / "x.lmdb") in refusal(images, target)
    assert target.is_symlink()
    assert left_beside(target) == ["x.lmdb"]


def test_an_existing_store_is_not_replaced_even_with_restart(images, target):
    convert(images, target)
    before = target.read_bytes()
    assert "already exists" in refusal(images, target, restart=True)
    assert target.read_bytes() == before
    assert left_beside(target) == ["x.lmdb"]


def test_a_target_in_a_missing_folder_is_refused(images, tmp_path):
    assert "does not exist" in refusal(images, tmp_path / "no" / "x.lmdb")
    assert not (tmp_path / "no").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_target_in_a_read_only_folder_is_refused(images, target):
    target.parent.chmod(0o555)
    assert "not writable" in refusal(images, target)
    target.parent.chmod(0o755)
    assert left_beside(target) == []


@pytest.mark.parametrize("length", [240, 250, 300])
def test_names_that_are_too_long_are_refused(images, target, length):
    refusal(images, target.with_name("x" * length))
    refusal(images / ("x" * length) / "y", target, SourceError)
    assert left_beside(target) == []


def test_a_target_without_a_name_is_refused(images):
    with pytest.raises((ConversionError, ValueError)) as info:
        convert(images, "")
    assert "PosixPath" not in str(info.value)


# --- the command


def test_the_command_prints_a_summary(images, target):
    Image.new("CMYK", (40, 30)).save(images / "ant" / "four.jpg")
    code, out, err = run_main(images, target)
    assert code == 0
    for part in (str(target), "25 records", "3 classes", "images/s", "MB/s"):
        assert part in out
    assert f"with --decode-device gpu, {gpu_decoder()} decodes 24, 1 fall back to the CPU" in out
    assert err == ""


def test_the_command_prints_json(images, target):
    add_bad(images)
    code, out, _ = run_main(images, target, "--json", "--on-bad", "skip")
    assert code == 0
    summary = json.loads(out)
    assert {"records": 24, "classes": 3, "skipped": 3}.items() <= summary.items()
    assert summary["bytes"] == sum(len(raw) for raw in content(target)[0])
    assert summary["seconds"] > 0


def test_the_command_turns_refusals_into_one_line_and_exit_code_1(tmp_path, images, target):
    (images / "dog").mkdir()
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for arguments in [
        (tmp_path / "nothing", target),
        (tmp_path / "text.txt", target),
        (tmp_path / "empty", target),
        (images, target),
        (images, tmp_path),
        (images, tmp_path / "text.txt"),
        (images, tmp_path / "no" / "x.lmdb"),
        (images, ""),
        ("", target),
    ]:
        code, out, err = run_main(*arguments)
        assert code == 1, arguments
        assert out == ""
        assert err.startswith("Error: ")
        assert len(err.splitlines()) == 1
    assert left_beside(target) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a"],
        ["a", "b", "c"],
        ["a", "b", "--check", "look"],
        ["a", "b", "--max-pixels", "0"],
        ["a", "b", "--nope"],
    ],
    ids=str,
)
def test_wrong_usage_is_exit_code_2(arguments):
    code, out, err = run_main(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err


def test_the_script_of_the_checkout_is_the_command():
    script = os.path.join(os.path.dirname(__file__), os.pardir, "scripts", "convert.py")
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "SOURCE STORE" in done.stdout


def test_a_store_converted_in_many_transactions_reads_as_one_of_few(small_pieces, images, target, store_path):
    convert(images, target, num_threads=3, commit_records=5)
    assert content(target) == content(store_path)
    with open_store(target) as store:
        raw = target.read_bytes()
        offsets, lengths = store.extents(np.arange(24))
        for i, (offset, length) in enumerate(zip(offsets.tolist(), lengths.tolist(), strict=True)):
            assert raw[offset : offset + length] == bytes(store.read(i))


def test_the_order_does_not_depend_on_the_threads(images, tmp_path):
    stores = [tmp_path / f"{threads}.lmdb" for threads in (1, 2, 9)]
    for threads, path in zip((1, 2, 9), stores, strict=True):
        convert(images, path, num_threads=threads)
    assert content(stores[0]) == content(stores[1]) == content(stores[2])


def test_progress_ends_at_all_images(small_pieces, images, target):
    seen = []
    convert(images, target, progress=seen.append, commit_records=5)
    for phase in ("writing", "verifying"):
        done = [progress.done for progress in seen if progress.phase == phase]
        assert done == sorted(done)
        assert done[-1] == 24
    assert {progress.total for progress in seen} == {24}


def test_an_image_too_wide_for_jpeg_is_bad_when_it_would_be_transcoded(images, target):
    Image.new("L", (70_000, 3)).save(images / "ant" / "wide.png")
    settings = ConvertSettings(transcode=True, on_bad="skip")
    assert convert(images, target, settings=settings).skipped == 1


def test_names_that_are_spelt_the_same_in_utf8_are_refused(images, target):
    data = (images / "ant" / "000.jpg").read_bytes()
    for name in (b"\xff.jpg", b"\\xff.jpg"):
        with open(os.path.join(os.fsencode(images / "ant"), name), "wb") as file:
            file.write(data)
    assert r"ant/\xff.jpg" in refusal(images, target, SourceError)
