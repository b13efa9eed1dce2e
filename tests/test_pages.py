import shutil
import struct

import lmdb
import numpy as np
import pytest

from dali_lmdb.errors import StoreDamagedError, StoreError, StoreFormatError, StoreNotFoundError
from dali_lmdb.store.pages import PageFile

PAGE = 4096


def write(path, *transactions):
    """An LMDB file from transactions, each a list of (key, value); a value of None deletes."""
    with lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 28, sync=False) as env:
        for changes in transactions:
            with env.begin(write=True) as transaction:
                for key, value in changes:
                    if value is None:
                        transaction.delete(key)
                    else:
                        transaction.put(key, value)
    return path


def contents(path):
    """What py-lmdb itself reads."""
    with (
        lmdb.open(str(path), subdir=False, lock=False, readonly=True) as env,
        env.begin() as transaction,
    ):
        return dict(transaction.cursor())


def key_of(record):
    return record.to_bytes(8, "big")


def values(seed, sizes):
    random = np.random.default_rng(seed)
    return [random.bytes(int(size)) for size in sizes]


def pairs(seed, sizes, start=0):
    return [(key_of(start + i), value) for i, value in enumerate(values(seed, sizes))]


def random_keys(seed, count, longest):
    random = np.random.default_rng(seed)
    return list({random.bytes(int(random.integers(1, longest + 1))) for _ in range(count)})


def shape_of(name):
    random = np.random.default_rng(1)
    return {
        "one empty value": [[(b"k", b"")]],
        "one tiny value": [[(b"k", b"v")]],
        "one value of a megabyte": [pairs(0, [1 << 20])],
        "inline values only": [pairs(0, [5] * 600)],
        "empty values only": [pairs(0, [0] * 500)],
        "sizes around the overflow limit": [pairs(0, range(1990, 2060))],
        "sizes around whole pages": [pairs(0, [n * PAGE - 16 + d for n in (1, 2, 3) for d in range(-2, 3)])],
        "small and big mixed": [pairs(0, random.integers(0, 9000, 400))],
        "20,000 keys": [pairs(0, [3] * 20_000)],
        "long keys, a deep tree": [[(key, b"x") for key in random_keys(2, 3_000, 511)]],
        "keys that are prefixes of each other": [[(b"a" * n, b"%d" % n) for n in range(1, 300)]],
        "many transactions": [pairs(n, [700] * 20, start=20 * n) for n in range(40)],
        "values replaced by larger and smaller ones": [
            pairs(0, [3000] * 50),
            pairs(1, [20_000] * 50),
            pairs(2, [10] * 50),
        ],
        "every second key deleted": [
            pairs(0, random.integers(0, 5000, 300)),
            [(key_of(n), None) for n in range(0, 300, 2)],
        ],
        "all keys deleted": [pairs(0, [100] * 300), [(key_of(n), None) for n in range(300)]],
        "records before other keys": [pairs(0, [4000] * 30), [(b"__index__", b"i" * 9000), (b"__meta__", b"{}")]],
    }[name]


SHAPES = [
    "one empty value",
    "one tiny value",
    "one value of a megabyte",
    "inline values only",
    "empty values only",
    "sizes around the overflow limit",
    "sizes around whole pages",
    "small and big mixed",
    "20,000 keys",
    "long keys, a deep tree",
    "keys that are prefixes of each other",
    "many transactions",
    "values replaced by larger and smaller ones",
    "every second key deleted",
    "all keys deleted",
    "records before other keys",
]


def assert_same_answers(path):
    expected = contents(path)
    pages = PageFile(path)
    assert pages.entries == len(expected)
    for key, value in expected.items():
        extent = pages.find(key)
        assert extent is not None, key
        assert bytes(pages.view(extent)) == value
    for key in list(expected)[:200]:
        for absent in (key + b"\0", key[:-1], key[:-1] + bytes([key[-1] ^ 1])):
            if absent and absent not in expected:
                assert pages.find(absent) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_find_answers_as_lmdb_does(tmp_path, shape):
    assert_same_answers(write(tmp_path / "x.lmdb", *shape_of(shape)))


@pytest.mark.parametrize("seed", range(10))
def test_find_answers_as_lmdb_does_after_random_transactions(tmp_path, seed):
    random = np.random.default_rng(seed)
    keys = random_keys(seed, 400, int(random.integers(2, 200)))
    transactions = []
    for _ in range(random.integers(1, 12)):
        chosen = [keys[i] for i in random.integers(0, len(keys), random.integers(1, 300))]
        largest = int(random.choice([8, 300, 2500, 30_000]))
        transactions.append(
            [(key, None if random.random() < 0.3 else random.bytes(random.integers(0, largest))) for key in chosen]
        )
    assert_same_answers(write(tmp_path / "x.lmdb", *transactions))


def test_find_answers_as_lmdb_does_in_a_compacted_copy(tmp_path):
    path = write(tmp_path / "x.lmdb", *shape_of("every second key deleted"))
    with lmdb.open(str(path), subdir=False, lock=False) as env, open(tmp_path / "y.lmdb", "wb") as copy:
        env.copyfd(copy.fileno(), compact=True)
    assert_same_answers(tmp_path / "y.lmdb")


def test_an_lmdb_file_without_keys_has_none(tmp_path):
    pages = PageFile(write(tmp_path / "x.lmdb", []))
    assert pages.entries == 0
    assert pages.find(b"k") is None
    assert pages.leaf_of(b"x") == (0, 0)
    offsets, lengths = pages.record_extents(0, 0)
    assert len(offsets) == len(lengths) == 0


SIZES = {
    "tiny": [3] * 2_000,
    "empty": [0] * 700,
    "big": [9_000] * 60,
    "mixed": np.random.default_rng(3).integers(0, 9_000, 500),
    "around the overflow limit": range(1_990, 2_060),
    "one": [7],
}


@pytest.mark.parametrize("sizes", SIZES)
def test_record_extents_are_where_the_values_lie(tmp_path, sizes):
    records = pairs(0, SIZES[sizes])
    path = write(tmp_path / "x.lmdb", records, [(b"__index__", b"i" * 5000), (b"__meta__", b"m")])
    pages = PageFile(path)
    offsets, lengths = pages.record_extents(0, len(records))
    raw = path.read_bytes()
    assert offsets.dtype == np.uint64
    assert lengths.dtype == np.uint32
    for (_, value), offset, length in zip(records, offsets.tolist(), lengths.tolist(), strict=True):
        assert raw[offset : offset + length] == value


@pytest.mark.parametrize("sizes", SIZES)
def test_record_extents_of_some_records_are_a_part_of_all(tmp_path, sizes):
    count = len(SIZES[sizes])
    pages = PageFile(write(tmp_path / "x.lmdb", pairs(0, SIZES[sizes]), [(b"__meta__", b"m")]))
    offsets, lengths = pages.record_extents(0, count)
    for start in range(0, count, max(1, count // 7)):
        for stop in (start, start + 1, (start + count + 1) // 2, count):
            some_offsets, some_lengths = pages.record_extents(start, stop)
            assert np.array_equal(some_offsets, offsets[start:stop])
            assert np.array_equal(some_lengths, lengths[start:stop])


def test_a_tree_that_leads_in_circles_is_damage(tmp_path):
    path = write(tmp_path / "x.lmdb", pairs(0, [500] * 3_000))
    raw, pages = bytearray(path.read_bytes()), PageFile(path)
    (root,) = struct.unpack_from("<Q", raw, pages.page_size * (pages.txnid % 2) + 128)
    base = root * pages.page_size
    assert raw[base + 10] & 1  # a branch page
    (pointer,) = struct.unpack_from("<H", raw, base + 16)
    struct.pack_into("<Q", raw, base + pointer, root)  # the page number takes six bytes
    path.write_bytes(raw)
    with pytest.raises(StoreDamagedError, match=r"deeper than LMDB makes|more tree pages"):
        PageFile(path).record_extents(0, 3_000)


@pytest.mark.parametrize("missing", [0, 77, 299])
def test_a_missing_record_is_damage(tmp_path, missing):
    path = write(tmp_path / "x.lmdb", pairs(0, [50] * 300), [(key_of(missing), None)])
    with pytest.raises(StoreDamagedError, match=rf"{missing} records in order, expected 300"):
        PageFile(path).record_extents(0, 300)


def test_more_records_than_there_are_is_damage(tmp_path):
    path = write(tmp_path / "x.lmdb", pairs(0, [50] * 30), [(b"__meta__", b"m")])
    with pytest.raises(StoreDamagedError, match="30 records in order, expected 31"):
        PageFile(path).record_extents(0, 31)


def test_the_leaf_of_a_key_holds_it_and_its_neighbours(tmp_path):
    path = write(tmp_path / "x.lmdb", pairs(0, [50] * 3_000), [(b"__meta__", b"m")])
    pages = PageFile(path)
    offsets, _ = pages.record_extents(0, 3_000)
    for record in (0, 1, 1_700, 2_999):
        start, length = pages.leaf_of(key_of(record))
        inside = np.flatnonzero((offsets >= start) & (offsets < start + length))
        assert record in inside
        assert 10 < len(inside) < 100
        assert np.array_equal(inside, np.arange(inside[0], inside[-1] + 1))
    leaf = pages.leaf_of(b"__meta__")
    assert leaf.offset < pages.find(b"__meta__").offset < leaf.offset + leaf.length


def test_values_outlive_the_file_object_and_the_file(tmp_path):
    path = write(tmp_path / "x.lmdb", pairs(0, [9_000]))
    pages = PageFile(path)
    expected = values(0, [9_000])[0]
    extent = pages.find(key_of(0))
    data = pages.data[extent.offset : extent.offset + extent.length]
    path.unlink()
    del pages
    assert data.tobytes() == expected
    assert not data.flags.writeable


def use(path):
    """Everything a reader asks of a file; touches every byte it is told about."""
    pages = PageFile(path)
    for key in (key_of(0), key_of(123), key_of(10**6), b"__index__", b"__meta__", b"nothing"):
        extent = pages.find(key)
        if extent is not None:
            assert len(bytes(pages.view(extent))) == extent.length
    pages.leaf_of(key_of(NUM_FUZZED // 2))
    offsets, lengths = pages.record_extents(0, NUM_FUZZED)
    for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
        assert len(pages.data[offset : offset + length]) == length
    return True


NUM_FUZZED = 700


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A file with branch, leaf and overflow pages, and the numbers of the pages that are not values."""
    sizes = np.random.default_rng(5).integers(0, 600, NUM_FUZZED)
    sizes[::50] = 6_000
    path = write(tmp_path_factory.mktemp("fuzz") / "x.lmdb", pairs(0, sizes), [(b"__meta__", b"m" * 5000)])
    assert use(path)
    raw = path.read_bytes()
    flags = [int.from_bytes(raw[at + 10 : at + 12], "little") for at in range(0, len(raw), PAGE)]
    structural = [number for number, flag in enumerate(flags) if flag & 0x0F in (1, 2, 4, 8)]
    assert {flag & 0x0F for flag in flags} >= {1, 2, 4, 8}
    return raw, structural


def survives(path, raw):
    path.write_bytes(raw)
    try:
        return use(path)
    except StoreError as error:
        message = str(error)
    assert "\n" not in message
    assert str(path) in message
    return False


@pytest.mark.parametrize("seed", range(4))
def test_damaged_structure_gives_a_result_or_a_store_error(tmp_path, fuzzed, seed):
    raw, structural = fuzzed
    random = np.random.default_rng(seed)
    refused = 0
    for _ in range(150):
        damaged = bytearray(raw)
        for _ in range(random.integers(1, 6)):
            page = int(random.choice(structural))
            # Page headers and node pointers are the dense part; nodes lie at the page's end.
            inside = int(random.integers(0, 64) if random.random() < 0.6 else random.integers(0, PAGE))
            damaged[page * PAGE + inside] = int(random.choice([0, 255, random.integers(256)]))
        refused += not survives(tmp_path / "x.lmdb", bytes(damaged))
    assert refused > 10  # the fuzz really hits structure


@pytest.mark.parametrize("word", [0, 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_damaged_meta_pages_give_a_result_or_a_store_error(tmp_path, fuzzed, word):
    raw, _ = fuzzed
    for field in range(0, 152, 4):
        damaged = bytearray(raw)
        for meta in (0, PAGE):
            damaged[meta + field : meta + field + 4] = word.to_bytes(4, "little")
        survives(tmp_path / "x.lmdb", bytes(damaged))


def spoilt(path, key, where, value):
    """The file with some bytes of a record's node (``"node"``) or of its overflow page (``"page"``) changed."""
    raw = bytearray(path.read_bytes())
    node = raw.index(len(key).to_bytes(2, "little") + key) - 6
    if where[0] == "page":
        number = int.from_bytes(raw[node + 8 + len(key) : node + 16 + len(key)], "little")
        at = number * PAGE + where[1]
    else:
        at = node + where[1]
    raw[at : at + len(value)] = value
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("size", "where", "value"),
    [
        (9_000, ("page", 0), b"\xff\xff"),  # another page's number
        (9_000, ("page", 10), b"\x02\0"),  # a leaf's flags
        (9_000, ("page", 12), b"\x01\0\0\0"),  # fewer pages than the value needs
        (9_000, ("node", 0), b"\xff\xff\xff\x7f"),  # a length of 2 GB
        (9_000, ("node", 8 + 8), b"\xff" * 8),  # a page outside the file
        (9_000, ("node", 4), b"\x02\0"),  # a sub-database
        (100, ("node", 0), b"\xff\xff\0\0"),  # a length beyond the page
        (100, ("node", 0), b"\xff\x0f\0\0"),
        (100, ("node", 4), b"\x01\0"),  # a small value said to lie elsewhere
        (100, ("node", 6), b"\xff\xff"),  # a key beyond the page
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_damage(tmp_path, size, where, value):
    path = write(tmp_path / "x.lmdb", pairs(0, [size] * 5))
    assert PageFile(path).find(key_of(3)).length == size
    spoilt(path, key_of(3), where, value)
    with pytest.raises(StoreDamagedError, match="damaged: page"):
        PageFile(path).find(key_of(3))


@pytest.mark.parametrize(
    ("size", "where", "value"),
    [
        (9_000, ("node", 0), b"\xff\xff\xff\x7f"),
        (9_000, ("node", 8 + 8), b"\xff" * 8),
        (9_000, ("node", 4), b"\x02\0"),
        (100, ("node", 0), b"\xff\xff\0\0"),
        (100, ("node", 0), b"\xff\x0f\0\0"),
        (100, ("node", 4), b"\x01\0"),
    ],
    ids=str,
)
def test_a_record_outside_the_file_or_its_page_is_damage(tmp_path, size, where, value):
    path = write(tmp_path / "x.lmdb", pairs(0, [size] * 5))
    spoilt(path, key_of(3), where, value)
    with pytest.raises(StoreDamagedError, match="damaged: page"):
        PageFile(path).record_extents(0, 5)


def test_pages_that_point_in_a_circle_end_in_a_store_error(tmp_path, fuzzed):
    raw, _ = fuzzed
    damaged = bytearray(raw)
    newest = max((0, PAGE), key=lambda at: raw[at + 144])
    root = int.from_bytes(raw[newest + 128 : newest + 136], "little")
    assert raw[root * PAGE + 10] == 1  # a branch page
    lower = int.from_bytes(raw[root * PAGE + 12 : root * PAGE + 14], "little")
    for at in range(16, lower, 2):
        pointer = int.from_bytes(raw[root * PAGE + at : root * PAGE + at + 2], "little")
        damaged[root * PAGE + pointer : root * PAGE + pointer + 4] = root.to_bytes(4, "little")
    assert not survives(tmp_path / "x.lmdb", bytes(damaged))


def test_every_truncation_is_refused_when_opening(tmp_path, fuzzed):
    raw, _ = fuzzed
    path = tmp_path / "x.lmdb"
    lengths = {0, 1, 15, 16, 151, 152, PAGE - 1, PAGE, PAGE + 152, 2 * PAGE, len(raw) - PAGE, len(raw) - 1}
    for length in sorted(lengths | set(range(3, len(raw), len(raw) // 40))):
        path.write_bytes(raw[:length])
        with pytest.raises(StoreError):
            PageFile(path)


def test_a_file_with_one_damaged_meta_page_is_read_by_the_other(tmp_path):
    path = write(tmp_path / "x.lmdb", pairs(0, [50] * 10), pairs(1, [60] * 10))
    expected = contents(path)
    raw = bytearray(path.read_bytes())
    newest = max((0, PAGE), key=lambda at: raw[at + 144])
    raw[newest + 16 : newest + 20] = b"\0\0\0\0"
    path.write_bytes(raw)
    older = PageFile(path)
    assert older.txnid == 1
    assert bytes(older.view(older.find(key_of(3)))) == values(0, [50] * 10)[3] != expected[key_of(3)]


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"", StoreFormatError, "0 bytes"),
        (b"hello\n", StoreFormatError, "not an LMDB file"),
        (b"text " * 5000, StoreFormatError, "not an LMDB file"),
    ],
)
def test_other_files_are_refused(tmp_path, content, error, says):
    path = tmp_path / "x.lmdb"
    path.write_bytes(content)
    with pytest.raises(error, match=says):
        PageFile(path)


def test_folders_and_missing_files_are_refused(tmp_path):
    with pytest.raises(StoreFormatError, match="a folder"):
        PageFile(tmp_path)
    with pytest.raises(StoreNotFoundError, match=r"no store at .*nothing\.lmdb"):
        PageFile(tmp_path / "nothing.lmdb")
    with pytest.raises(StoreError):
        PageFile(tmp_path / ("x" * 300))


def test_a_newer_data_version_is_refused(tmp_path):
    path = write(tmp_path / "x.lmdb", pairs(0, [5]))
    raw = bytearray(path.read_bytes())
    for at in (20, PAGE + 20):
        raw[at] = 2
    path.write_bytes(raw)
    with pytest.raises(StoreFormatError, match="data version 1"):
        PageFile(path)


def test_a_file_that_grew_behind_its_last_page_is_read(tmp_path):
    path = write(tmp_path / "x.lmdb", pairs(0, [9000] * 3))
    shutil.copy(path, tmp_path / "y.lmdb")
    with open(tmp_path / "y.lmdb", "ab") as file:
        file.write(b"\xaa" * 10_000)
    assert_same = PageFile(tmp_path / "y.lmdb").record_extents(0, 3)
    assert np.array_equal(assert_same, PageFile(path).record_extents(0, 3))
