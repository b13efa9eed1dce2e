"""Sources whose labels stand in a text file: a flat folder or tar, and manifests."""

import pytest
from image_sets import save_grey
from packing import items_of, pack

from dali_lmdb.convert.sources import open_source
from dali_lmdb.errors import SourceError


@pytest.fixture
def flat(tmp_path):
    """Four images in one folder."""
    folder = tmp_path / "val"
    folder.mkdir()
    for record in range(4):
        save_grey(folder / f"v_{record}.jpg", record)
    return folder


def write(path, text):
    path.write_text(text)
    return path


def rows_of(source):
    return [(item.name, item.label) for item in source.items()]


def refused(match, path, **options):
    with pytest.raises(SourceError, match=match) as caught:
        items_of(open_source(path, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


SORTED_INTO_CLASSES = [("ant/v_1.jpg", 0), ("ant/v_3.jpg", 0), ("cat/v_0.jpg", 1), ("cat/v_2.jpg", 1)]


@pytest.mark.parametrize(
    "labels",
    [
        "cat\nant\ncat\nant\n",
        "cat\r\nant\r\n\r\ncat\r\nant",
        "\ufeffv_3.jpg ant\nv_0.jpg cat\n./v_1.jpg   ant\nv_2.jpg\tcat\n",
    ],
    ids=["list", "windows list", "path label"],
)
def test_a_flat_folder_is_sorted_into_its_classes(labels, flat, tmp_path):
    source = open_source(flat, val_labels=write(tmp_path / "labels.txt", labels))
    assert source.classes == ["ant", "cat"]
    assert rows_of(source) == SORTED_INTO_CLASSES
    by_name = {item.name: item.read() for item in source.items()}
    assert by_name["cat/v_2.jpg"] == (flat / "v_2.jpg").read_bytes()


@pytest.mark.parametrize("prefix", ["", "./", "val/"])
@pytest.mark.parametrize(
    "labels", ["cat\nant\ncat\nant\n", "v_3.jpg ant\nv_0.jpg cat\nv_1.jpg ant\nv_2.jpg cat\n"]
)
def test_a_flat_tar_is_sorted_into_its_classes(labels, prefix, flat, tmp_path):
    members = [(f"{prefix}v_{i}.jpg", (flat / f"v_{i}.jpg").read_bytes()) for i in (2, 0, 3, 1)]
    path = pack(tmp_path / "val.tar", members)
    source = open_source(path, val_labels=write(tmp_path / "labels.txt", labels))
    assert rows_of(source) == SORTED_INTO_CLASSES
    by_name = {item.name: item.read() for item in source.items()}
    assert by_name["cat/v_2.jpg"] == (flat / "v_2.jpg").read_bytes()


def test_integers_beside_paths_are_the_labels_themselves(flat, tmp_path):
    lines = "v_0.jpg 10\nv_1.jpg 2\nv_2.jpg 10\nv_3.jpg 0\n"
    source = open_source(flat, val_labels=write(tmp_path / "labels.txt", lines))
    assert source.classes == [str(label) for label in range(11)]
    assert rows_of(source) == [("0/v_3.jpg", 0), ("2/v_1.jpg", 2), ("10/v_0.jpg", 10), ("10/v_2.jpg", 10)]


def test_a_list_with_class_names_that_happen_to_have_digits_is_a_list_of_names(flat, tmp_path):
    source = open_source(flat, val_labels=write(tmp_path / "labels.txt", "007\n008\n007\n1\n"))
    assert source.classes == ["007", "008", "1"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("1\n2\n3\n4\n", "integers without 0; ILSVRC2012_validation_ground_truth.txt"),
        ("ant\ncat\n", "2 labels, but .* has 4 images"),
        ("v_0.jpg a\nv_1.jpg a\nv_2.jpg a\n", "no label for 'v_3.jpg'"),
        ("v_0.jpg a\nv_1.jpg a\nv_2.jpg a\nv_3.jpg a\nv_4.jpg a\n", "'v_4.jpg' is not in"),
        ("v_0.jpg a\nv_0.jpg b\n", "label 2: 'v_0.jpg' is listed twice"),
        ("v_0.jpg a\nv_1.jpg\n", "label 2: 'v_1.jpg', expected a path and a label"),
        ("../v_0.jpg a\nv_1.jpg a\n", "label 1: '../v_0.jpg': a name that leaves"),
        ("v_0.jpg -1\nv_1.jpg 0\nv_2.jpg 0\nv_3.jpg 0\n", "label -1, expected 0 to"),
        ("v_0.jpg 0\nv_1.jpg 0\nv_2.jpg 0\nv_3.jpg 99999999\n", "label 99999999, expected 0 to"),
        ("..\nant\nant\nant\n", "'..': a name that leaves its folder"),
        ("\n \n", "no labels in it"),
    ],
)
def test_labels_that_do_not_fit_are_refused_naming_the_line_or_image(labels, message, flat, tmp_path):
    path = write(tmp_path / "labels.txt", labels)
    assert str(path) in refused(message, flat, val_labels=path)


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("v_{}.jpg\tn0{}\t0\t32\t44\t62", "keep the first two of 6 columns: cut -f1,2 "),
        ("v_{}.jpg n0{} 0 32 44 62", "keep the first two of 6 columns: cut -d' ' -f1,2 "),
        ("v_{}.jpg,n0{}", "separate them by a space or a tab"),
        ("v_{}.jpg;n0{}", "separate them by a space or a tab"),
        ("n0{} v_{}.jpg", "expected a path and a label, or a label alone"),
        ("v_{}.jpg", "expected a path and a label, or a label alone"),
    ],
    ids=["tabs", "blanks", "commas", "semicolons", "label first", "paths alone"],
)
def test_lines_of_other_columns_are_refused_saying_what_was_found(line, remedy, flat, tmp_path):
    lines = [line.format(record, record) for record in range(4)]
    path = write(tmp_path / "labels.txt", "\n".join(lines))
    message = refused("label 1: ", flat, val_labels=path)
    assert f"{lines[0]!r}, expected a path and a label" in message
    assert remedy in message


def test_missing_and_unreadable_labels_are_refused(flat, tmp_path):
    refused("nothing.txt: cannot be read", flat, val_labels=tmp_path / "nothing.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    refused("binary.txt: not UTF-8", flat, val_labels=tmp_path / "binary.txt")
    refused("no such folder or tar", tmp_path / "nothing", val_labels=write(tmp_path / "l.txt", "a"))


def test_a_link_out_of_a_flat_folder_is_refused_unless_allowed(flat, tmp_path):
    save_grey(tmp_path / "outside.jpg", 9)
    (flat / "v_4.jpg").symlink_to(tmp_path / "outside.jpg")
    labels = write(tmp_path / "labels.txt", "a\n" * 5)
    refused("leads out of", flat, val_labels=labels)
    assert open_source(flat, val_labels=labels, follow_links=True).count() == 5


# Manifests.


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("m.csv", "path,label\nval/v_2.jpg,cat\nval/v_0.jpg,ant\n"),
        ("m.tsv", "path\tlabel\nval/v_2.jpg\tcat\nval/v_0.jpg\tant\n"),
        ("m.csv", "path\tlabel\nval/v_2.jpg\tcat\nval/v_0.jpg\tant\n"),
        ("m.csv", '\ufefflabel,note,path\r\ncat,"a, b",val/v_2.jpg\r\n\r\nant,,"./val/../val/v_0.jpg"\r\n'),
    ],
    ids=["csv", "tsv", "tabs in a csv", "other columns, quotes, Windows"],
)
def test_a_manifest_keeps_the_order_of_its_lines(file, text, flat, tmp_path):
    source = open_source(write(tmp_path / file, text))
    data = [(flat / name).read_bytes() for name in ("v_2.jpg", "v_0.jpg")]
    assert items_of(source) == (
        ["ant", "cat"],
        [("cat/val/v_2.jpg", 1, data[0]), ("ant/val/v_0.jpg", 0, data[1])],
    )


def test_integers_in_a_manifest_are_the_labels_themselves(flat, tmp_path):
    source = open_source(write(tmp_path / "m.csv", "path,label\nval/v_0.jpg,2\nval/v_1.jpg,0\n"))
    assert source.classes == ["0", "1", "2"]
    assert rows_of(source) == [("2/val/v_0.jpg", 2), ("0/val/v_1.jpg", 0)]


def test_an_absolute_path_inside_the_manifests_folder_is_allowed(flat, tmp_path):
    source = open_source(write(tmp_path / "m.csv", f"path,label\n{flat / 'v_0.jpg'},ant\n"))
    assert rows_of(source) == [("ant/val/v_0.jpg", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line is '', expected the column names path and label"),
        ("val/v_0.jpg,ant\n", "first line is 'val/v_0.jpg,ant', expected the column names"),
        ("path;label\nval/v_0.jpg;ant\n", "expected the column names path and label, separated by a comma"),
        ("path,label\nval/v_0.jpg\n", "line 2: no path or no label"),
        ("path,label\n\nval/v_0.jpg,\n", "line 3: no path or no label"),
        ("path,label\n,ant\n", "line 2: no path or no label"),
        ("path,label\n../v_0.jpg,ant\n", "line 2: '../v_0.jpg' leaves the manifest's folder"),
        ("path,label\nval/../../v_0.jpg,ant\n", "line 2: .* leaves the manifest's folder"),
        ("path,label\n/etc/passwd,ant\n", "line 2: '/etc/passwd' leaves the manifest's folder"),
        ("path,label\nval,ant\n", "val: not a regular file"),
        ("path,label\nval/v_9.jpg,ant\n", "v_9.jpg: cannot be read: No such file"),
        ("path,label\nval/v_0.jpg,ant\nval/v_0.jpg,cat\n", "two images are named 'val/v_0.jpg'"),
        ("path,label\nval/v_0.jpg,-1\nval/v_1.jpg,0\n", "label -1, expected 0 to"),
        ("path,label\nval/v_0.jpg,../evil\n", "'../evil': a name that leaves"),
        ('path,label\n"val/v_0.jpg,ant\n', "line 2: unexpected end of data"),
    ],
)
def test_a_manifest_that_cannot_be_converted_is_refused_naming_the_line(text, message, flat, tmp_path):
    path = write(tmp_path / "m.csv", text)

    def everything():
        source = open_source(path)
        source.identity()
        items_of(source)

    with pytest.raises(SourceError, match=message) as caught:
        everything()
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"path,label\n\xff\xfe,ant\n")
    refused("not UTF-8 text", tmp_path / "m.csv")


def test_a_link_out_of_the_manifests_folder_is_refused_unless_allowed(tmp_path):
    save_grey(tmp_path / "outside.jpg", 9)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    path = write(tmp_path / "data" / "m.csv", "path,label\nlink.jpg,ant\n")
    refused("link.jpg: a link that leads out of", path)
    assert len(items_of(open_source(path, follow_links=True))[1]) == 1


def test_a_manifest_that_changes_after_it_was_counted_is_noticed(flat, tmp_path):
    path = write(tmp_path / "m.csv", "path,label\nval/v_0.jpg,ant\nval/v_1.jpg,ant\n")
    source = open_source(path)
    assert source.count() == 2
    write(path, "path,label\nval/v_0.jpg,ant\n")
    with pytest.raises(SourceError, match="changed meanwhile"):
        list(source.items())
