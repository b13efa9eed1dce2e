"""Damage what one parser reads; `python fuzz_parsers.py PARSER FOLDER CASES [FIRST]` prints the outcomes as JSON.

Each case is made from its number alone. It may end in a result or in one of the package's errors, within the
limits of ``bounds.py``. Where a checksum would hide the damage, it is computed again for most cases.
"""

import contextlib
import io
import json
import struct
import sys
import tarfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from classic_databases import PACKINGS, make_classic
from damage import grey_image, noise_image, write_store
from fuzz_store import contents
from fuzzing import check_message, damaged, run
from odd_kinds import AGREED, COLOR, DIFFERING, GREY, saved
from packing import write_parquet

from dali_lmdb.convert._journal import Journal, Row, batch_of
from dali_lmdb.convert.sources import open_source
from dali_lmdb.errors import DaliLmdbError
from dali_lmdb.images.agreement import dali_agrees
from dali_lmdb.images.header import read_header
from dali_lmdb.inspect import info, verify
from dali_lmdb.plan.sampling import sampling_of
from dali_lmdb.store import layout, open_store
from dali_lmdb.store.meta import Meta
from dali_lmdb.store.pages import PageFile
from dali_lmdb.store.payload import PayloadError, bytes_at, decode_keys, decode_length, locate_payload

# images


def headers(folder):
    images = [
        saved(COLOR, "JPEG"),
        saved(COLOR, "JPEG", progressive=True),
        saved(GREY, "JPEG", progressive=True, restart_marker_blocks=1),
        saved(COLOR.convert("CMYK"), "JPEG", exif=b"Exif\0\0" + bytes(100)),
        *AGREED.values(),
        *(image for image, _ in DIFFERING.values()),
    ]
    markers = [
        bytes([0xFF, marker]) for marker in (0xC0, 0xC2, 0xC3, 0xC4, 0xC9, 0xCA, 0xD0, 0xD8, 0xD9, 0xDA, 0xFE)
    ]
    tokens = [
        *markers,
        *(image[:12] for image in images),
        b"tRNS",
        b"iCCP",
        b"zTXt",
        b"acTL",
        b"VP8X",
        b"ftypavif",
    ]

    def make(rng):
        image = damaged(rng.choice(images), rng, tokens=tokens)
        return with_png_checksums(image) if rng.random() < 0.8 else image

    def use(image):
        dali_agrees(image)
        read_header(image)

    return make, use


def with_png_checksums(image):
    """A PNG whose chunks, as far as they can be found, have right checksums; anything else as it is."""
    if not image.startswith(b"\x89PNG\r\n\x1a\n"):
        return image
    image, at = bytearray(image), 8
    while at + 12 <= len(image):
        end = at + 8 + int.from_bytes(image[at : at + 4], "big")
        image[end : end + 4] = zlib.crc32(image[at + 4 : end]).to_bytes(4, "big") if end + 4 <= len(image) else b""
        at = end + 4
    return bytes(image)


# LMDB files


def pages(folder):
    path = write_store(
        folder / "x.lmdb", [grey_image(record % 20) if record % 9 else b"x" for record in range(300)]
    )
    whole = path.read_bytes()
    page_size = PageFile(path).page_size
    tree = [at for at in range(0, len(whole), page_size) if whole[at + 10] & 0x0B]

    def make(rng):
        if rng.random() < 0.1:
            return damaged(whole, rng)
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8))):
            at = rng.choice(tree)
            data[at : at + page_size] = damaged(data[at : at + page_size], rng).ljust(page_size, b"\0")[:page_size]
        return bytes(data)

    return make, partial(in_file, folder, use_pages)


def use_pages(path):
    file = PageFile(path)
    for key in (layout.record_key(0), layout.record_key(200), b"__index__", b"__meta__", b"nothing", b""):
        extent = file.find(key)
        if extent is not None:
            assert len(file.view(extent)) == extent.length
        file.leaf_of(key)
    for use in (file.has_databases, file.describe, file.count_keys, partial(file.record_extents, 0, 300)):
        with contextlib.suppress(DaliLmdbError):
            use()
    for _, (offset, length) in file.items():
        assert offset + length <= len(file.data)


def in_file(folder, use, data):
    """Use a case as a file of its own: maps of earlier ones may still be alive."""
    in_file.number = getattr(in_file, "number", 0) + 1
    path = folder / f"case-{in_file.number}"
    path.write_bytes(data)
    try:
        use(path)
    finally:
        for file in folder.glob(path.name + "*"):
            file.unlink()


# values of classic databases


def payloads(folder):
    keys = [b"%d" % number for number in range(40)]
    values = [
        pack(value) for pack in PACKINGS.values() for value in ((noise_image(1)[:300], 7), keys, 40, (b"", 0))
    ]
    tokens = [b"]", b"(", b"\x94", b"h\0", b"q\0", b"e", b"a", b"R", b"\x93", b"c_codecs\nencode\n", b"\x8a\xff"]
    tokens += [b"\xdd\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\x80\x04\x95"]
    decoders = [decode_length, partial(decode_keys, max_keys=len(keys))]

    def use(value):
        view = memoryview(value)
        for decode in decoders:
            with contextlib.suppress(PayloadError):
                decode(view)
        located = locate_payload(view)
        assert len(bytes_at(view, located.image)) <= len(value)

    return lambda rng: damaged(rng.choice(values), rng, tokens=tokens), use


def classic(folder):
    databases = []
    for name, pack in PACKINGS.items():
        path = make_classic(folder / "x", [(grey_image(record), record % 3) for record in range(12)], pack=pack)
        databases.append((name, path.read_bytes()))
        path.unlink()

    def use(path):
        with open_store(path) as store:
            store.labels, store.fingerprint, store.classes, info(path)
            for record in range(len(store)):
                store.name(record), store.read(record), store.copy(record)

    return lambda rng: damaged(rng.choice(databases)[1], rng), partial(in_file, folder, use)


# stores


def meta(folder):
    whole = json.loads(open_meta(write_store(folder / "x.lmdb", [grey_image(0)] * 3))[2])
    whole["shard"] = {"index": 0, "count": 2, "set": "x" * 32}

    def make(rng):
        if rng.random() < 0.2:
            return damaged(json.dumps(whole).encode(), rng)
        return with_checksum(changed_json(whole, rng))

    return make, lambda raw: Meta.from_bytes(raw, path="x").pieces()


def open_meta(path):
    """(bytes of a store, offset, value) of its metadata."""
    offset, length = PageFile(path).find(layout.META_KEY)
    data = path.read_bytes()
    return data, offset, data[offset : offset + length]


def with_checksum(values):
    """JSON of metadata; of an object, with its checksum."""
    if not isinstance(values, dict):
        return json.dumps(values).encode()
    values.pop("crc32", None)
    return json.dumps({**values, "crc32": zlib.crc32(json.dumps(values).encode())}).encode()


_WILD = (
    0,
    -1,
    1,
    10**9,
    1 << 63,
    10**30,
    1.5,
    float("nan"),
    True,
    None,
    "",
    "x",
    "\ud800",
    "x" * 1000,
    [],
    {},
    [[]],
)


def changed_json(value, rng):
    """A copy of a JSON value with another one at some place."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        copy = value.copy()
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        copy[key] = changed_json(value[key], rng)
        if rng.random() < 0.1:
            copy.pop(key)
        return copy
    return rng.choice(_WILD)


def stores(folder):
    """Stores of one piece, whose checksums are right although index, names or metadata changed."""
    path = write_store(folder / "x.lmdb", [grey_image(record) for record in range(12)], made={"room": "x" * 1000})
    whole, meta_at, raw = open_meta(path)
    values = json.loads(raw)
    parts = {}
    for name, key in (("index", layout.index_key(0)), ("names", layout.names_key(0))):
        offset, length = PageFile(path).find(key)
        parts[name] = slice(offset, offset + length)

    def make(rng):
        data, changed = bytearray(whole), json.loads(raw)
        changed["made"] = {}
        for name in rng.choice((["index"], ["names"], ["index", "names"], [])):
            part = data[parts[name]]
            data[parts[name]] = damaged(part, rng).ljust(len(part), b"\0")[: len(part)]
            changed[f"{name}_crc32"] = [zlib.crc32(data[parts[name]])]
        if rng.random() < 0.3:
            changed = changed_json(changed, rng)
        data[meta_at : meta_at + len(raw)] = with_checksum(changed).ljust(len(raw))[: len(raw)]
        return bytes(data)

    def use(path):
        for function in (info, partial(verify, num_threads=1)):
            with contextlib.suppress(DaliLmdbError):
                function(path)
        contents(path)

    assert values["num_records"] == 12
    return make, partial(in_file, folder, use)


def shards(folder):
    """Sets of two stores, each with wild metadata of its own."""
    path = write_store(folder / "x.lmdb", [grey_image(record) for record in range(3)], made={"room": "x" * 1000})
    whole, meta_at, raw = open_meta(path)
    path.unlink()

    def make(rng):
        files = []
        for index in range(2):
            values = json.loads(raw) | {"made": {}, "shard": {"index": index, "count": 2, "set": "x"}}
            if rng.random() < 0.7:
                values["shard"] = changed_json(values["shard"], rng)
            data = bytearray(whole)
            data[meta_at : meta_at + len(raw)] = with_checksum(values).ljust(len(raw))[: len(raw)]
            files.append(bytes(data))
        return files

    def use(files):
        for index, data in enumerate(files):
            (folder / f"x-{index:05}-of-00002.lmdb").write_bytes(data)
        for path in (folder, folder / "x.lmdb"):
            for function in (info, partial(verify, num_threads=1), contents):
                function(path)

    return make, use


# journals


def journals(folder):
    rows = [Row(f"c/{i}.jpg", 0, 1, 1, 10, 0, 1, 0, 0, None if i % 3 else "bad") for i in range(9)]
    journal = Journal(folder / "seed")
    journal.start({"kind": "folder", "settings": {}, "source": {"images": 9}, "shard": None})
    for part in (rows[:4], rows[4:8], rows[8:]):
        journal.append(batch_of(part))
    journal.cut_to(4)
    journal.append(batch_of(rows[6:]))
    journal.close()
    whole = (folder / "seed").read_bytes()
    payloads = list(split(whole))
    assert len(payloads) == 5

    def make(rng):
        if rng.random() < 0.1:
            return damaged(whole, rng)
        header, changed = payloads[0], payloads[1:]
        if rng.random() < 0.1:
            wild = json.dumps(changed_json(json.loads(header), rng)).encode()
            header = rng.choice((damaged(header, rng), wild, b"", b"[]", b"3"))
        for _ in range(rng.choice((1, 1, 2, 3))):
            at = rng.randrange(len(changed) + 1)
            change = rng.randrange(4)
            if change == 0:
                changed.insert(
                    at, rng.choice([*payloads, b"", b"{}", b'{"rows": 0}', b'{"rows": 9e9}', b"[" * 9999])
                )
            elif change == 1:
                del changed[at : at + 1]
            elif change == 2:
                rng.shuffle(changed)
            else:
                changed[at : at + 1] = [damaged(b"".join(changed[at : at + 1]), rng, tokens=[b'{"rows": -1}'])]
        frames = [header, *changed]
        return b"".join(struct.pack("<II", len(data), zlib.crc32(data)) + data for data in frames)

    def use(path):
        journal = Journal(path)
        try:
            if journal.header is not None:
                list(journal.rows())
                journal.cut_to(5)
                list(journal.rows())
        finally:
            journal.close()

    return make, partial(in_file, folder, use)


def split(journal):
    at = 0
    while at < len(journal):
        length, _ = struct.unpack_from("<II", journal, at)
        yield journal[at + 8 : at + 8 + length]
        at += 8 + length


# sources


def tars(folder):
    archives = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        long = "\u00fc" * (40 if format == tarfile.USTAR_FORMAT else 120)
        archives += [
            tar_of({f"{c}/{long if i == 1 else i}.jpg": grey_image(i) for c in "ab" for i in range(3)}, format),
            tar_of(
                {f"{i}.{e}": data for i in range(4) for e, data in (("jpg", grey_image(i)), ("cls", b"1"))}, format
            ),
            tar_of({f"n0144076{i}.tar": tar_of({f"{i}.jpg": grey_image(i)}, format) for i in range(3)}, format),
        ]
    types = [bytes([code]) for code in b"01235SLKxgXMND"]

    def make(rng):
        data = bytearray(
            damaged(rng.choice(archives), rng, tokens=[b"30 GNU.sparse.size=99999999999\n", b"27 path="])
        )
        headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
        for at in headers:
            if rng.random() < 0.1:
                data[at + 156 : at + 157] = rng.choice(types)
            if rng.random() < 0.05:
                data[at + 124 : at + 136] = rng.choice(
                    (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"0" * 12)
                )
            if rng.random() < 0.95:
                total = 256 + sum(data[at : at + 148]) + sum(data[at + 156 : at + 512])
                data[at + 148 : at + 156] = b"%06o\0 " % total
        return bytes(data)

    return make, partial(in_file, folder, use_source)


def tar_of(members, format):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def use_source(path, kinds=(None, "tar", "webdataset", "imagenet-tar")):
    errors = []
    for kind in kinds:
        try:
            source = open_source(path, kind=kind)
            source.identity(), list(source.left_out())
            for item in source.items():
                assert 0 <= item.label < len(source.classes)
                item.read()
        except DaliLmdbError as error:
            check_message(error)
            errors.append(error)
    if len(errors) == len(kinds):
        raise errors[0]


def parquet(folder):
    files = []
    for names in (None, ["a", "b"]):
        rows = [(f"{i}.jpg", grey_image(i), i % 2) for i in range(6)]
        files.append(write_parquet(folder / "x", rows, names=names, row_group_size=4).read_bytes())

    def make(rng):
        data = rng.choice(files)
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        if rng.random() < 0.6:  # in the footer, found by its length
            changed = damaged(data[footer:-8], rng)
            return data[:footer] + changed + len(changed).to_bytes(4, "little") + b"PAR1"
        return damaged(data[:footer], rng).ljust(footer, b"\0")[:footer] + data[footer:]

    return make, partial(in_file, folder, partial(use_source, kinds=("parquet",)))


def tables(folder):
    """Manifests, and labels of a flat folder."""
    (folder / "images").mkdir()
    names = [f"{number}.jpg" for number in range(5)]
    for number, name in enumerate(names):
        (folder / "images" / name).write_bytes(grey_image(number))
    labels = "".join(f"{name} c{number % 2}\n" for number, name in enumerate(names))
    texts = [
        "path,label\n" + "".join(f"images/{name},{i}\n" for i, name in enumerate(names)),
        labels,
        "0\n1\n" * 2 + "0\n",
    ]
    tokens = [
        b'"',
        b"\xef\xbb\xbf",
        b"\xff",
        b"../",
        b"\0",
        b"\t",
        b",",
        b"99999999999999999999",
        b"-1",
        b"x" * 200_000,
    ]

    def use(path):
        with contextlib.suppress(DaliLmdbError):
            source = open_source(folder / "images", val_labels=path)
            assert len(list(source.items())) == 5
            return
        use_source(path, kinds=("manifest",))

    return lambda rng: damaged(rng.choice(texts).encode(), rng, tokens=tokens), partial(in_file, folder, use)


def weights(folder):
    """Weights of any bits."""

    def make(rng):
        values = np.frombuffer(rng.randbytes(8 * rng.randrange(1, 20)), np.float64).copy()
        for position in range(len(values)):
            if rng.random() < 0.7:
                values[position] = rng.choice(
                    (0.0, 5e-324, 1e-310, 1e-300, 1.0, 3.0, 1e300, 1.7976931348623157e308)
                )
        return np.abs(values) if rng.random() < 0.9 else values

    def use(values):
        try:
            sampling = sampling_of(
                len(values), sampler=None, weights=values, seed=0, shuffle=None, default_shuffle="full"
            )
        except ValueError:
            assert not np.isfinite(values).all() or (values < 0).any() or not values.any()
            return
        for epoch in range(5):
            drawn = sampling.records(np.arange(len(values)), epoch=epoch)
            assert (values[drawn] > 0).all()

    return make, use


PARSERS = {
    parser.__name__: parser
    for parser in (
        headers,
        pages,
        payloads,
        classic,
        meta,
        stores,
        shards,
        journals,
        tars,
        parquet,
        tables,
        weights,
    )
}

if __name__ == "__main__":
    name, folder, cases, *first = sys.argv[1:]
    run(*PARSERS[name](Path(folder)), cases=int(cases), first=int(first[0]) if first else 0)
