import contextlib
import pickle
import random
import struct
from functools import partial

import msgpack
import pyarrow as pa
import pytest
from classic_databases import PA_ERAS, PACKINGS, RunsACommand, pa_serialize

from dali_lmdb.store.payload import (
    PayloadError,
    bytes_at,
    decode_keys,
    decode_length,
    locate_payload,
)

IMAGE = bytes(range(256)) * 3 + b"\xff\xd9"
LABEL = 731

packings = pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS)
eras = pytest.mark.parametrize("era", PA_ERAS)


def decode_payload(view):
    """Image bytes and label of a record's value."""
    image, label = locate_payload(view)
    return bytes_at(view, image), label


@packings
def test_image_and_label_come_back(pack):
    image, label = decode_payload(memoryview(pack((IMAGE, LABEL))))
    assert (bytes(image), label) == (IMAGE, LABEL)


@packings
@pytest.mark.parametrize("size", [0, 1, 255, 256, 65_535, 65_536, 70_001])
def test_images_of_any_length_come_back(pack, size):
    image, label = decode_payload(memoryview(pack((b"\xab" * size, 0))))
    assert (bytes(image), label) == (b"\xab" * size, 0)


@packings
@pytest.mark.parametrize("label", [0, 1, 127, 128, 255, 256, 65_535, 65_536, 2**31 - 1])
def test_labels_of_any_size_come_back(pack, label):
    assert decode_payload(memoryview(pack((IMAGE, label))))[1] == label


@packings
def test_the_image_is_a_slice_of_the_value_unless_it_is_kept_as_text(pack):
    value = memoryview(pack((IMAGE, LABEL)))
    image, _ = locate_payload(value)
    if not image.is_text:
        assert value[image.start : image.stop] == IMAGE
    assert image.is_text == (pack is PACKINGS["pickle-2"])


@packings
def test_a_value_that_is_not_aligned_is_read_too(pack):
    value = pack((IMAGE, LABEL))
    for shift in range(1, 8):
        image, label = decode_payload(memoryview(bytes(shift) + value)[shift:])
        assert (bytes(image), label) == (IMAGE, LABEL)


@packings
@pytest.mark.parametrize("keys", [[], [b"0"], [b"%d" % index for index in range(1000)], [b"x/y.jpg", b"\xff"]])
def test_keys_come_back(pack, keys):
    if not keys and pack in [PACKINGS[f"pa-{era}"] for era in PA_ERAS]:
        pytest.skip("the test's own packing makes no empty union")
    assert decode_keys(memoryview(pack(keys)), max_keys=len(keys)) == keys


@packings
@pytest.mark.parametrize("length", [0, 1, 200, 70_000, 1_281_167])
def test_a_length_comes_back(pack, length):
    assert decode_length(memoryview(pack(length))) == length


def test_keys_may_be_text():
    for pack in (PACKINGS["msgpack"], PACKINGS["pickle-4"], PACKINGS["pa-0.15"], PACKINGS["pa-1.0"]):
        assert decode_keys(memoryview(pack(["0", "1"])), max_keys=2) == [b"0", b"1"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("place", ["image", "label", "all", "length"])
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path, protocol, place):
    marker = tmp_path / "was-run"
    bomb = RunsACommand(marker)
    value = {"image": (bomb, 1), "label": (IMAGE, bomb), "all": bomb, "length": bomb}[place]
    data = pickle.dumps(value, protocol=protocol)
    decode = decode_length if place == "length" else decode_payload
    with pytest.raises(PayloadError, match=r"refused: a pickle that calls posix\.system; only integers"):
        decode(memoryview(data))
    assert not marker.exists()
    pickle.loads(data)  # it does run a command where it is let
    assert marker.exists()


ENCODE = b"c_codecs\nencode\n"
TEXT = b"X\x03\x00\x00\x00abc"
SNEAKY = {
    "another name of _codecs": b"c_codecs\ndecode\n" + TEXT + b"X\x06\x00\x00\x00latin1\x86R",
    "a name that begins the same": b"c_codecs\nencodes\n" + TEXT + b"X\x06\x00\x00\x00latin1\x86R",
    "another encoding": ENCODE + TEXT + b"X\x05\x00\x00\x00rot13\x86R",
    "a call of text": TEXT + TEXT + b"X\x06\x00\x00\x00latin1\x86R",
    "a call with one argument": ENCODE + TEXT + b"\x85R",
    "a call with a number": ENCODE + b"K\x01K\x02\x86R",
    "a call without arguments": ENCODE + b"K\x01R",
    "bytes of a number": b"c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R",
    "another builtin": b"c__builtin__\neval\n" + TEXT + b"\x85R",
    "the function itself as image": ENCODE,
    "a dict": b"}",
    "a set": b"\x8f",
    "a float": b"G?\xf0\x00\x00\x00\x00\x00\x00",
    "None": b"N",
    "True": b"\x88",
    "INST": b"(ios\nsystem\n",
    "OBJ": b"(" + ENCODE + b"o",
    "NEWOBJ": ENCODE + b")\x81",
    "BUILD": ENCODE + b"}b",
    "EXT1": b"\x82\x01",
    "PERSID": b"Pname\n",
    "BINPERSID": b"K\x01Q",
    "NEXT_BUFFER": b"\x97",
    "STACK_GLOBAL of numbers": b"K\x01K\x02\x93",
    "POP of nothing": b"0",
    "an empty stack": b"a",
    "a list in itself": b"]q\x01h\x01a",
    "a list of lists": b"](]]e",
    "an unknown memo": b"h\x07",
    "a memo of 4 billion": b"K\x01r\xff\xff\xff\xff0j\xfe\xff\xff\xff",
    "a length past the end": b"B\xff\xff\xff\x7fabc",
    "a length of 2^63": b"\x8e" + b"\xff" * 7 + b"\x7fabc",
    "a tuple of too many": b"\x87",
    "APPENDS without a mark": b"]K\x01e",
    "APPENDS to a number": b"K\x01(K\x01e",
}


@pytest.mark.parametrize("instructions", SNEAKY.values(), ids=SNEAKY)
def test_a_pickle_of_anything_else_is_refused(instructions):
    value = b"\x80\x02" + instructions + b"K\x01\x86."
    with pytest.raises(PayloadError, match=r"refused|damaged|holds|its label"):
        decode_payload(memoryview(value))


@pytest.mark.parametrize("protocol", [0, 1])
def test_the_text_pickles_of_protocol_0_and_1_are_not_mistaken_for_something_else(protocol):
    with pytest.raises(PayloadError):
        decode_payload(memoryview(pickle.dumps((IMAGE, LABEL), protocol=protocol)))


@packings
@pytest.mark.parametrize(
    "value", [(IMAGE, -1), (IMAGE,), (IMAGE, 1, 2), (1, IMAGE), (1, 2), (IMAGE, IMAGE), 7, IMAGE]
)
def test_what_is_not_image_and_label_is_refused(pack, value):
    # "damaged": Arrow believes the wrong type codes of 0.9 to 0.12 and finds two labels where one image is.
    with pytest.raises(PayloadError, match=r"expected|damaged pa\.serialize"):
        decode_payload(memoryview(pack(value)))


@pytest.mark.parametrize("pack", [PACKINGS["pickle-4"], PACKINGS["msgpack"], PACKINGS["pa-1.0"]])
def test_a_label_that_does_not_fit_the_index_is_refused(pack):
    with pytest.raises(PayloadError, match=f"its label is {2**31}, expected 0 to"):
        decode_payload(memoryview(pack((IMAGE, 2**31))))


@eras
def test_a_payload_with_tensors_is_refused(era):
    value = pa_serialize((IMAGE, LABEL), era)
    with pytest.raises(PayloadError):
        decode_payload(memoryview(struct.pack("<I", 1) + value[4:]))


@pytest.mark.parametrize("era", ["0.15", "1.0"])
def test_the_message_says_that_tensors_are_the_reason(era):
    value = pa_serialize((IMAGE, LABEL), era)
    with pytest.raises(PayloadError, match="tensors or buffers"):
        decode_payload(memoryview(struct.pack("<I", 1) + value[4:]))


def stream(column, *, prefix=16, metadata=None):
    sink = pa.BufferOutputStream()
    schema = pa.schema([pa.field("list", column.type, metadata=metadata)])
    with pa.ipc.new_stream(sink, schema) as out:
        out.write_batch(pa.RecordBatch.from_arrays([column], schema=schema))
    return memoryview(bytes(prefix) + sink.getvalue().to_pybytes())


def test_an_arrow_stream_of_something_else_is_refused():
    for column in (pa.array([1]), pa.array([b"x"]), pa.array([[1, 2]]), pa.array([{"a": 1}]), pa.nulls(1)):
        with pytest.raises(PayloadError, match="in place of a dense union"):
            decode_payload(stream(column))


def test_an_extension_type_in_an_arrow_stream_runs_nothing(tmp_path):
    # pyarrow before 14.0.1 unpickled this (CVE-2023-47248).
    marker = tmp_path / "was-run"
    bomb = pickle.dumps(RunsACommand(marker))
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": bomb}
    with pytest.raises(PayloadError):
        decode_payload(stream(pa.array([1]), metadata=metadata))
    assert not marker.exists()


@pytest.mark.parametrize(
    "value", [b"", b"\x00", b"\x80", b"\x80\x04", bytes(8), bytes(24), bytes(500), b"\xc1" * 40]
)
def test_a_value_of_no_format_is_refused(value):
    with pytest.raises(PayloadError):
        decode_payload(memoryview(value))


@pytest.mark.parametrize("value", [{"a": 1}, [IMAGE, [1]], None, 1.5, [IMAGE, True]])
def test_other_values_of_msgpack_are_refused(value):
    with pytest.raises(PayloadError, match=r"not pickle, msgpack or pa\.serialize|expected"):
        decode_payload(memoryview(msgpack.packb(value)))


@pytest.mark.parametrize("pack", [pack for name, pack in PACKINGS.items() if not name.startswith("pa-")])
def test_bytes_after_the_value_are_not_passed_over(pack):
    with pytest.raises(PayloadError, match="3 bytes after its end"):
        decode_payload(memoryview(pack((IMAGE, LABEL)) + b"abc"))


def test_none_in_an_arrow_stream_is_refused():
    def union(places, child, number):
        zeros = pa.array([0] * len(places), pa.int8())
        return pa.UnionArray.from_dense(zeros, pa.array(places, pa.int32()), [child], [number], [0])

    images = union([0, 1], pa.array([b"x", None], pa.binary()), "4")
    with pytest.raises(PayloadError, match="holds None"):
        decode_payload(stream(union([0], pa.ListArray.from_arrays([0, 2], images), "12")))


def test_an_empty_list_in_an_arrow_stream_is_no_record():
    empty = pa.UnionArray.from_dense(
        pa.array([], pa.int8()), pa.array([], pa.int32()), [pa.array([b"x"])], ["4"], [0]
    )
    value = stream(
        pa.UnionArray.from_dense(
            pa.array([0], pa.int8()),
            pa.array([0], pa.int32()),
            [pa.ListArray.from_arrays([0, 0], empty)],
            ["12"],
            [0],
        )
    )
    with pytest.raises(PayloadError, match="a list of 0 values"):
        decode_payload(value)


@packings
def test_a_value_cut_short_anywhere_is_refused_or_says_so(pack):
    value = pack((IMAGE[:60], LABEL))
    for stop in range(len(value)):
        try:
            image, label = decode_payload(memoryview(value[:stop]))
        except PayloadError:
            pass
        else:  # pa.serialize ends with padding and an end mark that nothing needs
            assert pack in [PACKINGS[f"pa-{era}"] for era in PA_ERAS]
            assert (bytes(image), label) == (IMAGE[:60], LABEL)


@packings
def test_flipped_bits_never_raise_anything_else(pack):
    value = pack((IMAGE[:40], LABEL))
    keys = pack([b"%d" % index for index in range(12)])
    decode_all_keys = partial(decode_keys, max_keys=12)
    chance = random.Random(7)
    for _ in range(400):
        for data, decode in ((value, decode_payload), (keys, decode_all_keys), (pack(12), decode_length)):
            flipped = bytearray(data)
            for _ in range(chance.choice([1, 1, 2, 8])):
                flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
            with contextlib.suppress(PayloadError):
                decode(memoryview(bytes(flipped)))
