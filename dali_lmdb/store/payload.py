"""Values in classic databases: ``(image, label)``, a length, a list of keys."""

from __future__ import annotations

from typing import NamedTuple

from dali_lmdb.store.unpack import PayloadError, Span, Value, unpack

__all__ = [
    "Located",
    "PayloadError",
    "Span",
    "bytes_at",
    "decode_keys",
    "decode_length",
    "locate_payload",
]

_MAX_LABEL = (1 << 31) - 1  # the index keeps labels as int32


class Located(NamedTuple):
    """The parts of a record's value."""

    image: Span
    label: int


def locate_payload(view: memoryview) -> Located:
    """Find image and label in a record's value, without reading the image's bytes.

    Raises:
        PayloadError: not ``(image, label)``, or it is refused.
    """
    value = unpack(view)
    image, label = value if isinstance(value, list) and len(value) == 2 else (value, None)
    if not isinstance(image, Span) or label is None:
        raise PayloadError(f"holds {_describe(value)}, expected (image bytes, label)")
    if not isinstance(label, int):
        raise PayloadError(f"its label is {_describe(label)}, expected an integer")
    if not 0 <= label <= _MAX_LABEL:
        raise PayloadError(f"its label is {label}, expected 0 to {_MAX_LABEL}")
    return Located(image, label)


def bytes_at(view: memoryview, span: Span) -> memoryview:
    """The bytes of a span of ``view``: a slice of it, or a copy if they are stored as text.

    Raises:
        PayloadError: text that does not represent bytes.
    """
    raw = view[span.start : span.stop]
    if not span.is_text:
        return raw
    try:
        return memoryview(str(raw, "utf-8").encode("latin-1"))
    except UnicodeError:
        raise PayloadError("damaged pickle: text that does not represent bytes") from None


def decode_length(view: memoryview) -> int:
    """Decode the value of ``__len__``.

    Raises:
        PayloadError: not an integer of at least 0.
    """
    value = unpack(view)
    if not isinstance(value, int) or value < 0:
        raise PayloadError(f"holds {_describe(value)}, expected a number of records")
    return value


def decode_keys(view: memoryview, *, max_keys: int) -> list[bytes]:
    """Decode the value of ``__keys__``.

    Raises:
        PayloadError: not a list of at most ``max_keys`` bytes or text.
    """
    value = unpack(view, max_values=max_keys)
    spans = [key for key in value if isinstance(key, Span)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(spans) != len(value):
        raise PayloadError(f"holds {_describe(value)}, expected a list of keys")
    if sum(span.stop - span.start for span in spans) > len(view):  # a pickle may repeat a large one
        raise PayloadError("lists keys that overlap")
    return [bytes(bytes_at(view, span)) for span in spans]


def _describe(value: Value) -> str:
    if isinstance(value, Span):
        return f"{value.stop - value.start} bytes"
    if isinstance(value, list):
        return f"a list of {len(value)} values"
    return f"the integer {value}" if abs(value) < 1 << 63 else "a huge integer"
