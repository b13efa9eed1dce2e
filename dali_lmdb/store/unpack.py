"""Locate integers, bytes and text in a value packed by pickle, msgpack or ``pa.serialize``.

The folder2lmdb family of scripts used all three, and a database does not say which; the first bytes of a value
do. Nothing here builds an object from a file or calls anything that a file names: each reader walks the bytes,
accepts only integers, bytes, text, tuples and lists, and returns the *positions* of the bytes in the value, so
that an image is a slice of the memory map.

pickle, protocols 2 to 5
    A small stack machine for the opcodes those types need. Protocol 2 has no bytes and writes them as a call of
    ``_codecs.encode(text, "latin1")``, or of ``bytes()`` if they are empty: these two calls are recognised and
    evaluated here. Python's ``Unpickler`` is not used, since it calls what a file names and allocates as much
    memory as a file asks for.
msgpack
    One integer, or one array of integers, bin and str: https://github.com/msgpack/msgpack/blob/master/spec.md
pa.serialize
    Removed in pyarrow 12. A prefix of counts, then an Arrow IPC stream of one column and one row.

    ==============  ===========  ======================  =======================================================
    pyarrow         zero prefix  message framing         the value
    ==============  ===========  ======================  =======================================================
    0.9 to 0.11     8 bytes      length                  dense union of structs of a list of a dense union;
                                                         children have no names, type codes are positions
    0.12            16 bytes     length                  same
    0.13, 0.14      16 bytes     length                  dense union of a list of a dense union; children are
                                                         named by type
    0.15 to 0.17    16 bytes     FFFFFFFF, length        same
    1.0 to 11       16 bytes     FFFFFFFF, length        same, with a null child first
    ==============  ===========  ======================  =======================================================

    In 0.9 to 0.12 the type codes that the schema declares are wrong: the code in the buffer is the child's
    position, and looking it up in the schema swaps image and label.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple, Union

import pyarrow as pa

from dali_lmdb.store.encoding import ARROW_ERRORS, read_batch

__all__ = ["PayloadError", "Span", "Value", "unpack"]

_ADMITTED = "only integers, bytes, text, tuples and lists are read from a database"


class PayloadError(Exception):
    """A value that is invalid in a classic database, or refused; the message is the reason."""


class Span(NamedTuple):
    """A range of bytes inside a value."""

    start: int
    stop: int
    is_text: bool = False
    """The bytes are UTF-8 text in which each character represents one byte (``_codecs.encode``)."""


Value = Union[int, Span, "list[Value]"]


def unpack(view: memoryview, *, max_values: int = 16) -> Value:
    """Unpack a value, whose first bytes tell how it was packed.

    Args:
        max_values: refuse a longer list or tuple, before memory is allocated for it.

    Raises:
        PayloadError: anything but an integer, bytes, text, or one list or tuple of those.
    """
    head = bytes(view[:24])
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return _PickleReader(view, max_values).read()
    if len(head) > 16 and head[:8] == bytes(8):
        return _decode_arrow(view, max_values)
    if len(head) == 24 and head[16:20] == b"\xff\xff\xff\xff" and max(struct.unpack_from("<4I", head)) < 1 << 16:
        raise PayloadError("a pa.serialize payload with tensors or buffers, which is not supported")
    return _MsgpackReader(view, max_values).read()


class _Reader:
    """A cursor in a value that advances as fields are taken, never past the end."""

    format: str

    def __init__(self, view: memoryview, max_values: int) -> None:
        self.view, self.at, self.max_values = view, 0, max_values

    def take(self, field: struct.Struct) -> int:
        """Take the next integer."""
        if self.at + field.size > len(self.view):
            raise PayloadError(f"damaged {self.format}: it ends early")
        value: int = field.unpack_from(self.view, self.at)[0]
        self.at += field.size
        return value

    def span(self, length: int) -> Span:
        """Take the next ``length`` bytes."""
        start, stop = self.at, self.at + length
        if stop > len(self.view):
            raise PayloadError(f"damaged {self.format}: it ends early")
        self.at = stop
        return Span(start, stop)

    def end(self, value: Value) -> Value:
        """Return ``value`` if nothing follows it."""
        if self.at != len(self.view):
            raise PayloadError(f"damaged {self.format}: {len(self.view) - self.at} bytes after its end")
        return value


_U8, _U16, _U32, _U64 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<Q"))
_I32 = struct.Struct("<i")

# Opcodes of the standard library's pickletools, by their names there.
_PICKLE_SPANS = {
    ord("C"): _U8,  # SHORT_BINBYTES
    ord("B"): _U32,  # BINBYTES
    0x8E: _U64,  # BINBYTES8
    0x8C: _U8,  # SHORT_BINUNICODE
    ord("X"): _U32,  # BINUNICODE
    0x8D: _U64,  # BINUNICODE8
    ord("U"): _U8,  # SHORT_BINSTRING: bytes of Python 2
    ord("T"): _U32,  # BINSTRING
}
_PICKLE_INTS = {ord("K"): _U8, ord("M"): _U16, ord("J"): _I32}  # BININT1, BININT2, BININT
_PICKLE_TUPLES = {ord(")"): 0, 0x85: 1, 0x86: 2, 0x87: 3}  # EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3
_PICKLE_PUTS = {ord("q"): _U8, ord("r"): _U32}  # BINPUT, LONG_BINPUT
_PICKLE_GETS = {ord("h"): _U8, ord("j"): _U32}  # BINGET, LONG_BINGET
_PICKLE_SKIPPED = {0x80: _U8, 0x95: _U64}  # PROTO, FRAME
_MARK, _STOP, _GLOBAL, _REDUCE, _STACK_GLOBAL = ord("("), ord("."), ord("c"), ord("R"), 0x93
_TUPLE, _EMPTY_LIST, _APPEND, _APPENDS, _MEMOIZE, _LONG1 = ord("t"), ord("]"), ord("a"), ord("e"), 0x94, 0x8A
# How protocol 2 writes bytes (save_bytes in the standard library's pickle.py); on the stack, these represent the
# functions.
_ENCODE, _BYTES = b"_codecs\nencode\n", b"__builtin__\nbytes\n"
# Instructions, each of which adds at most one object; protocol 2 uses ten for one value of bytes.
_STEPS, _STEPS_PER_VALUE = 64, 12


class _PickleReader(_Reader):
    """The pickle stack machine for plain values, with spans in place of bytes and text."""

    format = "pickle"

    def __init__(self, view: memoryview, max_values: int) -> None:
        super().__init__(view, max_values)
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Value:
        try:
            for _ in range(_STEPS + _STEPS_PER_VALUE * self.max_values):
                code = self.take(_U8)
                if code == _STOP:
                    break
                self.step(code)
            else:
                raise PayloadError(f"a pickle of more than the {self.max_values} values expected at most")
            (value,) = self.stack
        except (IndexError, KeyError, ValueError, TypeError, AttributeError):
            raise PayloadError("damaged pickle: its instructions are invalid") from None
        if not _is_plain(value):
            raise PayloadError("damaged pickle: its instructions are invalid")
        return self.end(value)

    def step(self, code: int) -> None:
        """Execute one instruction."""
        if code in _PICKLE_SPANS:
            self.stack.append(self.span(self.take(_PICKLE_SPANS[code])))
        elif code in _PICKLE_INTS:
            self.stack.append(self.take(_PICKLE_INTS[code]))
        elif code in _PICKLE_PUTS:
            self.memo[self.take(_PICKLE_PUTS[code])] = self.stack[-1]
        elif code == _MEMOIZE:
            self.memo[len(self.memo)] = self.stack[-1]
        elif code in _PICKLE_GETS:
            self.stack.append(self.memo[self.take(_PICKLE_GETS[code])])
        elif code in _PICKLE_TUPLES:
            items = [self.stack.pop() for _ in range(_PICKLE_TUPLES[code])]
            self.stack.append(items[::-1])
        elif code in _PICKLE_SKIPPED:
            self.take(_PICKLE_SKIPPED[code])
        elif code == _REDUCE:
            self.call()
        elif code == _EMPTY_LIST:
            self.stack.append([])
        elif code == _LONG1:
            digits = self.span(self.take(_U8))
            self.stack.append(int.from_bytes(self.view[digits.start : digits.stop], "little", signed=True))
        else:
            self.step_marked(code)

    def step_marked(self, code: int) -> None:
        """Execute an instruction that marks the stack or takes what is above a mark, or refuse it."""
        if code == _MARK:
            self.marks.append(self.stack)
            self.stack = []
        elif code == _APPEND:
            item = self.stack.pop()
            self.stack[-1].append(item)
        elif code in (_APPENDS, _TUPLE):
            items, self.stack = self.stack, self.marks.pop()
            if code == _TUPLE:
                self.stack.append(items)
            else:
                self.stack[-1].extend(items)
        elif code == _GLOBAL:
            self.find_global()
        elif code == _STACK_GLOBAL:
            name, module = self.stack.pop(), self.stack.pop()
            self.refuse(b".".join(bytes(self.view[part.start : part.stop]) for part in (module, name)))
        else:
            raise PayloadError(f"refused: a pickle with instruction 0x{code:02x}; {_ADMITTED}")

    def find_global(self) -> None:
        """Accept the two functions with which protocol 2 writes bytes."""
        for name in (_ENCODE, _BYTES):
            if self.view[self.at : self.at + len(name)] == name:
                self.at += len(name)
                self.stack.append(name)
                return
        self.refuse(b".".join(bytes(self.view[self.at : self.at + 200]).split(b"\n")[:2]))

    def refuse(self, name: bytes) -> None:
        """Raise an error that names what a pickle would call."""
        shown = ascii(name[:60].decode("latin-1"))[1:-1]
        raise PayloadError(f"refused: a pickle that calls {shown}; {_ADMITTED}")

    def call(self) -> None:
        """Evaluate ``_codecs.encode(text, "latin1")`` or ``bytes()``."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if function == _BYTES and arguments == []:
            self.stack.append(Span(0, 0))
            return
        text, encoding = arguments
        if function != _ENCODE or bytes(self.view[encoding.start : encoding.stop]) != b"latin1":
            raise PayloadError(f"refused: a pickle with an unexpected call; {_ADMITTED}")
        self.stack.append(Span(text.start, text.stop, is_text=True))


def _check_count(count: int, max_values: int) -> None:
    if count > max_values:
        raise PayloadError(f"holds a list of {count} values, expected at most {max_values}")


def _is_plain(value: Any) -> bool:
    """Return whether a value is an integer, a span, or a list of those; deeper nesting is not supported."""
    if isinstance(value, list):
        return all(type(item) in (int, Span) for item in value)
    return type(value) in (int, Span)


_MSGPACK_SPANS = {  # bin 8, 16, 32; str 8, 16, 32
    code: struct.Struct(field)
    for code, field in zip((0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB), (">B", ">H", ">I") * 2, strict=True)
}
_MSGPACK_INTS = {  # uint 8 to 64, int 8 to 64
    code: struct.Struct(">" + letter) for code, letter in zip(range(0xCC, 0xD4), "BHIQbhiq", strict=True)
}
_MSGPACK_ARRAYS = {0xDC: struct.Struct(">H"), 0xDD: struct.Struct(">I")}


class _MsgpackReader(_Reader):
    """Reads msgpack's integers, bin, str, and one level of array."""

    format = "msgpack"

    def read(self) -> Value:
        code = self.take(_U8)
        if 0x90 <= code <= 0x9F:
            count = code & 0x0F
        elif code in _MSGPACK_ARRAYS:
            count = self.take(_MSGPACK_ARRAYS[code])
        else:
            return self.end(self.scalar(code))
        _check_count(count, self.max_values)
        values: list[Value] = []
        for _ in range(count):
            values.append(self.scalar(self.take(_U8)))
        return self.end(values)

    def scalar(self, code: int) -> int | Span:
        """The integer, bin or str that begins with ``code``."""
        if code <= 0x7F:
            return code
        if code >= 0xE0:
            return code - 0x100
        if 0xA0 <= code <= 0xBF:
            return self.span(code & 0x1F)
        if code in _MSGPACK_SPANS:
            return self.span(self.take(_MSGPACK_SPANS[code]))
        if code in _MSGPACK_INTS:
            return self.take(_MSGPACK_INTS[code])
        raise PayloadError(f"begins with 0x{self.view[0]:02x}: not pickle, msgpack or pa.serialize; {_ADMITTED}")


def _decode_arrow(view: memoryview, max_values: int) -> Value:
    """Decode a ``pa.serialize`` payload."""
    prefix = 16 if view[8:16] == bytes(8) else 8
    buffer = pa.py_buffer(view)
    if buffer.address % 8:
        buffer = pa.py_buffer(bytes(view))  # Arrow requires aligned messages; spans are the same in a copy
    try:
        batch = read_batch(buffer.slice(prefix), num_rows=1)
        if batch.num_columns != 1:
            raise PayloadError("not a pa.serialize payload: more than one value")
        (value,) = _ArrowWalk(buffer, max_values).values(batch.column(0), 0, 1, nested=True)
    except ARROW_ERRORS as error:
        reason = " ".join(str(error).split())[:120]
        raise PayloadError(f"damaged pa.serialize payload: {reason or type(error).__name__}") from None
    return value


class _ArrowWalk:
    """Walks a validated ``pa.serialize`` column and locates its bytes in ``buffer``."""

    def __init__(self, buffer: pa.Buffer, max_values: int) -> None:
        self.buffer, self.max_values = buffer, max_values

    def values(self, union: pa.Array, start: int, stop: int, *, nested: bool) -> list[Value]:
        """Values ``start`` to ``stop`` of a dense union; lists among them only if ``nested``."""
        if not isinstance(union, pa.UnionArray) or union.type.mode != "dense":
            raise PayloadError(f"not a pa.serialize payload: {union.type} in place of a dense union")
        _check_count(stop - start, self.max_values)
        if start == stop:  # the buffers of an empty array may be missing, at which pyarrow crashes
            return []
        codes = union.type_codes.to_numpy()[start:stop].tolist()
        places = union.offsets.to_numpy()[start:stop].tolist()
        if places and min(places) < 0:
            raise PayloadError("damaged pa.serialize payload: a negative offset")
        at: dict[int, list[int]] = {}
        for position, code in enumerate(codes):
            at.setdefault(code, []).append(position)
        values: list[Value] = [0] * len(codes)
        for code, positions in at.items():
            child = union.field(_child_position(union.type, code))
            found = self.children(child, [places[position] for position in positions], nested=nested)
            for position, value in zip(positions, found, strict=True):
                values[position] = value
        return values

    def children(self, child: pa.Array, places: list[int], *, nested: bool) -> list[Value]:
        """The values at ``places`` of one child of a union."""
        kind = child.type
        if child.null_count:
            raise PayloadError("holds None")
        if kind in (pa.binary(), pa.string()):
            return self.spans(child, places)
        if kind == pa.int64():
            return [child[place].as_py() for place in places]
        if pa.types.is_struct(kind) and kind.num_fields == 1:  # 0.9 to 0.12: {"tuple": [...]} or {"list": [...]}
            child = child.field(0)
        if nested and len(places) == 1 and isinstance(child, pa.ListArray) and not child.null_count:
            ends = child.offsets
            first, last = ends[places[0]].as_py(), ends[places[0] + 1].as_py()
            return [self.values(child.values, first, last, nested=False)]
        raise PayloadError(f"holds {kind}; {_ADMITTED}")

    def spans(self, child: pa.Array, places: list[int]) -> list[Value]:
        """Locate the bytes at ``places`` of a binary child."""
        _, offsets, data = child.buffers()
        if data is None or data.size == 0 or offsets is None:
            return [Span(0, 0) for _ in places]
        ends = memoryview(offsets).cast("i")[child.offset :]
        base = data.address - self.buffer.address
        if not 0 <= base <= base + data.size <= self.buffer.size:
            raise PayloadError("a compressed pa.serialize payload, which is not supported")
        return [Span(base + ends[place], base + ends[place + 1]) for place in places]


def _child_position(kind: pa.DataType, code: int) -> int:
    """Position of the child that a type code of a union refers to."""
    if all(not kind.field(position).name for position in range(kind.num_fields)):
        return code  # 0.9 to 0.12
    type_codes: list[int] = kind.type_codes
    return type_codes.index(code)
