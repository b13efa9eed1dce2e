import os
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packing import items_of, write_parquet

from dali_lmdb.convert import ConvertSettings, convert
from dali_lmdb.convert.sources import open_source
from dali_lmdb.convert.sources.parquet import ParquetSource
from dali_lmdb.errors import SourceError

NAMES = ["ant", "bee"]


def refused(path, match):
    with pytest.raises(SourceError, match=match) as caught:
        items_of(open_source(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of(count):
    return [(f"{i}.jpg", b"image %d" % i, i % 2) for i in range(count)]


def test_rows_keep_their_order_over_files_and_row_groups(tmp_path):
    rows = rows_of(25)
    write_parquet(tmp_path / "b.parquet", rows[11:], names=NAMES, row_group_size=5)
    write_parquet(tmp_path / "a.parquet", rows[:11], names=NAMES, row_group_size=4)
    expected = [(f"{NAMES[label]}/{path}", label, data) for path, data, label in rows]
    assert items_of(open_source(tmp_path)) == (NAMES, expected)
    assert items_of(open_source(tmp_path / "*.parquet")) == (NAMES, expected)
    assert items_of(open_source(tmp_path / "a.parquet")) == (NAMES, expected[:11])


def test_images_are_read_in_any_order_long_after_others_of_their_row_group(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", rows_of(400), names=NAMES, row_group_size=200)
    items = list(open_source(path).items())
    assert [item.read() for item in items] == [data for _, data, _ in rows_of(400)]
    assert [item.read() for item in reversed(items[::20])] == [data for _, data, _ in rows_of(400)[::20][::-1]]


def count_reading(monkeypatch):
    """A list that grows by (row group, column, rows at a time) of each reading that begins."""
    begun = []
    original = pq.ParquetFile.iter_batches

    def iter_batches(self, num_rows, *, row_groups, columns, **options):
        begun.append((*row_groups, *columns[:1], num_rows))
        return original(self, num_rows, row_groups=row_groups, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    return begun


def test_a_row_group_is_read_once_however_many_threads_convert_it(tmp_path, monkeypatch):
    begun = count_reading(monkeypatch)
    path = write_parquet(tmp_path / "a.parquet", rows_of(1200), names=NAMES, row_group_size=600)
    convert(path, tmp_path / "a.lmdb", settings=ConvertSettings(check="none"), num_threads=16)
    assert [group for group, column, _ in begun if column == "image.bytes"] == [0, 1]


def test_images_are_decoded_a_few_megabytes_at_a_time_and_those_skipped_are_not_held(tmp_path, monkeypatch):
    rows = [(f"{i}.jpg", os.urandom(200_000), i % 2) for i in range(200)]
    path = write_parquet(tmp_path / "a.parquet", rows, names=NAMES, row_group_size=200)
    items = list(open_source(path).items())[150:]  # as a resumed conversion skips
    before, begun = pa.total_allocated_bytes(), count_reading(monkeypatch)
    assert items[0].read() == rows[150][1]
    assert pa.total_allocated_bytes() > before
    assert [item.read() for item in items[1:]] == [data for _, data, _ in rows[151:]]
    assert pa.total_allocated_bytes() <= before
    ((_, _, num_rows),) = begun
    assert 30 < num_rows < 43  # 8 MiB


def test_what_files_say_of_their_row_groups_is_not_held_for_all_of_them(tmp_path):
    path = write_parquet(tmp_path / "a-00.parquet", rows_of(3000), names=NAMES, row_group_size=1)
    for number in range(1, 20):
        os.link(path, tmp_path / f"a-{number:02}.parquet")
    before = resident_bytes()
    source = open_source(tmp_path)
    assert source.count() == 60_000
    assert resident_bytes() - before < 60_000 * 1000  # held for all, it was 2,500 a row group


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_class_names_are_held_once_however_many_files_name_them(tmp_path):
    for number in range(3):
        write_parquet(tmp_path / f"{number}.parquet", [(f"{number}.jpg", b"x", 0)], names=NAMES)
    assert len({id(file.columns.classes) for file in ParquetSource(tmp_path)._tables}) == 1


def test_without_metadata_classes_are_called_by_their_number(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [("x.jpg", b"x", 2)])
    assert items_of(open_source(path)) == (["0", "1", "2"], [("2/x.jpg", 2, b"x")])


def test_columns_are_found_by_their_kind(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", rows_of(2), names=NAMES, columns=("img", "fine_label"))
    assert open_source(path).count() == 2
    assert items_of(open_source(path))[1][1] == ("bee/1.jpg", 1, b"image 1")


def test_images_without_a_path_and_with_repeated_ones_are_named_by_their_row(tmp_path):
    write_parquet(tmp_path / "a.parquet", [(None, b"x", 0), ("own.jpg", b"y", 0)], names=NAMES)
    assert [row[0] for row in items_of(open_source(tmp_path))[1]] == ["ant/a/00000000", "ant/own.jpg"]
    write_parquet(tmp_path / "b.parquet", [("own.jpg", b"z", 0)], names=NAMES)
    names = [row[0] for row in items_of(open_source(tmp_path))[1]]
    assert names == ["ant/a/00000000", "ant/a/00000001", "ant/b/00000000"]


@pytest.mark.parametrize("path", ["/tmp/x.jpg", "../x.jpg", "a/../../x", "", ".", "a\0b"], ids=ascii)
def test_an_image_with_a_path_that_leads_elsewhere_is_named_by_its_row(path, tmp_path):
    write_parquet(tmp_path / "a.parquet", [("own.jpg", b"x", 0), (path, b"y", 1)], names=NAMES)
    expected = [("ant/own.jpg", 0, b"x"), ("bee/a/00000001", 1, b"y")]
    assert items_of(open_source(tmp_path)) == (NAMES, expected)


def test_a_path_that_is_not_utf8_is_a_name_all_the_same(tmp_path):
    path = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xffa")])
    image = pa.StructArray.from_arrays([pa.array([b"x"]), path], ["bytes", "path"])
    pq.write_table(pa.table({"image": image, "label": [0]}), tmp_path / "a.parquet")
    assert items_of(open_source(tmp_path))[1] == [(r"0/\xffa", 0, b"x")]


def test_class_names_need_not_be_folders(tmp_path):
    names = ["/a/airfield", "/", ".", "and/or"]
    path = write_parquet(tmp_path / "a.parquet", [(f"{i}.jpg", b"%d" % i, i) for i in range(4)], names=names)
    expected = [(f"{name}/{label}.jpg", label, b"%d" % label) for label, name in enumerate(names)]
    assert items_of(open_source(path)) == (names, expected)


def encoded(kind):
    return pa.dictionary(pa.int32(), kind)


def column(values, kind):
    return (
        pa.array(values, kind.value_type).dictionary_encode()
        if hasattr(kind, "index_type")
        else pa.array(values, kind)
    )


@pytest.mark.parametrize(
    ("image_type", "path_type", "label_type"),
    [
        (pa.binary_view(), pa.string_view(), pa.int64()),
        (pa.large_binary(), pa.large_string(), pa.uint8()),
        (encoded(pa.binary()), encoded(pa.string()), pa.int8()),
        (encoded(pa.binary()), pa.string_view(), pa.int64()),
    ],
    ids=["views", "large", "dictionaries", "mixed"],
)
def test_every_arrow_type_of_bytes_text_and_integers_is_read(image_type, path_type, label_type, tmp_path):
    # Repeating images, in more rows than are decoded at a time.
    rows = [(f"{i}.jpg", b"image %d" % (i % 7), i % 3) for i in range(300)]
    paths, images, labels = zip(*rows, strict=True)
    image = pa.StructArray.from_arrays([column(images, image_type), column(paths, path_type)], ["bytes", "path"])
    pq.write_table(pa.table({"image": image, "label": pa.array(labels, label_type)}), tmp_path / "a.parquet")
    assert pq.read_schema(tmp_path / "a.parquet").field("image").type == image.type
    expected = [(f"{label}/{path}", label, data) for path, data, label in rows]
    assert items_of(open_source(tmp_path)) == (["0", "1", "2"], expected)


def test_large_binary_and_images_without_a_path_column_are_read(tmp_path):
    image_type = pa.struct([("bytes", pa.large_binary())])
    table = pa.table({"image": pa.array([{"bytes": b"x"}], image_type), "label": pa.array([1], pa.int32())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert items_of(open_source(tmp_path / "a.parquet"))[1] == [("1/a/00000000", 1, b"x")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("x.jpg", None, 0), "row 1: no image bytes, perhaps only a path"),
        ((None, None, 0), "row 1: 'image' is null"),
        (("x.jpg", b"x", None), "row 1: 'label' is null"),
        (("x.jpg", b"x", 2), "row 1: label 2, expected 0 to 1"),
        (("x.jpg", b"x", -1), "row 1: label -1, expected 0 to 1; -1 often means unlabelled"),
    ],
)
def test_a_row_that_cannot_be_converted_is_named(row, message, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [("ok.jpg", b"x", 0), row], names=NAMES)
    assert refused(path, message).startswith(str(path))


def test_the_row_of_a_later_row_group_is_counted_in_the_file(tmp_path):
    rows = [*rows_of(7), ("x.jpg", b"x", None)]
    refused(write_parquet(tmp_path / "a.parquet", rows, row_group_size=3), "row 7: 'label' is null")


def test_labels_without_names_must_be_reasonable(tmp_path):
    refused(write_parquet(tmp_path / "a.parquet", [("x.jpg", b"x", 2**40)]), "label 1099511627776, expected 0 to")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b"x"], "label": [0]}, r"column 'image' is binary, expected struct<bytes"),
        ({"picture": [b"x"], "label": [0]}, "column 'image' is missing"),
        ({"image": [{"bytes": b"x"}], "label": ["ant"]}, "column 'label' is string, expected an integer"),
        ({"image": [{"bytes": b"x"}]}, "column 'label' is missing"),
        ({"image": [{"path": "x"}], "label": [0]}, "column 'image' is struct<path: string>"),
    ],
)
def test_other_columns_are_refused_saying_what_is_expected(columns, message, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", message)


def test_files_with_other_classes_are_not_mixed(tmp_path):
    write_parquet(tmp_path / "a.parquet", rows_of(2), names=NAMES)
    write_parquet(tmp_path / "b.parquet", rows_of(2), names=["bee", "ant"])
    refused(tmp_path, "b.parquet: other columns or class names than")


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": 3}}}'])
def test_metadata_that_is_not_hugging_faces_is_ignored(metadata, tmp_path):
    table = pq.read_table(write_parquet(tmp_path / "a.parquet", rows_of(2)))
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "b.parquet")
    assert items_of(open_source(tmp_path / "b.parquet"))[0] == ["0", "1"]


def test_a_class_name_that_leaves_the_folder_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", rows_of(2), names=["ant", "../bee"])
    refused(path, "leaves its folder")


def test_truncated_and_damaged_files_end_in_one_of_our_errors(tmp_path):
    data = write_parquet(tmp_path / "a.parquet", rows_of(40), names=NAMES, row_group_size=10).read_bytes()
    path = tmp_path / "b.parquet"
    for length in range(4, len(data), 97):
        path.write_bytes(data[:length])
        refused(path, "not a readable Parquet file")


def test_a_file_that_changes_while_it_is_converted_is_noticed(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", rows_of(4), names=NAMES)
    items = list(open_source(path).items())
    write_parquet(path, rows_of(5), names=NAMES)
    with pytest.raises(SourceError, match="changed meanwhile"):
        items[0].read()
