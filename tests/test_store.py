import io
import json
import multiprocessing
import pickle
import re
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import lmdb
import numpy as np
import pyarrow as pa
import pytest
from image_sets import grey_of, size_of
from PIL import Image

from dali_lmdb.errors import RecordError, StoreDamagedError, StoreError, StoreFormatError, StoreNotFoundError
from dali_lmdb.images.kinds import Kind
from dali_lmdb.inspect import verify
from dali_lmdb.store import layout, open_store
from dali_lmdb.store.encoding import to_ipc
from dali_lmdb.store.fingerprint import fingerprint
from dali_lmdb.store.layout import INDEX_DTYPES, INDEX_SCHEMA
from dali_lmdb.store.pages import PageFile
from dali_lmdb.store.writer import StoreWriter


def make_store(path, values, *, commits=1, classes=("even", "odd"), spoil=None):
    """A store whose record i has label i % 2 and name ``class/i``; values are any bytes.

    ``spoil(columns)`` may write something wrong into the index.
    """
    labels = np.arange(len(values), dtype=np.int32) % 2
    with StoreWriter(path) as writer:
        for part in np.array_split(np.arange(len(values)), commits):
            writer.commit([values[i] for i in part])
        columns = {name: np.zeros(len(values), dtype=dtype) for name, dtype in INDEX_DTYPES.items()}
        columns["label"] = labels
        columns["num_bytes"] = np.array([len(value) for value in values], dtype=np.uint32)
        columns["crc32"] = np.array([zlib.crc32(value) for value in values], dtype=np.uint32)
        columns["file_offset"] = writer.record_extents(0, len(values))[0]
        if spoil is not None:
            spoil(columns)
        names = pa.array([f"{classes[label]}/{i}" for i, label in enumerate(labels)])
        writer.add_index(columns, names)
        writer.finish(classes=list(classes), made={"by": "test"})
    return path


def values_of(sizes, seed=0):
    random = np.random.default_rng(seed)
    return [random.bytes(int(size)) for size in sizes]


SIZES = {
    "one tiny record": [1],
    "tiny records, all in the last leaf": [10] * 20,
    "tiny records in many leaves": [10] * 1000,
    "images": [5_000, 120_000, 3, 40_000, 0, 1],
    "mixed": np.random.default_rng(1).integers(0, 5_000, 300),
    "tiny ones last": [9_000] * 30 + [4] * 5,
}


@pytest.fixture
def values():
    return values_of(SIZES["mixed"])


@pytest.fixture
def small(tmp_path, values):
    return make_store(tmp_path / "small.lmdb", values)


def change(path, key, value):
    """Put another value under a key of a finished store."""
    with (
        lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 30) as env,
        env.begin(write=True) as transaction,
    ):
        before = transaction.get(key)
        transaction.put(key, value(bytes(before)) if callable(value) else value)


def change_meta(path, **fields):
    """Write other fields into ``__meta__``, with the checksum of what it then says."""

    def changed(raw):
        values = {**json.loads(raw), **fields}
        del values["crc32"]
        text = json.dumps(values, ensure_ascii=False).encode()
        return json.dumps({**values, "crc32": zlib.crc32(text)}, ensure_ascii=False).encode()

    change(path, b"__meta__", changed)


@pytest.mark.parametrize("commits", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_records_come_back_as_they_were_written(tmp_path, sizes, commits):
    values = values_of(SIZES[sizes])
    path = make_store(tmp_path / "x.lmdb", values, commits=commits)
    with open_store(path) as store:
        assert len(store) == len(values)
        assert [bytes(store.read(i)) for i in range(len(values))] == values
        every = np.arange(len(values))[::-1]
        assert [array.tobytes() for array in store.arrays(every)] == values[::-1]
        assert store.labels.tolist() == [i % 2 for i in range(len(values))]
        assert [store.name(i) for i in range(len(values))] == [
            f"{('even', 'odd')[i % 2]}/{i}" for i in every[::-1]
        ]
        for i in range(len(values)):
            store.check(i)


@pytest.mark.parametrize("sizes", SIZES)
def test_file_offsets_are_right_or_unknown(tmp_path, sizes):
    values = values_of(SIZES[sizes])
    path = make_store(tmp_path / "x.lmdb", values)
    raw = path.read_bytes()
    with open_store(path) as store:
        offsets = store.column("file_offset").tolist()
        for value, offset in zip(values, offsets, strict=True):
            assert offset == 0 or raw[offset : offset + len(value)] == value
        assert sum(offset == 0 for offset in offsets) < 300  # one leaf page at most
        exact, lengths = store.extents(np.arange(len(values)))
        for value, offset, length in zip(values, exact.tolist(), lengths.tolist(), strict=True):
            assert raw[offset : offset + length] == value
        # LMDB leaves old copies of pages behind; an offset must be that of the one in use.
        assert all(known in (0, found) for known, found in zip(offsets, exact.tolist(), strict=True))


def test_a_converted_store_describes_its_images(store_path, image_folder):
    with open_store(store_path) as store:
        sizes = [size_of(i) for i in range(24)]
        assert store.column("height").tolist() == [height for height, _ in sizes]
        assert store.column("width").tolist() == [width for _, width in sizes]
        assert set(store.column("kind").tolist()) == {Kind.JPEG_BASELINE}
        assert set(store.column("change").tolist()) == {0}
        assert store.classes == ["ant", "bee", "cat"]
        assert store.labels.dtype == np.int32
        assert not store.labels.flags.writeable
        assert store.fingerprint == fingerprint([(store.labels, store.column("crc32"))])
        for i in range(len(store)):
            raw = (image_folder / store.name(i)).read_bytes()
            assert bytes(store.read(i)) == raw
            assert int(store.column("crc32")[i]) == zlib.crc32(raw)
            assert int(store.column("num_bytes")[i]) == len(raw)


def test_reading_copies_nothing(store_path):
    with open_store(store_path) as store:
        view = store.read(3)
        assert view.readonly
        assert not store.arrays(np.array([3]))[0].flags.owndata
        assert not store.labels.flags.owndata


def test_views_outlive_the_store(small, values):
    store = open_store(small)
    view, labels = store.read(0), store.labels
    store.close()
    del store
    small.unlink()
    assert bytes(view) == values[0]
    assert labels.sum() == len(values) // 2


@pytest.mark.parametrize("index", [-1, 300, 1 << 40])
def test_an_index_outside_the_store_is_an_index_error(small, index):
    with open_store(small) as store:
        for read in (store.read, store.name, store.check):
            with pytest.raises(IndexError, match=f"record {index} of .*expected 0 to 299"):
                read(index)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_compacted_copy_reads_right_with_stale_offsets(tmp_path, sizes):
    values = values_of(SIZES[sizes])
    path = make_store(tmp_path / "x.lmdb", values, commits=2)
    with lmdb.open(str(path), subdir=False, lock=False) as env, open(tmp_path / "y.lmdb", "wb") as copy:
        env.copyfd(copy.fileno(), compact=True)
    with open_store(tmp_path / "y.lmdb") as store, open_store(path) as before:
        assert [bytes(store.read(i)) for i in range(len(store))] == values
        assert store.fingerprint == before.fingerprint
        offsets, lengths = store.extents(np.arange(len(store)))
        raw = (tmp_path / "y.lmdb").read_bytes()
        found = [raw[at : at + n] for at, n in zip(offsets.tolist(), lengths.tolist(), strict=True)]
        assert found == values


def test_a_store_rewritten_key_by_key_reads_right(tmp_path, small, values):
    """As another tool might copy it: other pages, other order of writing, many transactions."""
    with lmdb.open(str(small), subdir=False, lock=False, readonly=True) as env, env.begin() as transaction:
        items = list(transaction.cursor())
    with lmdb.open(str(tmp_path / "y.lmdb"), subdir=False, lock=False, map_size=1 << 30, sync=False) as env:
        for key, value in reversed(items):
            with env.begin(write=True) as transaction:
                transaction.put(key, value)
    with open_store(tmp_path / "y.lmdb") as store:
        assert [bytes(store.read(i)) for i in range(len(store))] == values


def test_a_plain_copy_reads_right(tmp_path, small, values):
    (tmp_path / "y.lmdb").write_bytes(small.read_bytes())
    with open_store(tmp_path / "y.lmdb") as store:
        assert bytes(store.read(7)) == values[7]


def test_one_file_may_be_open_many_times(small, values):
    stores = [open_store(small) for _ in range(5)]
    assert {bytes(store.read(9)) for store in stores} == {values[9]}


def test_two_stores_with_equal_content_have_equal_fingerprints(tmp_path, values):
    stores = [
        open_store(make_store(tmp_path / f"{n}.lmdb", values, commits=commits)) for n, commits in enumerate((1, 4))
    ]
    assert stores[0].fingerprint == stores[1].fingerprint
    other = open_store(make_store(tmp_path / "other.lmdb", [*values[:-1], b"other"]))
    assert other.fingerprint != stores[0].fingerprint
    swapped = open_store(make_store(tmp_path / "swapped.lmdb", [values[2], values[1], values[0], *values[3:]]))
    assert swapped.fingerprint != stores[0].fingerprint


def one_line(info):
    message = str(info.value)
    assert "\n" not in message
    return message


def test_every_truncation_is_refused_when_opening(tmp_path, small):
    raw = small.read_bytes()
    path = tmp_path / "t.lmdb"
    for length in [0, 1, 100, 151, 4095, 4096, 4097, 8192, *range(10_000, len(raw), len(raw) // 50), len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(StoreError) as info:
            open_store(path)
        assert str(path) in one_line(info)


def test_a_truncated_store_says_so(tmp_path, small):
    path = tmp_path / "t.lmdb"
    path.write_bytes(small.read_bytes()[:-5000])
    with pytest.raises(StoreDamagedError, match="truncated"):
        open_store(path)


def test_nothing_a_text_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(StoreNotFoundError, match=r"no store at .*; make one with") as info:
        open_store(tmp_path / "nothing.lmdb")
    one_line(info)
    (tmp_path / "notes.txt").write_text("these are notes\n" * 1000)
    with pytest.raises(StoreFormatError, match="not an LMDB file") as info:
        open_store(tmp_path / "notes.txt")
    one_line(info)
    with pytest.raises(StoreError) as info:
        open_store(tmp_path)
    one_line(info)


def test_an_lmdb_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "x.lmdb"
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as transaction:
        for n in range(100):
            transaction.put(b"key-%d" % n, b"value")
    with pytest.raises(StoreFormatError) as info:
        open_store(path)
    assert one_line(info).startswith(f"{path}: an LMDB file of another layout, with 100 keys: 'key-0', 'key-1', ")
    assert "dali-lmdb convert" not in str(info.value)


def test_an_empty_lmdb_file_is_refused(tmp_path):
    path = tmp_path / "x.lmdb"
    lmdb.open(str(path), subdir=False, lock=False).close()
    with pytest.raises(StoreFormatError, match="with 0 keys; expected __meta__"):
        open_store(path)


def test_an_unfinished_store_is_refused(tmp_path, values):
    path = tmp_path / "x.lmdb"
    with StoreWriter(path) as writer:
        writer.commit(values)
    with pytest.raises(StoreFormatError, match="an unfinished store; run its conversion again to resume"):
        open_store(path)


def test_a_newer_format_is_refused_with_both_versions(small):
    change_meta(small, format=7, something_new=[1, 2])
    with pytest.raises(StoreFormatError, match=r"format 7, this version reads 3;") as info:
        open_store(small)
    one_line(info)


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"format"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 3}',
        b'{"num_records": 3}',
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_a_damaged_meta_is_refused(small, meta):
    change(small, b"__meta__", meta)
    with pytest.raises(StoreError) as info:
        open_store(small)
    assert len(one_line(info)) < 400


@pytest.mark.parametrize(
    "fields",
    [
        {"num_records": 301},
        {"num_records": 299},
        {"num_records": -1},
        {"num_records": 10**30},
        {"num_records": "300"},
        {"num_records": None},
        {"classes": "even odd"},
        {"classes": [1, 2]},
        {"classes": None},
        {"fingerprint": 5},
        {"index_crc32": [1]},
        {"index_crc32": None},
        {"index_crc32": []},
        {"names_crc32": [1, 2]},
        {"names_crc32": ["1"]},
        {"piece_records": 0},
        {"piece_records": 100},
        {"piece_records": None},
        {"num_records": 1 << 64, "piece_records": 1 << 64},
        {"made": []},
        {"unknown": 1},
    ],
    ids=str,
)
def test_meta_that_does_not_fit_is_refused(small, fields):
    change_meta(small, **fields)
    with pytest.raises(StoreDamagedError) as info:
        open_store(small)
    one_line(info)


def test_meta_that_is_still_json_but_not_what_was_written_is_refused(small):
    change(small, b"__meta__", lambda raw: raw.replace(b'"even"', b'"evil"'))
    with pytest.raises(StoreDamagedError, match="__meta__"):
        open_store(small)


@pytest.mark.parametrize("position", [0, 4, 8, 100, 1000, -1])
def test_a_flipped_bit_in_the_index_is_refused(small, position):
    def flip(raw):
        damaged = bytearray(raw)
        damaged[position] ^= 4
        return bytes(damaged)

    change(small, b"__index__", flip)
    with pytest.raises(StoreDamagedError, match="__index__"):
        open_store(small)


@pytest.mark.parametrize("index", [b"", b"not arrow", b"\xff\xff\xff\xff\x10\0\0\0", b"\0" * 5000])
def test_an_index_that_is_not_arrow_is_refused_even_with_its_checksum(small, index):
    change(small, b"__index__", index)
    change_meta(small, index_crc32=[zlib.crc32(index)])
    with pytest.raises(StoreDamagedError, match="__index__"):
        open_store(small)


def test_an_index_with_other_columns_is_refused_even_with_its_checksum(small):
    sink = pa.BufferOutputStream()
    batch = pa.RecordBatch.from_pydict({"label": list(range(300))})
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    index = sink.getvalue().to_pybytes()
    change(small, b"__index__", index)
    change_meta(small, index_crc32=[zlib.crc32(index)])
    with pytest.raises(StoreDamagedError, match="__index__"):
        open_store(small)


def test_random_damage_behind_a_right_checksum_never_leaves_the_file(small):
    """The columns may then say anything; records are still read inside the file, or refused."""
    with lmdb.open(str(small), subdir=False, lock=False, readonly=True) as env, env.begin() as transaction:
        index = bytes(transaction.get(b"__index__"))
    random = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(index)
        for _ in range(random.integers(1, 8)):
            damaged[random.integers(len(damaged))] = random.integers(256)
        change(small, b"__index__", bytes(damaged))
        change_meta(small, index_crc32=[zlib.crc32(damaged)])
        message = ""
        try:
            with open_store(small) as store:
                for array in store.arrays(np.arange(len(store))):
                    array.tobytes()
        except StoreError as error:
            message = str(error)
        assert "\n" not in message


@pytest.mark.parametrize(
    ("column", "wrong"),
    [
        ("file_offset", 1 << 40),
        ("file_offset", (1 << 64) - 1),
        ("file_offset", (1 << 64) - 1000),
        ("num_bytes", (1 << 32) - 1),
    ],
    ids=str,
)
def test_an_index_that_points_outside_the_file_is_refused_when_read(tmp_path, values, column, wrong):
    longest = int(np.argmax([len(value) for value in values[1:-1]])) + 1

    def spoil(columns):
        columns[column][longest] = wrong

    with open_store(make_store(tmp_path / "x.lmdb", values, spoil=spoil)) as store:
        assert bytes(store.read(0)) == values[0]
        for read in (store.read, store.check, lambda record: store.arrays(np.array([0, record]))):
            with pytest.raises(StoreDamagedError, match="outside the file") as info:
                read(longest)
            one_line(info)


@pytest.mark.parametrize("names", [b"", b"not arrow", b"\0" * 5000])
def test_damaged_names_are_noticed_when_a_name_is_asked_for(small, values, names):
    change(small, b"__names__", names)
    with open_store(small) as store:
        assert bytes(store.read(0)) == values[0]
        with pytest.raises(StoreDamagedError, match="__names__") as info:
            store.name(0)
        one_line(info)
        assert store.where(4).endswith("record 4")


def test_a_store_without_a_key_is_refused(small):
    with (
        lmdb.open(str(small), subdir=False, lock=False) as env,
        env.begin(write=True) as transaction,
    ):
        transaction.delete((299).to_bytes(8, "big"))
    with pytest.raises(StoreDamagedError):
        open_store(small)


def test_a_damaged_record_fails_its_check_by_name(small, values):
    with open_store(small) as store:
        longest = int(np.argmax(store.column("num_bytes")))
        offset = int(store.extents(np.array([longest]))[0][0])
    raw = bytearray(small.read_bytes())
    raw[offset + 10] ^= 1
    small.write_bytes(raw)
    with open_store(small) as store:
        store.check((longest + 1) % len(values))
        with pytest.raises(RecordError, match=rf"record {longest} \((even|odd)/{longest}\).*checksum") as info:
            store.check(longest)
        one_line(info)


def test_random_damage_to_the_file_ends_in_a_result_or_our_error(small):
    raw = small.read_bytes()
    random = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(raw)
        for _ in range(random.integers(1, 30)):
            damaged[random.integers(len(damaged))] = random.integers(256)
        small.write_bytes(damaged)
        message = ""
        try:
            with open_store(small) as store:
                for record in range(0, len(store), 7):
                    bytes(store.read(record))
                    store.name(record)
                    store.check(record)
        except (StoreError, RecordError) as error:
            message = str(error)
        assert "\n" not in message


def test_a_store_pickles_as_its_path(small, values):
    with open_store(small) as store:
        raw = pickle.dumps(store)
        assert len(raw) < 500
        copy = pickle.loads(raw)
        assert bytes(copy.read(5)) == values[5]
        assert copy.fingerprint == store.fingerprint


def test_threads_read_at_once(small, values):
    with open_store(small) as store, ThreadPoolExecutor(8) as pool:
        orders = [np.random.default_rng(n).permutation(len(values)).tolist() for n in range(16)]

        def read_all(order):
            return all(bytes(store.read(i)) == values[i] and store.name(i).endswith(f"/{i}") for i in order)

        assert all(pool.map(read_all, orders))


def checksums(store):
    return [zlib.crc32(store.read(i)) for i in range(len(store))]


def send_checksums(store, pipe):
    pipe.send(checksums(store))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_other_processes_read_before_and_after_the_parent(small, values, method):
    context = multiprocessing.get_context(method)
    expected = [zlib.crc32(value) for value in values]

    def in_child(store):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=send_checksums, args=(store, sender))
        process.start()
        sender.close()
        found = receiver.recv()
        process.join()
        assert process.exitcode == 0
        return found

    store = open_store(small)
    assert in_child(store) == expected
    assert checksums(store) == expected
    assert in_child(store) == expected
    assert checksums(store) == expected


def test_opening_imports_neither_lmdb_nor_torch_nor_dali(small):
    script = (
        "import sys, dali_lmdb\n"
        f"store = dali_lmdb.open_store({str(small)!r})\n"
        "store.read(0), store.name(0), store.labels.sum()\n"
        "print([name for name in ('lmdb', 'torch', 'nvidia.dali', 'click') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_greys_are_what_the_other_tests_build_on(store_path):
    with open_store(store_path) as store:
        for i in range(len(store)):
            pixels = np.asarray(Image.open(io.BytesIO(store.read(i))))
            assert abs(pixels.astype(int) - grey_of(i)).max() <= 1


@pytest.mark.parametrize("records", [[-1], [0, 10**6]])
def test_records_that_do_not_exist_are_not_read(small, records):
    with open_store(small) as store, pytest.raises(IndexError, match="expected 0 to"):
        store.arrays(np.array(records))


def make_store_in_pieces(path, values, *, piece_records=7):
    """``make_store`` with an index in several pieces; what goes into it is known piece by piece."""
    with StoreWriter(path, piece_records=piece_records) as writer:
        writer.commit(values)
        for piece in writer.pieces():
            writer.add_index(*columns_of(writer, values, piece))
        writer.finish(classes=["even", "odd"], made={"by": "test"})
    return path


def columns_of(writer, values, piece):
    """(columns, names) of a piece, no two values alike in a column, as far as its type allows."""
    offsets, lengths = writer.record_extents(piece.start, piece.stop)
    records = np.arange(piece.start, piece.stop)
    columns = {
        "label": records % 2,
        "height": records + 1,
        "width": 2 * records + 1,
        "num_bytes": lengths,
        "crc32": [zlib.crc32(values[i]) for i in records],
        "file_offset": offsets,
        "kind": records % 13,
        "change": records % 4,
    }
    columns = {name: np.array(columns[name], dtype) for name, dtype in INDEX_DTYPES.items()}
    return columns, pa.array([f"{('even', 'odd')[i % 2]}/{i}" for i in records])


def damage_of(path):
    """What `verify` finds, but for that the records are no images."""
    return [line for line in verify(path).damage if not re.search(r"the index says \w+, \d+ x", line)]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_store_in_pieces_reads_as_one_in_one_piece(tmp_path, sizes):
    values = values_of(SIZES[sizes])
    whole = open_store(make_store_in_pieces(tmp_path / "whole.lmdb", values, piece_records=layout.PIECE_RECORDS))
    path = make_store_in_pieces(tmp_path / "pieces.lmdb", values)
    raw = path.read_bytes()
    store = open_store(path)
    every = np.random.default_rng(0).permutation(len(values))
    assert len(store.meta.index_crc32) == -(-len(values) // 7)
    for field in set(INDEX_DTYPES) - {"file_offset"}:
        expected = whole.column(field)
        for found in (store.column(field), np.concatenate(list(store.column_parts(field)))):
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype
        np.testing.assert_array_equal(store.gather(field, every), expected[every])
        assert store.gather(field, every).dtype == expected.dtype
        assert store.gather(field, every[:0]).shape == (0,)
    assert [array.tobytes() for array in store.arrays(every)] == [values[i] for i in every]
    assert store.names().to_pylist() == whole.names().to_pylist()
    assert [store.name(int(i)) for i in every] == [whole.name(int(i)) for i in every]
    assert store.fingerprint == whole.fingerprint
    offsets = store.column("file_offset").tolist()
    assert all(not at or raw[at : at + len(value)] == value for at, value in zip(offsets, values, strict=True))
    assert damage_of(path) == []


@pytest.mark.parametrize("count", [17, 20, 32, 40])
def test_offsets_of_small_records_are_right_where_names_lie_on_a_page_behind(tmp_path, count):
    """The page of the last records is then not the last page, and is still copied for each piece of the index."""
    values = values_of([9] * count)
    with StoreWriter(tmp_path / "x.lmdb", piece_records=7) as writer:
        writer.commit(values)
        for piece in writer.pieces():
            columns, names = columns_of(writer, values, piece)
            writer.add_index(columns, pa.array([name + 50 * "x" for name in names.to_pylist()]))
        writer.finish(classes=["even", "odd"], made={})
    written = open_store(tmp_path / "x.lmdb").column("file_offset")
    found, _ = PageFile(tmp_path / "x.lmdb").record_extents(0, count)
    assert all(offset in (0, at) for offset, at in zip(written.tolist(), found.tolist(), strict=True))


def test_there_is_no_record_before_or_after_those_of_a_store_in_pieces(tmp_path):
    store = open_store(make_store_in_pieces(tmp_path / "x.lmdb", [b"x"] * 20))
    for record in (-1, 20, 21):
        with pytest.raises(IndexError, match=str(record)):
            store.gather("label", np.array([3, record]))
        with pytest.raises(IndexError, match=str(record)):
            store.arrays(np.array([3, record]))


@pytest.mark.parametrize("records", [-1, 20, 21, 1 << 40])
def test_there_is_no_record_before_or_after_those_of_a_store(tmp_path, records):
    store = open_store(make_store(tmp_path / "x.lmdb", [b"x"] * 20))
    with pytest.raises(IndexError, match=f"{records}"):
        store.gather("label", np.array([3, records]))


def stream_of(columns, options=None):
    """An Arrow stream of one batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, columns.schema, options=options) as stream:
        stream.write_batch(columns)
    return sink.getvalue().to_pybytes()


def test_an_index_that_is_not_in_the_file_as_it_is_is_refused(tmp_path):
    """Arrow puts a compressed one somewhere else in memory."""
    path = make_store_in_pieces(tmp_path / "x.lmdb", [b"x"] * 20)
    columns = {name: open_store(path).column(name)[7:14] for name in INDEX_DTYPES}
    batch = pa.RecordBatch.from_pydict(columns, schema=INDEX_SCHEMA)
    compressed = stream_of(batch, pa.ipc.IpcWriteOptions(compression="lz4"))
    change(path, b"__index__/00000001", compressed)
    checksums = open_store_meta(path)["index_crc32"]
    change_meta(path, index_crc32=[checksums[0], zlib.crc32(compressed), checksums[2]])
    with pytest.raises(StoreDamagedError, match="__index__ is not readable") as info:
        open_store(path)
    one_line(info)


def open_store_meta(path):
    """``__meta__`` as it is in the file."""
    with lmdb.open(str(path), subdir=False, lock=False, readonly=True) as env, env.begin() as transaction:
        return json.loads(bytes(transaction.get(b"__meta__")))


@pytest.mark.parametrize("damage", ["an offset outside", "not UTF-8"])
def test_names_that_lead_outside_are_refused_even_with_their_checksum(tmp_path, damage):
    path = make_store_in_pieces(tmp_path / "x.lmdb", [b"x"] * 20)
    names = pa.array([f"name {i}" for i in range(7)], pa.large_string())
    raw = to_ipc({"name": names}, layout.NAMES_SCHEMA).to_pybytes()
    if damage == "not UTF-8":
        damaged = raw.replace(b"name 3", b"name \xff")
    else:
        offsets = np.arange(0, 8 * 6, 6, dtype="<i8")
        wild = np.where(np.arange(8) == 3, 1 << 40, offsets)
        damaged = raw.replace(offsets.tobytes(), wild.astype("<i8").tobytes())
    assert damaged != raw
    change(path, b"__names__", damaged)
    checksums = open_store_meta(path)["names_crc32"]
    change_meta(path, names_crc32=[zlib.crc32(damaged), *checksums[1:]])
    for read in (lambda store: store.name(3), lambda store: store.names()):
        with pytest.raises(StoreDamagedError, match="__names__ is not readable"):
            read(open_store(path))
    assert any("__names__ is not readable" in line for line in verify(path).damage)


def test_a_compacted_copy_of_a_store_in_pieces_reads_right(tmp_path):
    values = values_of(SIZES["mixed"])
    make_store_in_pieces(tmp_path / "one.lmdb", values)
    with (
        lmdb.open(str(tmp_path / "one.lmdb"), subdir=False, lock=False, readonly=True) as env,
        open(tmp_path / "two.lmdb", "wb") as file,
    ):
        env.copyfd(file.fileno(), compact=True)
    store = open_store(tmp_path / "two.lmdb")
    assert [array.tobytes() for array in store.arrays(np.arange(300))] == values
    assert damage_of(tmp_path / "two.lmdb") == []


@pytest.mark.parametrize("key", [b"__index__/00000001", b"__names__/00000002"])
@pytest.mark.parametrize("how", ["missing", "a bit flipped", "another piece"])
def test_a_damaged_piece_is_refused_and_named(tmp_path, key, how):
    path = make_store_in_pieces(tmp_path / "x.lmdb", [b"x"] * 20)
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as transaction:
        before = transaction.get(key)
        damaged = {
            "missing": None,
            "a bit flipped": before[:-9] + bytes([before[-9] ^ 4]) + before[-8:],
            "another piece": transaction.get(key[:-1] + b"2" if key.endswith(b"1") else key[:9]),
        }[how]
        assert transaction.delete(key) if damaged is None else transaction.put(key, damaged)
    with pytest.raises(StoreDamagedError, match=key[:9].decode()) as info:
        open_store(path).names()
    one_line(info)
    assert any(key[:9].decode() in line for line in verify(path).damage)


def test_an_interrupted_index_is_made_anew(tmp_path):
    values = values_of([10, 3_000, 9_000, 10] * 10)
    path = tmp_path / "x.lmdb"
    with StoreWriter(path, piece_records=7) as writer:
        writer.commit(values)
    for num_pieces in (0, 1, 3, 6, 2):
        with StoreWriter(path, piece_records=7) as writer:
            assert writer.num_records == 40
            for piece in writer.pieces()[:num_pieces]:
                writer.add_index(*columns_of(writer, values, piece))
    with StoreWriter(path, piece_records=7) as writer:
        for piece in writer.pieces():
            writer.add_index(*columns_of(writer, values, piece))
        writer.finish(classes=["even", "odd"], made={})
    assert [array.tobytes() for array in open_store(path).arrays(np.arange(40))] == values
    assert damage_of(path) == []
