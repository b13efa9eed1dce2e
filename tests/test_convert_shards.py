import os
import shutil

import pytest
from conversions import SKIP_BAD, CountedSource, content, die, in_child, left_beside, refusal
from image_sets import save_grey

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.convert.sources import FolderSource
from dali_lmdb.errors import ConversionError, StoreFormatError
from dali_lmdb.store import open_store


def test_all_shards_are_looked_at_before_bad_images_stop_anything(images, target):
    for bad in ("ant/000.jpg", "cat/023.jpg"):
        (images / bad).write_bytes(b"no image")
    message = refusal(images, target, ConversionError, shards=3)
    assert "2 of 24 images are bad" in message
    assert convert(images, target, shards=3, settings=ConvertSettings(on_bad="skip")).skipped == 2


def test_shards_of_bad_images_only_make_no_store(tmp_path, target):
    for name in ("one", "two"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.jpg").write_text("bad")
    assert "all 2 images are bad" in refusal(tmp_path / "images", target, shards=2, settings=SKIP_BAD)
    assert not list(target.parent.glob("*.lmdb"))


def test_no_shard_is_left_to_another_converter_before_all_are_published(
    monkeypatch, images, image_folder, store_path, target
):
    messages = []

    def others():
        messages.append(refusal(image_folder, target, shards=2, restart=True))
        messages.append(refusal(images, target, shards=2, restart=True))

    class Slow(FolderSource):
        def items(self):
            for place, item in enumerate(super().items()):
                in_second_shard = place == 20
                yield item._replace(
                    read=lambda item=item, late=in_second_shard: (others() if late else None, item.read())[1]
                )

    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *paths: (others(), rename(*paths)))
    source = Slow(images)
    convert(source, target, shards=2)
    assert len(messages) == 6
    assert all("another converter" in message for message in messages)
    assert content(target) == content(store_path)
    assert len(left_beside(target)) == 2


@pytest.fixture
def half_published(images, target):
    """A conversion of ``images`` to two shards, killed when the first had got its name."""

    def work():
        original = os.rename

        def rename(*args):
            original(*args)
            die()

        os.rename = rename
        convert(images, target, shards=2)

    assert os.WIFSIGNALED(in_child(work))
    return target


def test_published_in_part_it_publishes_the_rest_of_the_same(half_published, images, store_path):
    source = CountedSource(images)
    convert(source, half_published, shards=2)
    assert source.read == []
    assert content(half_published) == content(store_path)
    assert len(left_beside(half_published)) == 2


def test_published_in_part_nothing_is_mixed_with_images_that_changed_since(half_published, images):
    save_grey(images / "ant" / "000.jpg", 20)
    os.utime(images / "ant" / "000.jpg", ns=(5, 5))
    assert "changed since" in refusal(images, half_published, shards=2)
    assert "already published" in refusal(images, half_published, shards=2, restart=True)


def test_shards_of_two_conversions_of_the_same_names_are_no_set(images, tmp_path):
    for folder, grey in (("one", 3), ("two", 4)):
        (tmp_path / folder).mkdir()
        save_grey(images / "ant" / "000.jpg", grey)
        convert(images, tmp_path / folder / "x.lmdb", shards=2)
    shutil.copy(tmp_path / "two" / "x-00001-of-00002.lmdb", tmp_path / "one")
    with pytest.raises(StoreFormatError):
        open_store(tmp_path / "one" / "x.lmdb")


def test_killed_while_it_tidies_up_the_same_call_tidies_up(images, store_path, target):
    def work():
        original = os.unlink

        def unlink(*args, **options):
            original(*args, **options)
            if str(args[0]).endswith("-journal"):
                die()

        os.unlink = unlink
        convert(images, target, shards=3)

    assert os.WIFSIGNALED(in_child(work))
    assert len(left_beside(target)) == 5
    source = CountedSource(images)
    assert convert(source, target, shards=3).records == 24
    assert source.read == []
    assert len(left_beside(target)) == 3
    assert content(target) == content(store_path)
    assert "already exists" in refusal(images, target, shards=3)
    assert len(left_beside(target)) == 3


def test_shards_have_the_fingerprint_of_the_same_records_in_one_file(image_folder, store_path, target):
    convert(image_folder, target, shards=5)
    with open_store(target) as shards, open_store(store_path) as whole:
        assert shards.fingerprint == whole.fingerprint


@pytest.mark.parametrize(("first", "then"), [(2, 3), (2, None), (None, 2)])
def test_a_target_that_would_open_as_another_is_refused(image_folder, target, first, then):
    convert(image_folder, target, shards=first)
    before = left_beside(target)
    message = refusal(image_folder, target, shards=then)
    assert "would open under the same name; choose another name" in message
    assert message.count(target.name) == 1
    assert left_beside(target) == before


def test_sharded_images_are_listed_as_often_as_unsharded_ones(image_folder, tmp_path):
    listed = []
    for shards in (1, 12):

        class Counted(FolderSource):
            def items(self):
                for item in super().items():
                    listed.append(item.name)
                    yield item

        listed.clear()
        convert(Counted(image_folder), tmp_path / f"{shards}.lmdb", shards=shards)
        assert len(listed) == 24
