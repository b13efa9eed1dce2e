"""One source split into a store for training and one for validation."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conversions import Killer, content, in_child, left_beside, run_main
from image_sets import make_image_folder, save_grey

from dali_lmdb.convert import Split, convert_split
from dali_lmdb.errors import ConversionError
from dali_lmdb.store import open_store

TENTH = Split(fraction=0.1, seed=0)
STORES = ["x-train.lmdb", "x-val.lmdb"]


def mask_of(split, names):
    """Which names are for validation; a name's class is its folder."""
    folders = sorted({name.split("/")[0] for name in names})
    labels = [folders.index(name.split("/")[0]) for name in names]
    hashes = [split.hash_of(name) for name in names]
    return split.validation_mask(np.array(hashes, np.uint64), np.array(labels, np.int32))


def chosen(split, names):
    return {name for name, is_val in zip(names, mask_of(split, names), strict=True) if is_val}


def names_in(path):
    with open_store(path) as store:
        return [store.name(index) for index in range(len(store))]


def parts_of(target):
    return [target.with_name(name) for name in STORES]


@pytest.mark.parametrize(
    ("size", "fraction", "num_val"),
    [
        (1, 0.9, 0),  # nothing would be left for training
        (2, 0.01, 1),  # validation has every class that can be divided
        (2, 0.99, 1),  # and so has training
        (10, 0.1, 1),
        (15, 0.1, 2),  # a half is rounded up
        (1000, 0.25, 250),
    ],
)
def test_a_class_gives_its_rounded_share_to_validation(size, fraction, num_val):
    assert len(chosen(Split(fraction=fraction), [f"a/{number}" for number in range(size)])) == num_val


def test_an_image_that_is_added_moves_at_most_one_other():
    names = [f"{'ab'[number % 2]}/{number}" for number in range(400)]
    before = chosen(TENTH, names)
    for number in range(60):
        after = chosen(TENTH, [*names, f"a/new{number}"]) - {f"a/new{number}"}
        assert len(before ^ after) <= 1
        assert {name for name in before ^ after if name.startswith("b/")} == set()


def test_the_split_depends_on_names_and_seed_not_on_order():
    names = [f"{'ab'[number % 2]}/{number}" for number in range(400)]
    assert chosen(TENTH, names[::-1]) == chosen(TENTH, names)
    assert len(chosen(TENTH, names) & chosen(Split(fraction=0.1, seed=1), names)) < 20  # of 40


def test_the_split_stays_what_it_is():
    names = [f"{'ab'[number % 2]}/{number}.jpg" for number in range(40)]
    assert sorted(chosen(TENTH, names)) == ["a/16.jpg", "a/36.jpg", "b/11.jpg", "b/17.jpg"]


def test_two_stores_hold_each_image_once_and_all_classes(images, target):
    (images / "ant" / "broken.jpg").write_bytes(b"no image")
    (images / "ant" / "note.txt").touch()
    code, out, err = run_main(images, target, "--split", 0.25, "--seed", 3, "--on-bad", "skip", "--json")
    assert (code, err) == (0, "")
    train, val = parts_of(target)
    summary = json.loads(out)
    assert [summary["train"]["store"], summary["val"]["store"]] == [str(train), str(val)]
    assert [summary["train"]["records"], summary["val"]["records"]] == [18, 6]
    names = sorted(f"{path.parent.name}/{path.name}" for path in images.glob("*/0*.jpg"))
    expected = chosen(Split(fraction=0.25, seed=3), [*names, "ant/broken.jpg"]) - {"ant/broken.jpg"}
    assert set(names_in(val)) == expected
    assert sorted(names_in(train) + names_in(val)) == names
    with open_store(train) as first, open_store(val) as second:
        assert first.classes == second.classes == ["ant", "bee", "cat"]
        splits = [store.meta.made["source"]["split"] for store in (first, second)]
    assert splits == [{"part": part, "fraction": 0.25, "seed": 3} for part in ("train", "val")]
    reports = [line for part in (train, val) for line in report_lines(part)]
    assert sorted(line.split("\t")[0] for line in reports) == ["ant/broken.jpg", "ant/note.txt"]
    assert not target.exists()


def report_lines(store):
    report = store.with_name(store.name + ".bad.tsv")
    return report.read_text().splitlines()[1:] if report.exists() else []


KILLS = range(0, 260, 13)


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("whole") / "x.lmdb"
    convert_split(image_folder, target, split=TENTH)
    return [content(path) for path in parts_of(target)]


@pytest.mark.parametrize("at", KILLS)
def test_killed_at_any_instant_the_same_call_makes_both(small_pieces, image_folder, whole, target, at):
    def work():
        Killer(at).arm()
        convert_split(image_folder, target, split=TENTH, num_threads=1, commit_records=5)

    status = in_child(work)
    assert status == 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)
    if left_beside(target) != STORES:
        convert_split(image_folder, target, split=TENTH)
    assert [content(path) for path in parts_of(target)] == whole
    assert left_beside(target) == STORES


def test_the_kills_above_cover_a_whole_split(small_pieces, image_folder, target):
    killer = Killer(10**9)

    def work():
        killer.arm()
        convert_split(image_folder, target, split=TENTH, num_threads=1, commit_records=5)
        os._exit(min(255, (10**9 - killer.left) // 2))

    instants = 2 * os.waitstatus_to_exitcode(in_child(work))
    assert 100 < instants < KILLS[-1] + 30


def test_a_second_store_that_is_missing_is_published_beside_the_first(image_folder, whole, target):
    def work():
        import dali_lmdb.convert._converter as converter

        rename = os.rename

        def rename_then_die(*paths):
            rename(*paths)
            os.kill(os.getpid(), signal.SIGKILL)

        converter.os.rename = rename_then_die
        convert_split(image_folder, target, split=TENTH)

    in_child(work)
    assert [path.exists() for path in parts_of(target)] == [True, False]
    convert_split(image_folder, target, split=TENTH)
    assert [content(path) for path in parts_of(target)] == whole
    assert left_beside(target) == STORES


def test_a_store_that_is_deleted_later_is_not_made_beside_the_other(image_folder, target):
    convert_split(image_folder, target, split=TENTH)
    os.unlink(parts_of(target)[1])
    with pytest.raises(ConversionError, match=r"x-train\.lmdb: already exists; choose another name"):
        convert_split(image_folder, target, split=TENTH)
    assert left_beside(target) == STORES[:1]


def test_an_interrupted_split_is_not_resumed_as_another(images, target):
    (images / "ant" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ConversionError, match="1 of 25 images are bad"):
        convert_split(images, target, split=TENTH)
    with pytest.raises(ConversionError, match=r"'seed': 0.*'seed': 1.*repeat the same command"):
        convert_split(images, target, split=Split(fraction=0.1, seed=1))


def test_shards_of_both_are_written_by_two_ranks(image_folder, whole, target):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [image_folder, target, "--split", "0.1", "--shards", "2"]
    subprocess.run([*command, "-m", "dali_lmdb.convert", *map(str, options)], check=True, capture_output=True)
    assert [content(path) for path in parts_of(target)] == whole
    assert left_beside(target) == [
        f"x-{part}-0000{index}-of-00002.lmdb" for part in ("train", "val") for index in range(2)
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1"], "--seed needs --split"),
        (["--split", "1"], "1.0 is not in the range 0<x<1"),
        (["--split", "0.1", "--shards", "4"], "x-val.lmdb: 4 shards for 3 images; use fewer shards"),
    ],
)
def test_what_cannot_be_split_is_refused_in_one_line(image_folder, target, options, message):
    code, out, err = run_main(image_folder, target, *options)
    assert code != 0
    assert message in err.splitlines()[-1]
    assert (out, left_beside(target)) == ("", [])


def test_classes_of_one_image_cannot_be_split(tmp_path, target):
    make_image_folder(tmp_path / "one", num_records=3)
    assert "x-val.lmdb: nothing to split off: no class has two images" in refusal_of_split(
        tmp_path / "one", target
    )
    assert left_beside(target) == []


def refusal_of_split(source, target):
    with pytest.raises(ConversionError) as info:
        convert_split(source, target, split=TENTH)
    return str(info.value)


def test_images_that_were_added_since_are_noticed(images, target):
    (images / "ant" / "broken.jpg").write_bytes(b"no image")
    refusal_of_split(images, target)
    (images / "ant" / "broken.jpg").unlink()
    save_grey(images / "bee" / "new.jpg", 3)
    assert "an interrupted conversion has source" in refusal_of_split(images, target)
