"""Records that do not decode, in every backend: named, or replaced by another of their batch."""

import itertools
import json
import logging
import os
import shutil
import threading
import warnings

import msgpack
import numpy as np
import pytest
import torch
from classic_databases import make_classic
from damage import DAMAGE, NO_IMAGE, ZEROED_SCAN, grey_image, noise_image, store_with, write_store
from image_sets import record_of, size_of

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.errors import RecordError
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.torch_loader import TorchLoader
from dali_lmdb.plan.augment import IMAGENET_MEAN, IMAGENET_STD, EvalTransform, TrainTransform
from dali_lmdb.plan.order import StepPlan, epoch_order
from dali_lmdb.store import open_store

TRAIN = TrainTransform(size=16)
EVAL = EvalTransform(size=16, resize=18)
GRAPHS = pytest.mark.parametrize("transform", [TRAIN, EVAL], ids=["train", "eval"])


def dali(store, **arguments):
    return DaliLoader(store, **{"device": "cpu", "num_threads": 1} | arguments)


def torch_here(store, **arguments):
    return TorchLoader(store, **{"num_workers": 0} | arguments)


def torch_in_a_worker(store, **arguments):
    return TorchLoader(store, **{"num_workers": 1} | arguments)


BACKENDS = {"dali": dali, "torch": torch_here, "torch-worker": torch_in_a_worker}


@pytest.fixture(params=BACKENDS)
def make(request):
    """Makes loaders of one backend, closed at the test's end."""
    made = []

    def make_loader(store, **arguments):
        defaults = {"transform": EVAL, "batch_size": 4, "return_index": True}
        made.append(BACKENDS[request.param](store, **defaults | arguments))
        return made[-1]

    yield make_loader
    for loader in made:
        loader.close()


def pixels(images):
    """Normalised images as grey levels."""
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images * std + mean) * 255


def records_of(batch):
    """The records a batch of grey images shows; pixels, labels and indices must agree on them."""
    images, labels, records = batch
    greys = pixels(images)
    assert greys.flatten(1).std(dim=1).max() < 2
    assert [record_of(grey) for grey in greys.mean(dim=(1, 2, 3))] == records.tolist()
    assert labels.tolist() == records.tolist()
    return records.tolist()


def walk(loader, *, seen=records_of):
    """One epoch by one iterator: for each step what it shows, or its ``RecordError``."""
    iterator, steps = iter(loader), []
    while True:
        try:
            steps.append(seen(next(iterator)))
        except StopIteration:
            return steps
        except RecordError as error:
            steps.append(error)
        assert len(steps) < 1000, "the epoch does not end"


def planned(*, num_records=12, epoch=0, transform=EVAL, batch_size=4, rank=0, world_size=1, last_batch="short"):
    """The records of each step of a rank, as if all were good."""
    plan = StepPlan(
        num_positions=num_records, batch_size=batch_size, rank=rank, world_size=world_size, last_batch=last_batch
    )
    order = epoch_order(num_records, seed=0, epoch=epoch, shuffle="full" if transform == TRAIN else "none")
    place, steps = 0, []
    while (positions := plan.positions(place)) is not None:
        place = plan.end_of_step(place)
        following = order((np.arange(num_records) + place) % num_records)
        steps.append((order(positions).tolist(), following.tolist()))
    return steps


def substituted(steps, bad):
    """What is shown of planned steps: each bad record gives way to the next good one of its batch."""
    shown = []
    for step, following in steps:
        good = [record for record in step if record not in bad]
        good = itertools.cycle(good or [next(record for record in following if record not in bad)])
        shown.append([next(good) if record in bad else record for record in step])
    return shown


PLACES = {
    "none": (),
    "first": (0,),
    "last": (11,),
    "end of a batch": (3,),
    "beginning of a batch": (4,),
    "several in one batch": (5, 6),
    "one in every batch": (1, 6, 8),
    "a whole batch": (4, 5, 6, 7),
    "the first batch": (0, 1, 2, 3),
    "the last batch": (8, 9, 10, 11),
    "all but one": (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11),
}


@pytest.fixture(scope="module")
def store_of(tmp_path_factory):
    """Makes a store with bad records at some places, once."""
    stores = {}

    def store(bad, image=grey_image):
        key = tuple(bad), image
        if key not in stores:
            stores[key] = store_with(tmp_path_factory.mktemp("bad") / "store.lmdb", bad, image=image)
        return stores[key]

    return store


# --- on_bad="raise"


@pytest.mark.parametrize("damage", DAMAGE)
@GRAPHS
def test_every_damage_is_told_with_store_index_name_and_cause_in_one_line(make, tmp_path, damage, transform):
    path = store_with(tmp_path / "x.lmdb", {9: damage}, num_records=12)
    loader = make(path, transform=transform, shuffle="none")
    first, second, error = walk(loader)
    assert (first, second) == ([0, 1, 2, 3], [4, 5, 6, 7])
    (bad,) = loader.bad_records
    assert (bad.index, bad.name) == (9, "c09/009.jpg")
    message = str(error)
    assert message.startswith(f"{path}: record 9 (c09/009.jpg): not a decodable image: {bad.cause}; ")
    assert "\n" not in message
    for noise in ("object at 0x", "no longer valid", "Critical error", "Traceback", "sample #", "nvImageCodec"):
        assert noise not in message
    assert len(bad.cause) > 10


@pytest.mark.parametrize("bad", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("batch_size", [1, 4, 12])
def test_an_iterator_goes_on_after_each_bad_batch(make, store_of, bad, batch_size):
    if batch_size == 1 and len(bad) > 3:
        pytest.skip("many pipelines, and nothing new")
    loader = make(store_of(bad), batch_size=batch_size)
    for epoch in range(2):
        steps = walk(loader)
        assert len(steps) == len(loader)
        for (step, _), found in zip(planned(batch_size=batch_size), steps, strict=True):
            first = next((record for record in step if record in bad), None)
            if first is None:
                assert found == step
            else:
                more = len(set(step) & set(bad)) - 1
                assert f": record {first} (" in str(found)
                assert (f"(and {more} more in its batch)" in str(found)) == (more > 0)
        assert loader.epoch == epoch + 1
    assert [record.index for record in loader.bad_records] == list(bad)


def test_a_shuffled_epoch_goes_on_after_each_bad_batch(make, store_of):
    bad = (1, 6, 8)
    loader = make(store_of(bad), transform=TRAIN, last_batch="drop")
    for epoch in range(3):
        for (step, _), found in zip(planned(transform=TRAIN, epoch=epoch), walk(loader), strict=True):
            assert isinstance(found, RecordError) if set(step) & set(bad) else found == step


def test_a_state_taken_after_an_error_goes_on_behind_the_bad_batch(make, store_of):
    loader = make(store_of((5,)))
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(RecordError):
        next(iterator)
    resumed = make(store_of((5,)))
    resumed.load_state_dict(loader.state_dict())
    assert walk(resumed) == [[8, 9, 10, 11]] == [records_of(next(iterator))]


@pytest.mark.parametrize("bad", [(4, 5, 9), (9,)], ids=str)
def test_bad_records_of_an_epoch_that_was_left_do_not_disturb_the_next(make, store_of, bad):
    loader = make(store_of(bad))
    for _ in range(6):
        assert [records_of(batch) for batch in itertools.islice(loader, 1)] == [[0, 1, 2, 3]]
    assert loader.bad_records == []
    expected = [not set(step) & set(bad) and step for step, _ in planned()]
    assert [not isinstance(step, RecordError) and step for step in walk(loader)] == expected


def test_an_epoch_set_after_an_error_begins_at_its_first_record(make, store_of):
    loader = make(store_of((5,)))
    with pytest.raises(RecordError):
        list(loader)
    loader.set_epoch(7)
    assert records_of(next(iter(loader))) == [0, 1, 2, 3]


def test_when_all_records_are_bad_every_step_says_so_and_the_epoch_ends(make, store_of):
    loader = make(store_of(range(12)))
    for _ in range(2):
        steps = walk(loader)
        assert [f": record {record} (" in str(error) for record, error in zip((0, 4, 8), steps, strict=True)]
    assert len(loader.bad_records) == 12


# --- on_bad="substitute"


@pytest.mark.parametrize("bad", PLACES.values(), ids=PLACES)
@GRAPHS
def test_each_bad_record_gives_way_to_another_of_its_batch(make, store_of, bad, transform):
    loader = make(store_of(bad), transform=transform, on_bad="substitute")
    for epoch in range(3):
        assert walk(loader) == substituted(planned(transform=transform, epoch=epoch), bad)
        assert loader.stats()["substituted"] == len(bad) * (epoch + 1)
        assert loader.stats()["bad_records"] == len(bad)
    assert sorted(record.index for record in loader.bad_records) == sorted(bad)


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_substitutes_are_of_the_batch_whatever_its_size(make, store_of, batch_size):
    bad = (1, 2, 7, 11)
    loader = make(store_of(bad), batch_size=batch_size, on_bad="substitute")
    assert walk(loader) == substituted(planned(batch_size=batch_size), bad)


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_is_substituted(make, tmp_path, damage):
    loader = make(store_with(tmp_path / "x.lmdb", {0: damage, 9: damage}), on_bad="substitute")
    for _ in range(2):
        assert walk(loader) == [[1, 1, 2, 3], [4, 5, 6, 7], [8, 8, 10, 11]]


@GRAPHS
def test_good_records_of_a_repaired_batch_are_as_without_the_bad_one(make, store_of, transform):
    bad = (1, 6, 8)
    arguments = {"transform": transform, "dtype": "uint8"}
    whole = make(store_of((), noise_image), **arguments)
    repaired = make(store_of(bad, noise_image), on_bad="substitute", **arguments)
    for _ in range(2):
        expected = {}
        steps = list(zip(whole, repaired, strict=True))
        for (images, _, records), _ in steps:
            expected |= dict(zip(records.tolist(), images, strict=True))
        for (_, _, asked), (images, labels, records) in steps:
            assert images.shape == (4, 3, 16, 16)
            assert labels.tolist() == records.tolist()
            for record, asked_record, image in zip(records.tolist(), asked.tolist(), images, strict=True):
                assert record == asked_record or (asked_record in bad and record not in bad)
                # A substitute is the record as it is in its own place, with its own crop.
                assert torch.equal(image, expected[record])


def test_when_all_records_are_bad_there_is_no_substitute_and_the_epoch_ends(make, store_of):
    loader = make(store_of(range(12)), on_bad="substitute")
    for _ in range(2):
        steps = walk(loader)
        assert len(steps) == 3
        for error in steps:
            assert "no record of the store can be decoded" in str(error)
            assert str(loader.store.path) in str(error)
            assert "\n" not in str(error)
    assert len(loader.bad_records) == 12


@pytest.mark.parametrize("last_batch", ["drop", "pad", "short"])
def test_ranks_keep_their_number_of_steps(make, store_of, last_batch):
    bad = (0, 1, 4, 5, 10)  # in batches of two: a whole one of each of the first ranks, half a one of the third
    for rank in range(3):
        place = {"rank": rank, "world_size": 3, "batch_size": 2, "last_batch": last_batch}
        loader = make(store_of(bad), on_bad="substitute", **place)
        expected = substituted(planned(**place), bad)
        for _ in range(2):
            assert walk(loader) == expected
        assert len(loader) == len(expected)


def test_bad_records_that_are_abandoned_leave_the_next_epoch_whole(make, store_of):
    bad = (4, 5, 9)
    loader = make(store_of(bad), on_bad="substitute")
    for _ in range(4):
        assert [records_of(batch) for batch in itertools.islice(loader, 1)] == [[0, 1, 2, 3]]
    assert loader.stats()["substituted"] == 0
    assert walk(loader) == substituted(planned(), bad)


@GRAPHS
@pytest.mark.parametrize("steps_before", [1, 2])
def test_a_resumed_loader_shows_the_same_substitutes(make, store_of, transform, steps_before):
    bad = (0, 1, 5, 6, 10)
    arguments = {"transform": transform, "on_bad": "substitute", "dtype": "uint8"}
    whole = [(images, records) for images, _, records in make(store_of(bad, noise_image), **arguments)]
    first = make(store_of(bad, noise_image), **arguments)
    list(itertools.islice(first, steps_before))
    resumed = make(store_of(bad, noise_image), **arguments)
    resumed.load_state_dict(first.state_dict())
    rest = list(resumed)
    assert len(rest) == 3 - steps_before
    for (images, _, records), (expected, expected_records) in zip(rest, whole[steps_before:], strict=True):
        assert torch.equal(records, expected_records)
        assert torch.equal(images, expected)


def test_a_state_of_one_backend_goes_on_in_the_other_with_the_same_substitutes(store_of):
    bad = (0, 1, 5, 6, 10)
    arguments = {"transform": TRAIN, "on_bad": "substitute", "batch_size": 4, "return_index": True}
    expected = substituted(planned(transform=TRAIN), bad)
    for begin, go_on in itertools.permutations((dali, torch_here)):
        with begin(store_of(bad), **arguments) as first, go_on(store_of(bad), **arguments) as second:
            assert records_of(next(iter(first))) == expected[0]
            second.load_state_dict(first.state_dict())
            assert walk(second) == expected[1:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
def test_the_number_of_workers_and_threads_changes_nothing(store_of):
    bad = (0, 1, 5, 6, 10)
    arguments = {"transform": TRAIN, "on_bad": "substitute", "batch_size": 4, "dtype": "uint8"}
    path = store_of(bad, noise_image)

    def images(loader):
        with loader:
            return torch.cat([images for _ in range(2) for images, _ in loader])

    here, apart = TorchLoader(path, num_workers=0, **arguments), TorchLoader(path, num_workers=2, **arguments)
    assert torch.equal(images(here), images(apart))
    one = {"device": "cpu", "num_threads": 1, "prefetch_queue_depth": 1}
    many = {"device": "cpu", "num_threads": 3, "prefetch_queue_depth": 4}
    assert torch.equal(images(DaliLoader(path, **one, **arguments)), images(DaliLoader(path, **many, **arguments)))


def test_weights_may_draw_a_bad_record_again_and_again(make, store_of):
    weights = np.where(np.arange(12) == 5, 20.0, 1.0)
    loader = make(store_of((5,)), weights=weights, transform=TRAIN, on_bad="substitute")
    for _ in range(4):
        steps = walk(loader)
        assert [len(step) for step in steps] == [4, 4, 4]
        assert 5 not in {record for step in steps for record in step}
    assert loader.stats()["substituted"] > 12
    assert loader.stats()["bad_records"] == 1


# --- what is told of them


def test_a_warning_names_each_bad_record_once(make, store_of, caplog):
    loader = make(store_of((1, 6, 8)), on_bad="substitute")
    for _ in range(3):
        list(loader)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert len(caplog.messages) == 3
    for message, bad in zip(caplog.messages, loader.bad_records, strict=True):
        assert str(loader.store.path) in message
        assert f"record {bad.index} ({bad.name})" in message
        assert bad.cause in message
        assert "\n" not in message


def test_errors_are_not_logged_too(make, store_of, caplog):
    walk(make(store_of((1, 6, 8))))
    assert caplog.messages == []


@pytest.mark.parametrize("on_bad", ["raise", "substitute"])
def test_a_quarantine_file_gets_each_bad_record_once(make, store_of, tmp_path, on_bad):
    quarantine = tmp_path / "bad.jsonl"
    loader = make(store_of((1, 6, 8)), on_bad=on_bad, quarantine=quarantine)
    for _ in range(3):
        walk(loader)
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert lines == [
        {"store": str(loader.store.path), "index": bad.index, "name": bad.name, "cause": bad.cause}
        for bad in loader.bad_records
    ]
    assert [line["index"] for line in lines] == [1, 6, 8]


def test_a_quarantine_file_is_added_to(make, store_of, tmp_path):
    for bad in ((1,), (6, 8)):
        walk(make(store_of(bad), quarantine=tmp_path / "bad.jsonl"))
    lines = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [1, 6, 8]


def test_a_quarantine_file_that_cannot_be_written_any_more_stops_nothing(make, store_of, tmp_path, caplog):
    folder = tmp_path / "lists"
    folder.mkdir()
    loader = make(store_of((1,)), on_bad="substitute", quarantine=folder / "bad.jsonl")
    (folder / "bad.jsonl").unlink()
    folder.rmdir()
    walk(loader)
    assert [bad.index for bad in loader.bad_records] == [1]
    assert "cannot be written: No such file or directory" in caplog.text


def test_names_with_line_breaks_stay_in_one_line(make, tmp_path):
    folder = tmp_path / "images" / "one"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(grey_image(number))
    (folder / "a\nb.jpg").write_bytes(DAMAGE["scan cut off"])
    convert(tmp_path / "images", tmp_path / "x.lmdb")
    loader = make(tmp_path / "x.lmdb", quarantine=tmp_path / "bad.jsonl")
    with pytest.raises(RecordError, match=r"record 3 \(one/a\\nb.jpg\): "):
        next(iter(loader))
    (line,) = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "one/a\nb.jpg"


# --- what is no bad record


def test_damage_that_no_decoder_notices_is_shown(make, tmp_path):
    values = [grey_image(record) for record in range(9)] + [ZEROED_SCAN]
    loader = make(write_store(tmp_path / "x.lmdb", values), batch_size=5)
    steps = walk(loader, seen=lambda batch: batch[2].tolist())
    assert steps == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert loader.bad_records == []


def test_a_good_store_is_never_probed(store_of):
    with dali(store_of(()), transform=TRAIN, batch_size=4, on_bad="substitute") as loader:
        for _ in range(3):
            list(loader)
        assert loader._verdicts._known == {}
        assert loader.stats()["bad_records"] == loader.stats()["substituted"] == 0


def test_only_batches_with_known_bad_records_are_probed_again(store_of):
    with dali(store_of((5,)), transform=EVAL, batch_size=4, on_bad="substitute") as loader:
        list(loader)
        assert {record for _, record in loader._verdicts._known} == {4, 5, 6, 7}
        list(loader)
        assert {record for epoch, record in loader._verdicts._known if epoch == 1} == {5}


def test_an_image_that_is_not_of_the_size_in_the_index_is_named_or_read_as_it_is(make, tmp_path):
    """As when a store was changed after it was converted; Pillow reads sizes from the image itself."""
    values = [grey_image(record) for record in range(8)]
    sizes = [size_of(record) for record in range(8)]
    sizes[5] = (500, 600)
    loader = make(write_store(tmp_path / "x.lmdb", values, sizes=sizes))
    first, second = walk(loader)
    assert first == [0, 1, 2, 3]
    if isinstance(loader, DaliLoader):
        assert ": record 5 (c05/005.jpg)" in str(second)
        assert "window is outside of the image" in str(second)
        assert "Pillow decodes it" in str(second)
    else:
        assert second == [4, 5, 6, 7]


# --- image folders


@pytest.mark.parametrize("num_workers", [0, 1])
def test_files_of_an_image_folder_that_do_not_decode_or_vanish_are_named(image_folder, tmp_path, num_workers):
    folder = shutil.copytree(image_folder, tmp_path / "images")
    with TorchLoader(
        folder, transform=EVAL, batch_size=4, num_workers=num_workers, on_bad="substitute", return_index=True
    ) as loader:
        (folder / "ant" / "001.jpg").write_bytes(DAMAGE["text"])
        (folder / "ant" / "006.jpg").unlink()
        assert [records.tolist() for _, _, records in loader][:2] == [[0, 0, 2, 3], [4, 5, 4, 7]]
        first, second = loader.bad_records
    assert (first.name, first.cause) == ("ant/001.jpg", NO_IMAGE)
    assert second.name == "ant/006.jpg"
    assert "cannot be read: No such file" in second.cause


# --- classic databases


@pytest.mark.parametrize("on_bad", ["raise", "substitute"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_record_of_a_classic_database_without_a_label_is_an_error_in_one_line(tmp_path, num_workers, on_bad):
    records = [(grey_image(record), record) for record in range(12)]
    cut = msgpack.packb(records[5])[:-100]
    path = make_classic(tmp_path / "x.lmdb", records, values={5: cut})
    with TorchLoader(
        path, transform=EVAL, batch_size=4, num_workers=num_workers, on_bad=on_bad, return_index=True
    ) as loader:
        steps = walk(loader)
    assert len(steps) == 3  # labels are looked up in all records at once
    for error in steps:
        assert f"{path}: record 5 (key '5'): damaged msgpack" in str(error)
        assert "\n" not in str(error)


# --- the long run


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_recovering_again_and_again_leaves_no_threads_behind(store_of, backend):
    """Nor do errors that are kept, as in a list, keep the pipeline they came from."""
    with BACKENDS[backend](store_of((1, 6, 8)), transform=EVAL, batch_size=4, return_index=True) as loader:
        walk(loader)
        threads = native_threads()
        for _ in range(8):
            walk(loader)
        assert native_threads() <= threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dali_lmdb")]


def native_threads():
    """Threads of this process, DALI's own among them."""
    return len(os.listdir("/proc/self/task"))


# --- real odd files


def odd_verdicts(test_data):
    """Each odd file's name with whether Pillow and DALI decode it, whole and on the CPU.

    What is no JPEG counts as decoded by DALI if Pillow decodes it, as it does for DALI where DALI cannot.
    """
    header, *rows = [
        line.split("\t") for line in (test_data / "odd-images" / "MANIFEST.tsv").read_text().splitlines()
    ]
    verdicts = {}
    for row in rows:
        file = dict(zip(header, row, strict=True))
        decoder = "dali_cpu" if file["pillow_format/mode"].startswith("JPEG/") else "pillow"
        verdicts[file["file"]] = (file["pillow"] == "ok", file[decoder] == "ok")
    return verdicts


@pytest.fixture(scope="module")
def odd_path(test_data, tmp_path_factory):
    """Every odd file that some decoder refuses and whose header passes, three to a good image."""
    root = tmp_path_factory.mktemp("odd")
    refused = [name for name, answers in odd_verdicts(test_data).items() if answers != (True, True)]
    for number, name in enumerate(refused):
        folder = root / "images" / f"{number % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03}-{name}.jpg").write_bytes((test_data / "odd-images" / name).read_bytes())
        if number % 3 == 0:
            (folder / f"{number:03}-good.jpg").write_bytes(grey_image(number % 24))
    convert(root / "images", root / "odd.lmdb", settings=ConvertSettings(check="header", on_bad="skip"))
    return root / "odd.lmdb"


def original(name):
    """The odd file's own name, from the record's; None of a good image."""
    name = name.split("/")[1].split("-", 1)[1].removesuffix(".jpg")
    return None if name == "good" else name


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@GRAPHS
@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_every_damaged_odd_file_is_named_and_survived(odd_path, test_data, backend, transform):
    answers = odd_verdicts(test_data)
    loader = BACKENDS[backend](odd_path, transform=transform, batch_size=1, shuffle="none", return_index=True)
    with loader:
        steps = walk(loader, seen=lambda batch: batch[2].item())
        errors = {index: str(error) for index, error in enumerate(steps) if isinstance(error, RecordError)}
        assert [step for step in steps if not isinstance(step, RecordError)] == [
            index for index in range(len(steps)) if index not in errors
        ]
        for index, message in errors.items():
            assert message.startswith(f"{odd_path}: record {index} ({loader.store.name(index)}): ")
            assert "\n" not in message
        names = [original(loader.store.name(index)) for index in range(len(steps))]
        expected = {
            index for index, name in enumerate(names) if name and not answers[name][0 if backend == "torch" else 1]
        }
        if backend == "torch" or transform == EVAL:
            unexpected = {names[index] for index in errors.keys() ^ expected}
        else:
            # DALI decodes as far as the crop reaches; damage below it goes unseen.
            unexpected = {names[index] for index in errors.keys() - expected}
    assert unexpected == set()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@GRAPHS
def test_damaged_odd_files_are_substituted_in_any_batch(make, odd_path, transform):
    loader = make(odd_path, transform=transform, batch_size=7, on_bad="substitute", last_batch="short")
    for _ in range(2):
        steps = list(loader)
        assert sum(len(labels) for _, labels, _ in steps) == loader.num_records
        for images, labels, records in steps:
            assert images.isfinite().all()
            assert labels.tolist() == loader.store.labels[records.numpy()].tolist()
        bad = {record.index for record in loader.bad_records}
        if transform == EVAL or not isinstance(loader, DaliLoader):
            assert not bad & {record for _, _, records in steps for record in records.tolist()}
    assert len(bad) > 60


def test_odd_files_that_no_header_check_passes_are_named_too(make, test_data, odd_path, tmp_path):
    with open_store(odd_path) as store:
        stored = {original(store.name(index)) for index in range(len(store))}
    refused = [name for name, answers in odd_verdicts(test_data).items() if answers == (False, False)]
    values = [(test_data / "odd-images" / name).read_bytes() for name in refused if name not in stored]
    assert len(values) > 30
    values = [value for one in values for value in (one, grey_image(0))]
    path = write_store(tmp_path / "x.lmdb", values, sizes=[size_of(0)] * len(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = make(path, batch_size=8, on_bad="substitute")
        for images, labels, records in loader:
            assert labels.tolist() == records.tolist()
            assert records.tolist() == [record | 1 for record in records.tolist()]
            assert images.shape == (len(records), 3, 16, 16)
    assert [record.index for record in loader.bad_records] == list(range(0, len(values), 2))
