import itertools

import pytest
from image_sets import make_image_folder, record_of, save_damaged, save_grey
from loading import EVAL, TRAIN, epoch_of, greys, planned, torch_here

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.errors import RecordError
from dali_lmdb.loaders.dataset import ImageFolderLMDB

BAD = (9, 22)


@pytest.fixture(scope="module")
def bad_path(tmp_path_factory):
    """As ``store_path``, but records 9 and 22 are PNG files with a damaged middle."""
    root = tmp_path_factory.mktemp("bad")
    folder = make_image_folder(root / "images")
    for record in BAD:
        (path,) = folder.rglob(f"{record:03}.jpg")
        save_damaged(path)
    convert(folder, root / "bad.lmdb")
    return root / "bad.lmdb"


def test_a_bad_record_is_named_in_one_line(make, bad_path):
    loader = make(bad_path, transform=EVAL)
    iterator = iter(loader)
    next(iterator), next(iterator)
    with pytest.raises(RecordError) as info:
        next(iterator)
    message = str(info.value)
    assert "\n" not in message
    assert str(bad_path) in message
    assert "record 9 (bee/009.jpg)" in message
    assert "no longer valid" not in message


def test_after_a_bad_record_the_loader_goes_on(make, bad_path):
    loader = make(bad_path, transform=EVAL)
    with pytest.raises(RecordError):
        list(loader)
    loader.set_epoch(5)
    seen = [records.tolist() for _, _, records in itertools.islice(loader, 2)]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_bad_record_of_an_epoch_that_was_left_concerns_nobody(make, bad_path):
    loader = make(bad_path, transform=EVAL)
    for _ in range(4):
        for images, _, records in itertools.islice(loader, 2):
            assert [record_of(grey) for grey in greys(images, EVAL)] == records.tolist()


def test_substitutes_take_the_place_of_bad_records(make, bad_path, caplog):
    loader = make(bad_path, transform=EVAL, on_bad="substitute")
    for epoch in range(3):
        steps = epoch_of(loader)
        assert [len(step) for step in steps] == [4] * 6
        for step, whole in zip(steps, planned(batch_size=4, shuffle="none"), strict=True):
            for shown, asked in zip(step, whole, strict=True):
                assert shown == asked or (asked in BAD and shown in whole and shown not in BAD)
        assert loader.epoch == epoch + 1
    assert [bad.index for bad in loader.bad_records] == list(BAD)
    assert [bad.name for bad in loader.bad_records] == ["bee/009.jpg", "cat/022.jpg"]
    assert all(bad.cause for bad in loader.bad_records)
    assert loader.stats()["substituted"] == 6
    assert len([message for message in caplog.messages if "bee/009.jpg" in message]) == 1


@pytest.mark.parametrize("transform", [TRAIN, EVAL], ids=["train", "eval"])
def test_a_batch_of_bad_records_only_shows_records_that_follow(make, tmp_path, transform):
    folder = make_image_folder(tmp_path / "images", num_records=8, classes=("one",))
    for record in (2, 3):
        save_damaged(folder / "one" / f"{record:03}.jpg")
    convert(folder, tmp_path / "x.lmdb")
    loader = make(tmp_path / "x.lmdb", transform=transform, batch_size=2, shuffle="none", on_bad="substitute")
    for _ in range(2):
        first, bad, third, fourth = epoch_of(loader)
        assert (first, third, fourth) == ([0, 1], [4, 5], [6, 7])
        assert set(bad) == {4}
    assert [record.index for record in loader.bad_records] == [2, 3]


@pytest.mark.parametrize("batch_size", [3, 12])
def test_substitutes_are_counted_when_they_are_shown_not_when_they_are_prepared(make, bad_path, batch_size):
    loader = make(bad_path, transform=EVAL, on_bad="substitute", batch_size=batch_size)
    for epoch in range(3):
        list(loader)
        assert loader.stats()["substituted"] == 2 * (epoch + 1)


def test_pillows_cause_of_a_bad_record_says_the_same_every_time(tmp_path):
    folder = tmp_path / "images" / "one"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(b"these are no pixels" * 50)
    save_grey(folder / "4.jpg", 3)
    convert(tmp_path / "images", tmp_path / "x.lmdb", settings=ConvertSettings(check="none"))
    with torch_here(tmp_path / "x.lmdb", transform=EVAL, batch_size=5, on_bad="substitute") as loader:
        list(loader)
        causes = {bad.cause for bad in loader.bad_records}
    assert len(causes) == 1
    assert " at 0x" not in causes.pop()


def test_the_state_counts_substituted_records_as_seen(make, bad_path):
    loader = make(bad_path, transform=EVAL, on_bad="substitute", batch_size=5)
    iterator = iter(loader)
    next(iterator), next(iterator)
    resumed = make(bad_path, transform=EVAL, on_bad="substitute", batch_size=24)
    resumed.load_state_dict(loader.state_dict())
    (step,) = epoch_of(resumed)
    assert len(step) == 14
    assert step[:12] == list(range(10, 22))


def test_a_bad_item_is_a_record_error(bad_path):
    data = ImageFolderLMDB(bad_path)
    with pytest.raises(RecordError, match=r"record 9 \(bee/009\.jpg\)"):
        data[9]
    data[8]
