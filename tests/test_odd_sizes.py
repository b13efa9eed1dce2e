"""Records whose size the index does not know: bad records, and no reason to refuse all others."""

import io

import numpy as np
import pytest
from classic_databases import make_classic
from damage import NO_IMAGE, giant_png, grey_image, write_store
from image_sets import size_of
from PIL import Image

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.errors import RecordError, StoreFormatError
from dali_lmdb.images.header import MAX_PIXELS
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import EvalTransform, TrainTransform
from dali_lmdb.store import open_store, sidecar

TRANSFORMS = {"eval": EvalTransform(size=16, resize=18), "train": TrainTransform(size=16)}
NUM_GOOD = 7


def dali(path, **arguments):
    return DaliLoader(path, device="cpu", num_threads=1, **arguments)


def classic(path, **arguments):
    return TorchLoader(path, num_workers=0, **arguments)


LOADERS = pytest.mark.parametrize("make", [dali, classic])
GRAPHS = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)

ODD = {
    "html": (b"<html>", NO_IMAGE),
    "nothing": (b"", NO_IMAGE),
    "cut off": (grey_image(0)[:100], ""),
    "giant": (giant_png(), f"60000 x 50000 pixels, more than the limit of {2 * MAX_PIXELS}"),
}


def database(tmp_path, odd, *, place=0):
    """A classic database of good records and an odd one, labelled by their place."""
    files = [grey_image(record) for record in range(NUM_GOOD)]
    files.insert(place, odd)
    return make_classic(tmp_path / "x.lmdb", list(zip(files, range(len(files)), strict=True)))


@LOADERS
@GRAPHS
@pytest.mark.parametrize("place", [0, 3, NUM_GOOD])
@pytest.mark.parametrize(("odd", "cause"), ODD.values(), ids=ODD)
def test_an_odd_record_of_a_classic_database_is_named(tmp_path, make, transform, odd, cause, place):
    path = database(tmp_path, odd, place=place)
    labels = []
    with make(path, transform=transform, batch_size=1, shuffle="none") as loader:
        steps = iter(loader)
        for record in range(NUM_GOOD + 1):
            if record == place:
                with pytest.raises(RecordError) as caught:
                    next(steps)
                assert str(caught.value).startswith(f"{path}: record {place} (key '{place}'): not a decodable ")
                assert cause in str(caught.value)
                assert "\n" not in str(caught.value)
            else:
                labels += next(steps)[1].tolist()
    assert labels == [record for record in range(NUM_GOOD + 1) if record != place]


@LOADERS
@GRAPHS
@pytest.mark.parametrize("odd", [odd for odd, _ in ODD.values()], ids=ODD)
def test_an_odd_record_of_a_classic_database_is_substituted(tmp_path, make, transform, odd):
    path = database(tmp_path, odd)
    with make(path, transform=transform, batch_size=4, shuffle="none", on_bad="substitute") as loader:
        assert [labels.tolist() for _, labels in loader] == [[1, 1, 2, 3], [4, 5, 6, 7]]
        assert [bad.index for bad in loader.bad_records] == [0]


@LOADERS
@GRAPHS
@pytest.mark.parametrize("odd", [odd for odd, _ in ODD.values()], ids=ODD)
def test_a_sampler_of_the_good_records_never_meets_the_odd_one(tmp_path, make, transform, odd):
    path = database(tmp_path, odd)
    good = range(1, NUM_GOOD + 1)
    with make(path, transform=transform, batch_size=2, sampler=good, shuffle="none", last_batch="short") as loader:
        assert [label for _, labels in loader for label in labels.tolist()] == list(good)


@LOADERS
def test_an_image_of_which_pillow_only_warns_is_read_from_a_classic_database(tmp_path, make):
    file = io.BytesIO()
    side = 9_460
    assert MAX_PIXELS < side * side < 2 * MAX_PIXELS
    Image.new("1", (side, side), 1).save(file, "PNG")
    path = make_classic(tmp_path / "x.lmdb", [(file.getvalue(), 0), (grey_image(1), 1)])
    with make(path, transform=TRANSFORMS["eval"], batch_size=1, dtype="uint8") as loader:
        assert next(images.max().item() for images, _ in loader) == 255
    assert open_store(path).column("height").tolist() == [side, size_of(1)[0]]


@LOADERS
def test_a_classic_database_of_odd_records_only_names_each(tmp_path, make):
    path = make_classic(tmp_path / "x.lmdb", [(b"<html>", 0), (b"", 1)])
    with make(path, transform=TRANSFORMS["eval"], batch_size=1) as loader:
        steps = iter(loader)
        for record in range(2):
            with pytest.raises(RecordError, match=f"record {record} "):
                next(steps)


def test_an_index_of_an_earlier_version_which_took_large_images_for_none_is_made_again(tmp_path):
    path = make_classic(tmp_path / "x.lmdb", [(grey_image(record), record) for record in range(3)])
    store = open_store(path)
    columns = dict(store._read_all()) | {name: np.zeros(3, np.int32) for name in ("height", "width")}
    assert sidecar.save(path, store._stamp._replace(version=1), columns)
    assert open_store(path).column("height").tolist() == [size_of(record)[0] for record in range(3)]


@LOADERS
@GRAPHS
def test_a_record_of_a_store_without_a_size_is_a_bad_record(tmp_path, make, transform):
    values = [grey_image(record) for record in range(4)]
    values[2] = b"<html>"
    sizes = [size_of(record) for record in range(4)]
    sizes[2] = (0, 0)
    path = write_store(tmp_path / "x.lmdb", values, sizes=sizes)
    with make(path, transform=transform, batch_size=4, shuffle="none", on_bad="substitute") as loader:
        assert [labels.tolist() for _, labels in loader] == [[0, 1, 0, 3]]
        assert [bad.cause for bad in loader.bad_records] == [NO_IMAGE]
    with (
        make(path, transform=transform, batch_size=4, shuffle="none") as loader,
        pytest.raises(RecordError, match=r"record 2 \(c02/002.jpg\): not a decodable image"),
    ):
        list(loader)


@GRAPHS
@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP"])
def test_dali_shows_no_good_image_of_which_the_index_has_no_size(tmp_path, transform, format):
    file = io.BytesIO()
    Image.new("RGB", (44, 60)).save(file, format)
    path = write_store(tmp_path / "x.lmdb", [grey_image(0), file.getvalue()], sizes=[size_of(0), (0, 0)])
    with dali(path, transform=transform, batch_size=1, shuffle="none") as loader:
        steps = iter(loader)
        next(steps)
        with pytest.raises(RecordError, match=r"record 1 .*the index has no size for it; convert it again"):
            next(steps)


@pytest.mark.parametrize("shards", [None, 2])
def test_a_store_without_any_size_is_refused_by_dali_with_the_reason(image_folder, tmp_path, shards):
    path = tmp_path / "x.lmdb"
    convert(image_folder, path, settings=ConvertSettings(check="none"), shards=shards)
    with pytest.raises(StoreFormatError, match=r"--check none.*convert it again with --check header"):
        dali(path, transform=TRANSFORMS["eval"], batch_size=4)
    with classic(path, transform=TRANSFORMS["eval"], batch_size=4) as loader:
        assert sum(len(labels) for _, labels in loader) == 24
