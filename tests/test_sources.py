import os
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from image_sets import make_image_folder, save_grey
from packing import image_paths, items_of, pack, pack_folder, records_of, write_parquet

from dali_lmdb.convert import convert
from dali_lmdb.convert.sources import KINDS, FolderSource, open_source
from dali_lmdb.convert.sources import _files as files
from dali_lmdb.errors import ConversionError, SourceError, StoreError

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders with sub-folders, extensions in capitals and files that are no images."""
    root = make_image_folder(tmp_path_factory.mktemp("sources") / "images", num_records=12)
    # As strings, "bee-2" sorts before "bee/sub" and "cat/sub-1" before "cat/sub/...".
    for name, record in {
        "bee/sub/a.JPG": 12,
        "cat/sub-1/a.jpg": 13,
        "cat/sub/a.jpg": 14,
        "cat/sub/b.jpg": 15,
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        save_grey(root / name, record)
    (root / "ant" / "notes.txt").write_text("no image")
    (root / "README").write_text("no image")
    return root


@pytest.fixture(scope="module")
def expected(images):
    return items_of(open_source(images))


def data_of(images, name):
    return (images / name).read_bytes()


def label_of(name):
    return CLASSES.index(name.partition("/")[0])


def packed(kind, images, folder):
    """The images as one kind of source: (path, further arguments of open_source)."""
    folder.mkdir(exist_ok=True)
    in_order = [name for name, _, _ in items_of(open_source(images))[1]]
    if kind == "folder":
        return images, {}
    if kind == "tar":
        return pack_folder(folder / "images.tar", images), {}
    if kind == "imagenet-tar":
        inner = []
        for name in reversed(CLASSES):
            pack_folder(folder / f"{name}.tar", images / name)
            inner.append((f"{name}.tar", (folder / f"{name}.tar").read_bytes()))
        return pack(folder / "train.tar", inner), {"kind": kind}  # neither synsets nor flat: must be said
    if kind == "webdataset":
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        for shard, names in enumerate((in_order[:7], in_order[7:])):
            members = []
            for name in names:
                key = name.rpartition(".")[0]
                members += [(name, data_of(images, name)), (f"{key}.cls", b"%d" % label_of(name))]
            pack(folder / f"shard-{shard:03}.tar", members)
        return folder, {}
    if kind == "parquet":
        rows = [(name, data_of(images, name), label_of(name)) for name in in_order]
        write_parquet(folder / "train-00000-of-00002.parquet", rows[:7], names=CLASSES, row_group_size=3)
        write_parquet(folder / "train-00001-of-00002.parquet", rows[7:], names=CLASSES)
        return folder, {}
    if kind == "manifest":
        lines = "".join(f"{images.name}/{name},{name.partition('/')[0]}\n" for name in in_order)
        manifest = images.parent / "images.csv"
        manifest.write_text("path,label\n" + lines)
        return manifest, {}
    assert kind == "flat"
    labels = folder / "labels.txt"
    labels.write_text("".join(f"{name} {name.partition('/')[0]}\n" for name in in_order))
    return images, {"val_labels": labels}


CLASS_FOLDER_KINDS = ["folder", "tar", "imagenet-tar", "webdataset", "parquet", "flat"]
"""Kinds that can give the very names of class folders."""


@pytest.mark.parametrize("kind", CLASS_FOLDER_KINDS)
def test_every_kind_gives_the_records_of_class_folders(kind, images, expected, tmp_path):
    path, options = packed(kind, images, tmp_path / "packed")
    source = open_source(path, **options)
    assert source.kind == kind
    assert source.count() == len(expected[1]) == 16
    assert items_of(source) == expected
    assert items_of(open_source(path, **{**options, "kind": kind})) == expected


@pytest.mark.parametrize("kind", CLASS_FOLDER_KINDS)
def test_every_kind_converts_to_the_same_store(kind, images, expected, tmp_path):
    path, options = packed(kind, images, tmp_path / "packed")
    convert(open_source(path, **options), tmp_path / "images.lmdb")
    assert records_of(tmp_path / "images.lmdb") == expected


def test_a_manifest_gives_labels_and_bytes_of_class_folders_in_its_own_order(images, expected, tmp_path):
    path, _ = packed("manifest", images, tmp_path / "packed")
    source = open_source(path)
    assert source.kind == "manifest"
    classes, rows = items_of(source)
    assert classes == expected[0]
    assert [row[1:] for row in rows] == [row[1:] for row in expected[1]]
    assert rows[0][0] == "ant/images/ant/000.jpg"


@pytest.mark.parametrize("kind", [*CLASS_FOLDER_KINDS, "manifest"])
def test_reading_in_any_order_from_threads_gives_each_record_its_own_bytes(kind, images, expected, tmp_path):
    path, options = packed(kind, images, tmp_path / "packed")
    items = list(enumerate(open_source(path, **options).items()))
    random.Random(0).shuffle(items)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda item: (item[0], item[1].read()), items))
    assert [data for _, data in sorted(read)] == [row[2] for row in expected[1]]


def open_in_little_memory(path, **options):
    """A source that writes most of its lists to temporary files, as it does for millions of images."""
    source = open_source(path, **options)
    source.kept_bytes = 50
    return source


@pytest.mark.parametrize("kind", [*CLASS_FOLDER_KINDS, "manifest"])
def test_a_source_too_large_for_memory_has_the_same_records(kind, images, tmp_path):
    path, options = packed(kind, images, tmp_path / "packed")
    source = open_in_little_memory(path, **options)
    assert source.kind == kind
    found, identity = items_of(source), source.identity()
    with ThreadPoolExecutor(4) as pool:
        items = list(source.items())
        assert list(pool.map(lambda item: item.read(), items)) == [row[2] for row in found[1]]
    source = open_source(path, **options)
    assert found == items_of(source)
    assert identity == source.identity()


@pytest.mark.parametrize("kind", ["tar", "imagenet-tar", "webdataset", "parquet", "manifest", "flat"])
def test_a_source_too_large_for_memory_needs_a_temporary_folder(kind, images, tmp_path, monkeypatch):
    path, options = packed(kind, images, tmp_path / "packed")
    source = open_in_little_memory(path, **options)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    with pytest.raises(SourceError, match="set TMPDIR to a folder on another disk") as caught:
        items_of(source)
    assert str(caught.value).startswith(f"{tmp_path / 'nothing'}: the list of images, 0 bytes so far")


def interrupted(source, target):
    """Convert until the first commit."""

    class StopHereError(Exception):
        pass

    def stop(_):
        raise StopHereError

    with pytest.raises(StopHereError):
        convert(source, target, progress=stop, commit_records=5)
    assert not target.exists()


@pytest.mark.parametrize("kind", [*CLASS_FOLDER_KINDS, "manifest"])
def test_an_interrupted_conversion_goes_on(kind, images, expected, tmp_path):
    path, options = packed(kind, images, tmp_path / "packed")
    interrupted(open_source(path, **options), tmp_path / "images.lmdb")
    convert(open_source(path, **options), tmp_path / "images.lmdb")
    assert [row[1:] for row in records_of(tmp_path / "images.lmdb")[1]] == [row[1:] for row in expected[1]]


@pytest.mark.parametrize("kind", ["tar", "imagenet-tar", "webdataset", "parquet", "manifest", "flat"])
def test_a_file_that_changed_since_a_conversion_was_interrupted_is_refused(kind, images, tmp_path):
    path, options = packed(kind, images, tmp_path / "packed")
    interrupted(open_source(path, **options), tmp_path / "images.lmdb")
    changed = options.get("val_labels") or (path if path.is_file() else sorted(path.glob("*-*"))[0])
    os.utime(changed, ns=(1, 1))
    with pytest.raises(ConversionError, match="--restart"):
        convert(open_source(path, **options), tmp_path / "images.lmdb")
    convert(open_source(path, **options), tmp_path / "images.lmdb", restart=True)


@pytest.mark.parametrize("kind", [*CLASS_FOLDER_KINDS, "manifest"])
def test_listing_a_source_writes_nothing_to_the_disk(kind, images, tmp_path, monkeypatch):
    path, options = packed(kind, images, tmp_path / "packed")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    items_of(open_source(path, **options))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_kind_is_a_wrong_argument(images):
    with pytest.raises(ValueError, match="kind is 'zip', expected one of folder, webdataset"):
        open_source(images, kind="zip")


def test_validation_labels_with_another_kind_are_a_wrong_argument(images):
    with pytest.raises(ValueError, match="val_labels with kind 'tar'"):
        open_source(images, kind="tar", val_labels="labels.txt")


def test_every_kind_is_a_name_that_can_be_forced():
    assert {*CLASS_FOLDER_KINDS, "manifest", "classic", "store"} == set(KINDS)


def test_a_store_is_a_source(store_path):
    source = open_source(store_path)
    assert source.kind == "store"
    assert items_of(source) == records_of(store_path)
    assert open_source(store_path, kind="store").count() == source.count()


def test_a_classic_database_is_a_source(test_data):
    databases = sorted((test_data / "classic-lmdb").glob("*"))
    path = next(path for path in databases if "TRUTH" not in path.name and "README" not in path.name)
    assert open_source(path).kind == "classic"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder; expected a folder of class folders"),
        (lambda path: path.write_text("hello"), "not a source of images"),
        (lambda path: path.write_bytes(b""), "not a source of images"),
        (lambda path: path.mkdir(), "no class folders"),
    ],
    ids=["nothing", "text", "empty file", "empty folder"],
)
def test_what_is_no_source_is_refused_in_one_line(make, message, tmp_path):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(SourceError, match=message) as caught:
        open_source(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_images_without_class_folders_ask_for_their_labels(tmp_path):
    save_grey(tmp_path / "a.jpg", 1)
    with pytest.raises(SourceError, match="--val-labels"):
        open_source(tmp_path)
    with pytest.raises(SourceError, match="--val-labels"):
        open_source(tmp_path, kind="flat")
    flat = pack(tmp_path / "flat.tar", [("a.jpg", b"x")])
    with pytest.raises(SourceError, match="--val-labels"):
        items_of(open_source(flat))


def test_a_folder_of_files_of_two_splits_is_refused(images, tmp_path):
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", [("a.jpg", b"x", 0)])
    with pytest.raises(SourceError, match=r"several splits \(train, validation\)"):
        open_source(tmp_path)
    assert open_source(tmp_path / "train-*.parquet").count() == 1


@pytest.mark.parametrize("change", ["vanished", "appeared"])
def test_an_image_that_vanishes_or_appears_after_the_folder_was_counted_is_named(change, tmp_path):
    root = make_image_folder(tmp_path / "images", num_records=6)
    source = open_source(root)
    assert source.count() == 6
    if change == "vanished":
        (root / "bee" / "003.jpg").unlink()
    else:
        save_grey(root / "bee" / "003.jpg.jpg", 7)
    with pytest.raises(SourceError, match=rf"bee: bee/003[.jpg]+ {change} since the images were counted"):
        list(source.items())


def test_a_folder_is_listed_once_and_again_only_where_it_changed_since(tmp_path, monkeypatch):
    root = make_image_folder(tmp_path / "images", num_records=6)
    (root / "bee" / "deep").mkdir()
    save_grey(root / "bee" / "deep" / "006.jpg", 6)
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1e9, 1e9))
    listed, original = [], files.list_folder
    monkeypatch.setattr(files, "list_folder", lambda path: (listed.append(path), original(path))[1])
    source = open_source(root, kind="folder")
    assert source.count() == 7
    first = [item.name for item in source.items()]
    assert sorted(listed) == [str(root / name) for name in ("ant", "bee", "bee/deep", "cat")]
    listed.clear()
    (root / "bee" / "deep" / "notes.txt").touch()
    assert [item.name for item in source.items()] == first
    assert sorted(listed) == [str(root / name) for name in ("bee", "bee/deep")]


def test_a_folder_that_changed_just_before_it_was_listed_is_listed_again(tmp_path):
    root = make_image_folder(tmp_path / "images", num_records=6)
    source = open_source(root)
    assert source.count() == 6
    time = os.stat(root / "bee").st_mtime_ns
    save_grey(root / "bee" / "006.jpg", 6)
    os.utime(root / "bee", ns=(time, time))  # as where times of files are coarse
    with pytest.raises(SourceError, match="appeared since"):
        list(source.items())


@pytest.mark.parametrize("kind", [None, "folder", "tar", "parquet", "webdataset", "manifest"])
@pytest.mark.parametrize("name", ["x" * 250, "x" * 300, "file/x"], ids=["long", "too long", "below a file"])
def test_a_path_that_cannot_be_is_refused(kind, name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SourceError):
        open_source(tmp_path / name, kind=kind)


# Links in folders.


def link_out(tmp_path, *, what):
    root = make_image_folder(tmp_path / "images", num_records=3)
    outside = make_image_folder(tmp_path / "outside", num_records=3, classes=("dog",))
    link = root / ("ant/link.jpg" if what == "file" else "bee/link" if what == "folder" else "dog")
    link.symlink_to({"file": outside / "dog" / "000.jpg"}.get(what, outside / "dog"))
    return root, link


@pytest.mark.parametrize("what", ["file", "folder", "class"])
def test_a_link_out_of_the_folder_is_refused_unless_allowed(what, tmp_path):
    root, link = link_out(tmp_path, what=what)
    with pytest.raises(SourceError, match=r"leads out of .*--follow-links") as caught:
        items_of(open_source(root))
    assert str(caught.value).startswith(str(link))
    assert open_source(root, follow_links=True).count() == (4 if what == "file" else 6)


def test_links_inside_the_folder_and_a_link_to_it_are_followed(tmp_path):
    root = make_image_folder(tmp_path / "images", num_records=3)
    (root / "ant" / "again.jpg").symlink_to("../bee/001.jpg")
    (root / "dog").symlink_to("cat")
    (tmp_path / "link").symlink_to(root)
    names = [name for name, _, _ in items_of(open_source(tmp_path / "link"))[1]]
    assert names == ["ant/000.jpg", "ant/again.jpg", "bee/001.jpg", "cat/002.jpg", "dog/002.jpg"]


def test_an_endless_link_is_refused(tmp_path):
    root = make_image_folder(tmp_path / "images", num_records=3)
    (root / "ant" / "up").symlink_to("..")
    with pytest.raises(SourceError, match="endless loop"):
        items_of(open_source(root))


@pytest.mark.parametrize("name", ["ant/x.jpg", "ant/x.txt", "ant/x", "x", "x.tar", ".x"])
def test_a_link_to_itself_among_images_is_refused_or_left_out(tmp_path, name):
    folder = make_image_folder(tmp_path / "images", num_records=9)
    link = folder / name
    link.symlink_to(link.name)
    if name == "ant/x.jpg":
        with pytest.raises(SourceError, match="a dangling link"):
            open_source(folder).count()
        return
    assert open_source(folder).count() == 9


@pytest.mark.parametrize("kind", [None, "folder", "tar", "parquet", "webdataset", "manifest", "store", "classic"])
def test_a_source_that_is_a_link_to_itself_is_refused(tmp_path, kind):
    (tmp_path / "x").symlink_to("x")
    with pytest.raises((SourceError, StoreError)):
        open_source(tmp_path / "x", kind=kind)


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("nothing"), os.mkfifo], ids=["broken link", "pipe"])
def test_an_image_name_that_is_no_file_is_refused_and_never_waited_for(make, tmp_path):
    root = make_image_folder(tmp_path / "images", num_records=3)
    make(root / "ant" / "x.jpg")
    with pytest.raises(SourceError, match=r"x\.jpg: (a dangling link|not a regular file)"):
        items_of(open_source(root))


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path):
    root = make_image_folder(tmp_path / "images", num_records=3)
    items = list(open_source(root).items())
    (root / "ant" / "000.jpg").unlink()
    os.mkfifo(root / "ant" / "000.jpg")
    with pytest.raises(SourceError, match="not a regular file"):
        items[0].read()


def test_the_order_of_a_folder_is_that_of_torchvision(images):
    folder = pytest.importorskip("torchvision.datasets").ImageFolder(str(images))
    names = [name for name, _, _ in items_of(open_source(images))[1]]
    assert names == [Path(path).relative_to(images).as_posix() for path, _ in folder.samples]
    assert len(names) == len(image_paths(images))


def test_a_name_that_is_not_utf_8_is_kept_readable(tmp_path):
    root = make_image_folder(tmp_path / "images", num_records=3)
    os.rename(root / "ant" / "000.jpg", os.fsencode(root / "ant") + b"/caf\xe9.jpg")
    convert(root, tmp_path / "folder.lmdb")
    names = [name for name, _, _ in records_of(tmp_path / "folder.lmdb")[1]]
    assert names[0] == r"ant/caf\xe9.jpg"


def test_an_image_that_no_record_can_hold_is_refused_before_memory_is_asked_for(images):
    with open(images / "ant" / "huge.jpg", "wb") as file:
        file.truncate(1 << 40)  # a hole: takes no room on the disk
    (item,) = [item for item in FolderSource(images).items() if item.name == "ant/huge.jpg"]
    with pytest.raises(SourceError, match=r"huge\.jpg: 1,099,511,627,776 bytes, a record holds 4,294,967,295 at"):
        item.read()
