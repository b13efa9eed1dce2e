"""What a pattern matches is what is opened, for every kind of source."""

import shutil

import pytest
from classic_databases import make_classic
from image_sets import make_image_folder
from packing import items_of, pack, pack_folder, write_parquet

from dali_lmdb.convert import convert
from dali_lmdb.convert.sources import KINDS, open_source
from dali_lmdb.errors import SourceError

RECORD = [("a.jpg", b"x"), ("a.cls", b"0")]


@pytest.fixture
def images(tmp_path):
    return make_image_folder(tmp_path / "images", num_records=6)


def class_tar(path):
    return pack(path, [("0.JPEG", b"x")])


def put_imagenet_tar(path, images):
    pack(path, [("n01440764.tar", class_tar(images.parent / "inner").read_bytes())])


def put_class_tars(path, images):
    path.mkdir()
    class_tar(path / "n01440764.tar")


def put_shards(path, images):
    path.mkdir()
    pack(path / "0.tar", RECORD)


def put_classic(path, images):
    make_classic(path, [((images / "ant" / "000.jpg").read_bytes(), 0)], subdir=path.suffix == "")


SOURCES = {
    "folder": ("folder", "x", lambda path, images: shutil.copytree(images, path)),
    "flat folder": ("flat", "x", lambda path, images: shutil.copytree(images, path)),
    "flat tar": ("flat", "x.tar", lambda path, images: pack_folder(path, images)),
    "tar": ("tar", "x.tar", lambda path, images: pack_folder(path, images)),
    "tar of tars": ("imagenet-tar", "x.tar", put_imagenet_tar),
    "folder of class tars": ("imagenet-tar", "x", put_class_tars),
    "shard": ("webdataset", "x.tar", lambda path, images: pack(path, RECORD)),
    "folder of shards": ("webdataset", "x", put_shards),
    "parquet": ("parquet", "x.parquet", lambda path, images: write_parquet(path, [("a.jpg", b"x", 0)])),
    "manifest": ("manifest", "x.csv", lambda path, images: path.write_text("path,label\na.jpg,ant\n")),
    "store": ("store", "x.lmdb", lambda path, images: convert(images, path)),
    "classic": ("classic", "x.lmdb", put_classic),
    "classic in a folder": ("classic", "x", put_classic),
}


KINDS_OF_ONE = {"folder", "flat", "tar", "manifest", "classic", "store"}


def options_of(source, images):
    """Arguments without which it cannot be opened."""
    if not source.startswith("flat"):
        return {}
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.jpg"))
    labels = images.parent / "labels.txt"
    labels.write_text("".join(f"{name} {name.partition('/')[0]}\n" for name in names))
    return {"val_labels": labels}


def rows_of(source):
    return source.kind, source.classes, [(item.name, item.label) for item in source.items()]


def test_every_kind_of_source_is_tried():
    assert {kind for kind, _, _ in SOURCES.values()} == set(KINDS)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("start", ["?", "[x]", "{x,y}", "*"])
@pytest.mark.parametrize("is_given", [False, True], ids=["detected", "given"])
def test_the_one_match_of_a_pattern_is_opened(source, start, is_given, tmp_path, images):
    kind, name, put = SOURCES[source]
    (tmp_path / "place").mkdir()
    put(tmp_path / "place" / name, images)
    options = {**options_of(source, images), **({"kind": kind} if is_given else {})}
    if start == "{x,y}":
        start = "{x,x}"  # braces name only files that are there
    found = rows_of(open_source(tmp_path / "place" / (start + name[1:]), **options))
    assert found == rows_of(open_source(tmp_path / "place" / name, **options))
    assert found[0] == kind


@pytest.mark.parametrize("source", SOURCES)
def test_a_name_that_exists_is_no_pattern(source, tmp_path, images):
    kind, name, put = SOURCES[source]
    place = tmp_path / "[2024] {a,b}"
    place.mkdir()
    put(place / f"x[1]{name[1:]}", images)
    (place / f"x1{name[1:]}").write_text("what the name would match as a pattern")
    options = options_of(source, images)
    for path in (place / f"x[1]{name[1:]}", place / f"x?1]{name[1:]}"):  # a name, and a pattern beside it
        assert rows_of(open_source(path, **options))[0] == kind
        assert open_source(path, kind=kind, **options).kind == kind


def test_a_set_of_shards_whose_name_is_like_a_pattern_is_opened_by_its_name(tmp_path, images):
    convert(images, tmp_path / "x[1].lmdb", shards=2)
    convert(images, tmp_path / "x1.lmdb", shards=3)
    (tmp_path / "x1.lmdb").write_text("what the name would match as a pattern")
    for kind in (None, "store"):
        source = open_source(tmp_path / "x[1].lmdb", kind=kind)
        assert items_of(source) == items_of(open_source(images))


def test_the_only_shard_of_a_set_is_opened_by_a_pattern(tmp_path, images):
    convert(images, tmp_path / "x.lmdb", shards=1)
    for kind in (None, "store"):
        assert open_source(tmp_path / "x-*.lmdb", kind=kind).count() == 6


def test_several_matches_are_opened_where_a_source_may_have_several(tmp_path, images):
    for number in range(2):
        pack(tmp_path / f"s{number}.tar", [(f"{number}.jpg", b"x"), (f"{number}.cls", b"0")])
        write_parquet(tmp_path / f"s{number}.parquet", [("a.jpg", b"x", 0)])
        class_tar(tmp_path / f"n0000000{number}.tar")
    convert(images, tmp_path / "s.lmdb", shards=2)
    for pattern, kind, count in [
        ("s*.tar", "webdataset", 2),
        ("s{0,1}.parquet", "parquet", 2),
        ("n*.tar", "imagenet-tar", 2),
        ("s-*.lmdb", "store", 6),
    ]:
        for given in (None, kind):
            source = open_source(tmp_path / pattern, kind=given)
            assert (source.kind, source.count()) == (kind, count)


@pytest.mark.parametrize("source", [name for name, (kind, *_) in SOURCES.items() if kind in KINDS_OF_ONE])
def test_several_matches_are_refused_where_a_source_is_one(source, tmp_path, images):
    kind, name, put = SOURCES[source]
    (tmp_path / "place").mkdir()
    for number in range(6):
        put(tmp_path / "place" / f"x{number}{name[1:]}", images)
    pattern = tmp_path / "place" / f"x?{name[1:]}"
    options = options_of(source, images)
    for given in (kind, None):
        with pytest.raises(SourceError) as caught:
            open_source(pattern, kind=given, **options)
        message = str(caught.value)
        assert message.startswith(f"{pattern}: ")
        assert "\n" not in message
        if given is not None:
            assert f"6 files ({tmp_path}/place/x0{name[1:]}, " in message
            assert "... (6)), expected one" in message


def test_matches_of_different_kinds_are_refused(tmp_path, images):
    pack(tmp_path / "a.tar", RECORD)
    write_parquet(tmp_path / "b.parquet", [("a.jpg", b"x", 0)])
    pattern = tmp_path / "[ab].*"
    with pytest.raises(
        SourceError, match=r"files of different kinds, tar \(.*a\.tar\) and parquet \(.*b\.parquet\)"
    ):
        open_source(pattern)


def test_several_tars_of_class_folders_are_refused(tmp_path, images):
    for name in ("a.tar", "b.tar"):
        pack_folder(tmp_path / name, images)
    with pytest.raises(SourceError, match=r"a\.tar holds folders \(ant, bee, cat\).*tar -A"):
        open_source(tmp_path / "?.tar")


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"no \.tar file there; check"):
        open_source(tmp_path / "c*.tar")
    with pytest.raises(SourceError, match=r"no such file there; check"):
        open_source(tmp_path / "c*", kind="folder")
