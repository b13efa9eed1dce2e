"""Files made to exhaust memory or time are refused while they are read, in bounded memory and time."""

import json
import resource
import struct
import zlib
from functools import partial

import lmdb
import numpy as np
import pyarrow as pa
import pytest
from bounds import bounded
from classic_databases import make_classic
from conversions import in_child
from damage import grey_image, write_store
from packing import write_parquet

from dali_lmdb.convert._journal import Journal, Row, batch_of
from dali_lmdb.convert.sources import open_source
from dali_lmdb.errors import ConversionError, SourceError, StoreDamagedError, StoreError, StoreFormatError
from dali_lmdb.store import layout, open_store
from dali_lmdb.store.encoding import from_ipc
from dali_lmdb.store.payload import PayloadError, decode_keys, locate_payload

# values of classic databases

COUNT = 40 << 20
LONG_VALUES = {
    "pickle of empty lists": lambda: b"\x80\x04" + b"]" * COUNT + b".",
    "pickle of marks": lambda: b"\x80\x04" + b"(" * COUNT + b".",
    "pickle of integers": lambda: b"\x80\x04]" + b"K\1" * (COUNT // 2) + b".",
    "pickle of memos": lambda: b"\x80\x04]" + b"\x94" * COUNT + b".",
    "pickle that skips": lambda: b"\x80\x04" + b"\x80\x04" * (COUNT // 2) + b".",
    "msgpack of integers": lambda: b"\xdd" + (60 << 20).to_bytes(4, "big") + b"\1" * (60 << 20),
    "msgpack of a false length": lambda: b"\xdd\xff\xff\xff\xff\1",
}


@pytest.mark.parametrize("value", LONG_VALUES.values(), ids=LONG_VALUES)
@pytest.mark.parametrize("decode", [locate_payload, partial(decode_keys, max_keys=1000)], ids=["record", "keys"])
def test_a_value_of_millions_of_objects_is_refused_soon(value, decode):
    data = memoryview(value())
    with bounded(), pytest.raises(PayloadError):
        decode(data)


def test_a_pickle_that_repeats_a_large_key_is_refused():
    repeated = b"\x80\x04](B\0\0\x10\0" + bytes(1 << 20) + b"\x94" + b"h\0" * 999 + b"e."
    with bounded(), pytest.raises(PayloadError, match="overlap"):
        decode_keys(memoryview(repeated), max_keys=1000)


def test_keys_that_the_database_does_not_have_are_not_read(tmp_path):
    keys = LONG_VALUES["pickle of memos"]()
    path = make_classic(tmp_path / "x.lmdb", [(grey_image(0), 0)] * 3, __len__=None, __keys__=keys)
    with bounded(), pytest.raises(StoreFormatError, match="__keys__"):
        open_store(path)


# Arrow


def compressed(columns, schema):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
        stream.write_batch(pa.record_batch(columns, schema=schema))
    return sink.getvalue()


def test_a_compressed_index_is_refused_before_it_is_expanded():
    count = 20_000_000
    data = compressed([np.zeros(count, dtype) for dtype in layout.INDEX_DTYPES.values()], layout.INDEX_SCHEMA)
    assert len(data) < 1 << 20
    with bounded():
        assert from_ipc(data, layout.INDEX_SCHEMA, num_records=count) is None


def test_a_compressed_value_is_refused_before_it_is_expanded():
    schema = pa.schema([("list", pa.large_binary())])
    value = bytes(16) + compressed([pa.array([bytes(500 << 20)], pa.large_binary())], schema).to_pybytes()
    with bounded(), pytest.raises(PayloadError, match="compressed"):
        locate_payload(memoryview(value))


def test_a_schema_of_many_fields_is_refused():
    schema = pa.schema([(f"{number}", pa.int8()) for number in range(100_000)])
    value = bytes(16) + schema.serialize().to_pybytes()
    with bounded(), pytest.raises(PayloadError):
        locate_payload(memoryview(value))


# metadata


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "x.lmdb", [grey_image(record) for record in range(3)])


def with_meta(path, out, **changes):
    """A copy of a store whose metadata has other values and a right checksum."""
    out.write_bytes(path.read_bytes())
    with (
        lmdb.open(str(out), subdir=False, lock=False, map_size=1 << 30) as env,
        env.begin(write=True) as transaction,
    ):
        values = json.loads(transaction.get(layout.META_KEY)) | changes
        values.pop("crc32", None)
        text = json.dumps(values)
        transaction.put(layout.META_KEY, json.dumps({**values, "crc32": zlib.crc32(text.encode())}).encode())
    return out


WRONG_SHARDS = {
    "a billion": {"index": 0, "count": 10**9, "set": "x"},
    "no index": {"count": 1, "set": "x"},
    "a list": {"index": [], "count": 1, "set": "x"},
    "negative": {"index": 0, "count": -1, "set": "x"},
    "no text": {"index": 0, "count": 1, "set": {}},
    "true": {"index": 0, "count": True, "set": "x"},
}


@pytest.mark.parametrize("shard", WRONG_SHARDS.values(), ids=WRONG_SHARDS)
def test_impossible_shard_metadata_is_damage(store_path, tmp_path, shard):
    with_meta(store_path, tmp_path / "x-00000-of-00001.lmdb", shard=shard)
    for path in (tmp_path, tmp_path / "x.lmdb", tmp_path / "x-00000-of-00001.lmdb"):
        with bounded(), pytest.raises(StoreDamagedError):
            open_store(path)


def test_a_missing_shard_of_many_is_named_soon(store_path, tmp_path):
    shard = {"index": 1, "count": layout.MAX_SHARDS, "set": "x"}
    with_meta(store_path, tmp_path / "x-00000-of-00001.lmdb", shard=shard)
    with bounded(), pytest.raises(StoreFormatError, match=r"missing: \[0, 2, 3"):
        open_store(tmp_path)


@pytest.mark.parametrize("made", [{"x": [[]] * 1_000_000}, {"x": [{}] * 1_000_000}])
def test_metadata_of_millions_of_lists_are_damage(store_path, tmp_path, made):
    path = with_meta(store_path, tmp_path / "x.lmdb", made=made)
    with bounded(), pytest.raises(StoreError):
        open_store(path)


def test_class_names_may_be_full_of_brackets(store_path, tmp_path):
    classes = [f'{number}"[{{\\' + "[" * 20_000 for number in range(3)]
    assert open_store(with_meta(store_path, tmp_path / "x.lmdb", classes=classes)).classes == classes


def test_class_names_that_are_no_text_are_damage(store_path, tmp_path):
    path = with_meta(store_path, tmp_path / "x.lmdb", classes=["a", "b\ud800", "c"])
    with pytest.raises(StoreDamagedError):
        open_store(path)


# journals


ROWS = batch_of([Row(f"c/{i}.jpg", 0, 1, 1, 10, 0, 1, 0, 0, None if i % 3 else "bad") for i in range(6)])


def payload_of(rows, *, schema=None):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema or rows.schema) as stream:
        stream.write_batch(rows)
    return sink.getvalue().to_pybytes()


WITH_NULL = pa.record_batch([pa.nulls(2, field.type) for field in ROWS.schema], schema=ROWS.schema)
BODY = payload_of(ROWS)
WRONG_FRAMES = {
    "rows before any": [b'{"rows": 1}', BODY],
    "the header again": [BODY, b"{}"],
    "no number": [BODY, b'{"rows": "1"}'],
    "negative": [BODY, b'{"rows": -1}'],
    "more than there are": [BODY, b'{"rows": 7}'],
    "text": [b"text"],
    "another schema": [payload_of(pa.record_batch({"name": ["a"]}))],
    "nulls": [payload_of(WITH_NULL)],
    "compressed": [compressed(ROWS.columns, ROWS.schema).to_pybytes()],
}


@pytest.mark.parametrize("frames", WRONG_FRAMES.values(), ids=WRONG_FRAMES)
def test_a_journal_of_valid_frames_in_the_wrong_place_is_damaged(tmp_path, frames):
    journal = Journal(tmp_path / "x")
    journal.start({})
    journal.close()
    with open(tmp_path / "x", "ab") as file:
        for data in frames:
            file.write(struct.pack("<II", len(data), zlib.crc32(data)) + data)
    journal = Journal(tmp_path / "x")
    try:
        with pytest.raises(ConversionError, match="--restart"):
            list(journal.rows())
        with pytest.raises(ConversionError, match="--restart"):
            journal.cut_to(4)
    finally:
        journal.close()


def test_a_journal_reads_no_more_than_it_has(tmp_path):
    journal = Journal(tmp_path / "x")
    journal.start({})
    journal.append(ROWS)
    journal.close()
    with open(tmp_path / "x", "ab") as file:
        file.write(struct.pack("<II", (1 << 32) - 1, 0) + b"torn")

    def work():
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
        journal = Journal(tmp_path / "x")
        assert [batch.num_rows for batch in journal.rows()] == [6]

    assert in_child(work) == 0


def test_a_journal_may_shorten_a_batch_twice(tmp_path):
    journal = Journal(tmp_path / "x")
    journal.start({})
    journal.append(ROWS)
    for records, rows in ((3, 5), (2, 3)):
        assert journal.cut_to(records) == rows
    assert [batch.num_rows for batch in journal.rows()] == [3]
    journal.close()


# sources


@pytest.mark.parametrize("names", [["a", 1], ["a", None], ["a", ["b"]], ["a", "\ud800"]])
def test_parquet_class_names_that_are_no_text_are_refused(tmp_path, names):
    path = write_parquet(tmp_path / "x.parquet", [("x.jpg", grey_image(0), 0)], names=names)
    with pytest.raises(SourceError, match=r"class 1 is named .*expected text"):
        open_source(path)
