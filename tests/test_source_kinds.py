"""What kind of source a path is: detected where it can only be one, refused where it could be another."""

import tarfile

import pytest
from click.testing import CliRunner
from image_sets import make_image_folder, save_grey
from packing import items_of, pack, pack_folder, write_parquet

from dali_lmdb.convert import convert
from dali_lmdb.convert.__main__ import main
from dali_lmdb.convert.sources import open_source
from dali_lmdb.errors import SourceError, StoreFormatError

SYNSETS = ["n01440764", "n01443537", "n01484850"]


@pytest.fixture
def image(tmp_path):
    """The bytes of an image."""
    save_grey(tmp_path / "image.jpg", 3)
    return (tmp_path / "image.jpg").read_bytes()


@pytest.fixture
def folder(tmp_path):
    """An empty folder."""
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def refused(path, *parts, **options):
    """The message of one line, with all of these parts, with which a source is refused."""
    with pytest.raises(SourceError) as caught:
        open_source(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def records_with(extension, data, number=4):
    return [(f"{i}{end}", value) for i in range(number) for end, value in ((".jpg", b"x"), (extension, data))]


def labels_of(path, **options):
    return [label for _, label, _ in items_of(open_source(path, **options))[1]]


# Folders of tars.


@pytest.mark.parametrize("extension", [".cls", ".CLS", ".Cls"])
def test_labels_are_found_in_capitals_too(extension, folder):
    for number in range(2):
        pack(folder / f"{number}.tar", records_with(extension, b"2"))
    source = open_source(folder)
    assert source.kind == "webdataset"
    assert [item.label for item in source.items()] == [2] * 8
    assert open_source(folder / "0.tar").kind == "webdataset"


def test_labels_are_found_after_all_images(folder):
    images = [(f"{i:04}.jpg", b"x") for i in range(1100)]
    pack(folder / "0.tar", [*images, *((f"{i:04}.cls", b"%d" % (i % 3)) for i in range(1100))])
    for path in (folder, folder / "0.tar"):
        assert labels_of(path) == [i % 3 for i in range(1100)]


@pytest.mark.parametrize("extension", [".json", ".txt", ".JSON", ".seg.json"])
def test_shards_without_labels_are_not_one_class_each(extension, folder):
    for number in range(2):
        pack(folder / f"{number}.tar", records_with(extension, b"{}"))
    refused(folder, f"0.tar: 0.jpg and 0{extension} make a WebDataset record without a .cls", "a class: 0, 1")
    assert open_source(folder, kind="imagenet-tar").classes == ["0", "1"]


@pytest.mark.parametrize("at", ["start", "end"])
def test_a_class_tar_with_another_file_is_refused_wherever_that_stands(at, folder):
    images = [(f"{i}.JPEG", b"x") for i in range(5)]
    other = [("labels.txt", b"no image")]
    pack(folder / "n01440764.tar", images)
    pack(folder / "n01443537.tar", other + images if at == "start" else images + other)
    refused(folder, "n01443537.tar holds labels.txt, expected only images", "--source imagenet-tar")


def test_hidden_files_in_class_tars_say_nothing(folder):
    pack(folder / "n01440764.tar", [("a.JPEG", b"x"), (".DS_Store", b"")])
    assert open_source(folder).classes == ["n01440764"]


def test_tars_of_class_folders_are_not_one_class_each(folder, tmp_path):
    images = make_image_folder(tmp_path / "images", num_records=6)
    for number in range(2):
        pack_folder(folder / f"part{number}.tar", images)
    refused(folder, "part0.tar holds folders (ant, bee, cat)", "tar -A", "a class: part0, part1")
    (folder / "part1.tar").unlink()
    refused(folder, "part0.tar holds folders (ant, bee, cat)", "convert it by itself")


def test_every_tar_of_a_folder_is_inspected(folder):
    for name in SYNSETS[:2]:
        pack(folder / f"{name}.tar", [("a.JPEG", b"x")])
    pack(folder / f"{SYNSETS[2]}.tar", [("a.JPEG", b"x"), ("cat/b.JPEG", b"x")])
    refused(folder, f"{SYNSETS[2]}.tar holds folders (cat)")


def test_a_shard_without_labels_among_others_is_named(folder):
    pack(folder / "a.tar", [("0.jpg", b"x")])
    pack(folder / "b.tar", records_with(".cls", b"1"))
    refused(folder, "with .cls labels (b.tar) beside tars without (a.tar)")


def test_flat_tars_of_images_must_be_said_to_be_classes(folder):
    for number in range(7):
        pack(folder / f"train_images_{number}.tar", [(f"n01440764_{number}.JPEG", b"x")])
    refused(
        folder,
        "7 tars of images without .cls labels",
        "give --source imagenet-tar to make each tar a class: train_images_0, train_images_1, ",
        ", ... (7)",
    )
    assert len(open_source(folder, kind="imagenet-tar").classes) == 7


def test_flat_tars_named_as_synsets_are_classes_and_the_command_prints_them(folder, tmp_path, image):
    for name in SYNSETS:
        pack(folder / f"{name}.tar", [("0.JPEG", image)])
    assert labels_of(folder) == [0, 1, 2]
    result = CliRunner().invoke(main, [str(folder), str(tmp_path / "x.lmdb")])
    assert result.exit_code == 0
    assert f"classes: {', '.join(SYNSETS)}\n" in result.stderr


def test_a_tar_whose_name_only_begins_as_a_synset_is_no_class(folder):
    for name in ("n01440764", "n01440764_1"):
        pack(folder / f"{name}.tar", [("0.JPEG", b"x")])
    refused(folder, "a class: n01440764, n01440764_1")


def test_tars_in_capitals_are_taken_too(folder):
    pack(folder / "0.tar", records_with(".cls", b"0"))
    pack(folder / "1.TAR", records_with(".cls", b"1"))
    assert labels_of(folder) == [0] * 4 + [1] * 4


def test_two_tars_of_one_class_are_refused(folder):
    for name in ("n01440764.tar", "n01440764.TAR"):
        pack(folder / name, [("0.JPEG", b"x")])
    with pytest.raises(SourceError, match=r"n01440764\.tar: a second tar of class 'n01440764'"):
        items_of(open_source(folder))


def test_compressed_tars_beside_others_are_not_passed_over(folder):
    pack(folder / "n01440764.tar", [("0.JPEG", b"x")])
    (folder / "n01443537.tar.gz").write_bytes(b"\x1f\x8b")
    refused(folder, "compressed tar (n01443537.tar.gz)", "--source (webdataset, imagenet-tar)")
    (folder / "n01440764.tar").unlink()
    refused(folder, "n01443537.tar.gz", "decompress")


# One tar.


def nested(path, inner):
    """A tar of tars: {name: members}."""
    members = []
    for name, contents in inner.items():
        pack(path.with_suffix(".inner"), contents)
        members.append((name, path.with_suffix(".inner").read_bytes()))
    return pack(path, members)


def test_a_tar_of_tars_of_synsets_is_detected(tmp_path):
    path = nested(tmp_path / "x.tar", {f"{name}.tar": [("0.JPEG", b"x")] for name in SYNSETS})
    assert open_source(path).kind == "imagenet-tar"
    assert open_source(path).classes == SYNSETS


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"0.tar": records_with(".cls", b"0")}, ": 0.tar has .cls labels"),
        (
            {"n01440764.tar": records_with(".json", b"")},
            "n01440764.tar: 0.jpg and 0.json make a WebDataset record",
        ),
        ({"n01440764.tar": [("ant/0.jpg", b"x"), ("bee/1.jpg", b"x")]}, "n01440764.tar holds folders (ant, bee)"),
        ({"n01440764.tar": [("0.jpg", b"x"), ("list.csv", b"")]}, "n01440764.tar holds list.csv"),
        ({"n01440764.tar": [("0.jpg", b"x"), ("b.tar", b"")]}, "n01440764.tar holds tars (b.tar)"),
        ({"n01440764.tar": [("0.jpg", b"x")], "b.tar": [("1.jpg", b"x")]}, "make each tar a class: b, n01440764"),
    ],
)
def test_a_tar_of_tars_that_are_perhaps_no_classes_is_refused(inner, message, tmp_path):
    refused(nested(tmp_path / "x.tar", inner), message)


@pytest.mark.parametrize("beside", [("0.jpg", b"x"), ("ant/0.jpg", b"x"), ("n01443537.tar.gz", b"x")])
def test_a_tar_of_tars_and_something_else_is_refused(beside, tmp_path):
    inner = pack(tmp_path / "inner.tar", [("a.JPEG", b"x")]).read_bytes()
    path = pack(tmp_path / "x.tar", [("n01440764.tar", inner), beside])
    refused(path, "beside tars (n01440764.tar)", "--source (tar, imagenet-tar)")


def test_a_tar_of_records_without_labels_is_not_one_of_class_folders(tmp_path):
    members = [(f"{i % 2}/{i}{end}", b"x") for i in range(4) for end in (".jpg", ".json")]
    path = pack(tmp_path / "x.tar", members)
    refused(
        path, "0/0.jpg and 0/0.json make a WebDataset record", "--source tar to make each folder a class: 0, 1"
    )
    assert open_source(path, kind="tar").classes == ["0", "1"]
    flat = pack(tmp_path / "flat.tar", records_with(".json", b"{}"))
    refused(flat, "0.jpg and 0.json make a WebDataset record", "--val-labels FILE")


def test_images_beside_the_class_folders_of_a_tar_are_reported_as_those_of_a_folder_are(tmp_path):
    images = make_image_folder(tmp_path / "images", num_records=6)
    save_grey(images / "stray.jpg", 7)
    sources = [open_source(images), open_source(pack_folder(tmp_path / "x.tar", images))]
    assert items_of(sources[1]) == items_of(sources[0])
    assert list(sources[1].left_out()) == list(sources[0].left_out()) == [("stray.jpg", "in no class folder")]


# Folders that are perhaps no classes, in a folder and in a tar.


@pytest.fixture(params=["folder", "tar"])
def put(request, tmp_path):
    """Makes a source, one of the two kinds, of images of these names."""

    def make(*names):
        root = tmp_path / "root"
        for record, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            save_grey(root / name, record)
        return (root if request.param == "folder" else pack_folder(tmp_path / "root.tar", root)), request.param

    return make


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/ant/0.jpg", "train/bee/1.jpg", "val/ant/2.jpg"], "folder train holds folders (ant, bee)"),
        (["a/0.jpg", "extra/ant/1.jpg", "extra/bee/2.jpg"], "folder extra holds folders (ant, bee)"),
        (["train/0.jpg", "Test/1.jpg"], "folders of several splits (Test, train)"),
        (["val/0.jpg", "val/1.jpg"], "one folder, val, expected a folder for each class"),
        (["images/0.jpg", "images/1.jpg"], "one folder, images, expected a folder for each class"),
        (["thumbs/0.jpg", "0.jpg", "1.jpg"], "one folder, thumbs, beside "),
    ],
    ids=["splits of classes", "a deeper one", "flat splits", "one split", "all in one", "flat with thumbnails"],
)
def test_folders_that_are_perhaps_no_classes_are_refused(names, message, put):
    path, kind = put(*names)
    classes = sorted({name.partition("/")[0] for name in names if "/" in name})
    refused(path, message, f"--source {kind} to make each folder a class: {', '.join(classes)}")
    assert open_source(path, kind=kind).classes == classes


@pytest.mark.parametrize(
    "names",
    [
        ["ant/0.jpg", "ant/more/1.jpg", "ant/others/2.jpg", "bee/3.jpg"],
        ["n1/images/0.jpg", "n2/images/1.jpg"],  # Tiny ImageNet
        ["train/0.jpg", "plane/1.jpg"],
        ["ant/0.jpg"],
    ],
    ids=["folders beside images", "one folder in each", "a vehicle", "one class"],
)
def test_folders_of_images_are_classes(names, put):
    path, kind = put(*names)
    source = open_source(path)
    assert source.kind == kind
    assert source.classes == sorted({name.partition("/")[0] for name in names})
    assert source.count() == len(names)


def test_one_folder_beside_a_table_is_no_class(folder):
    (folder / "photos").mkdir()
    save_grey(folder / "photos" / "0.jpg", 0)
    (folder / "x.lmdb.bad.tsv").write_text("name\treason\n")  # of an earlier conversion
    assert open_source(folder).classes == ["photos"]
    (folder / "labels.csv").write_text("path,label\nphotos/0.jpg,cat\n")
    refused(folder, "one folder, photos, beside labels.csv", "--source folder")


# Folders of several kinds of data.


def put_classes(folder, image):
    make_image_folder(folder / "images", num_records=3)
    for path in (folder / "images").iterdir():
        path.rename(folder / path.name)
    (folder / "images").rmdir()


MAKERS = {
    "folder": put_classes,
    "image": lambda folder, image: (folder / "photo.jpg").write_bytes(image),
    "tar": lambda folder, image: pack(folder / "s.tar", [("0.jpg", image), ("0.cls", b"0")]),
    "parquet": lambda folder, image: write_parquet(folder / "s.parquet", [("a.jpg", image, 0)]),
    "lmdb": lambda folder, image: convert(made(folder.parent / "made", image), folder / "s.lmdb", shards=2),
}


def made(folder, image):
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "0.jpg").write_bytes(image)
    (folder / "cat" / "1.jpg").write_bytes(image)
    return folder


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("folder", "tar"),
        ("folder", "parquet"),
        ("folder", "lmdb"),
        ("image", "tar"),
        ("image", "parquet"),
        ("image", "lmdb"),
        ("tar", "parquet"),
        ("tar", "lmdb"),
        ("parquet", "lmdb"),
    ],
)
def test_a_folder_of_data_of_two_kinds_is_refused(first, second, folder, image):
    for kind in (first, second):
        MAKERS[kind](folder, image)
    message = refused(folder, f"{first} (", f"{second} (", "side by side, expected data of one kind", "--source (")
    for kind, option in {"folder": "folder", "tar": "webdataset", "parquet": "parquet", "lmdb": "store"}.items():
        assert (option in message.partition("--source")[2]) == (kind in (first, second))
        if kind in (first, second):
            assert open_source(folder, kind=option).kind == option


def test_a_folder_of_several_databases_is_refused(folder, image, tmp_path):
    MAKERS["lmdb"](folder, image)
    assert open_source(folder).kind == "store"
    convert(tmp_path / "made", folder / "other.lmdb")
    with pytest.raises(
        StoreFormatError, match=r"s-00000-of-00002.lmdb and other.lmdb, expected the shards of one set"
    ):
        open_source(folder)


def test_folders_that_hold_databases_are_no_class_folders(folder):
    for name in ("train.lmdb", "val.lmdb"):
        (folder / name).mkdir()
        (folder / name / "data.mdb").touch()
    refused(folder, "LMDB databases (train.lmdb, val.lmdb)", "name one")


def test_a_manifest_with_two_columns_of_one_name_is_refused(tmp_path):
    (tmp_path / "m.csv").write_text("path,label,label\nimage.jpg,cat,dog\n")
    refused(tmp_path / "m.csv", "'path,label,label'", "path and label", "once each", kind="manifest")


def test_names_with_control_characters_stay_in_the_line_of_a_message(folder):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name in ("new\nline/0.jpg", "bee/1.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    refused(folder, r"folders (bee, 'new\nline')")
