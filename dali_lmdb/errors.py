"""Everything this package raises on purpose about data, devices and saved states.

::

    DaliLmdbError
    ├── StoreError               a store cannot be used
    │   ├── StoreNotFoundError   nothing at that path
    │   ├── StoreFormatError     not an LMDB file, not one of ours, or a newer format
    │   └── StoreDamagedError    truncated or altered bytes
    ├── RecordError              one record cannot be read or decoded
    ├── SourceError              images to convert or to read are missing or unusable
    ├── ConversionError          a store cannot be written
    ├── StateError               a saved state belongs to other data or settings, or cannot be written
    └── DeviceError              the device that was asked for is not there

Wrong arguments raise ``ValueError``; our own bugs raise ``AssertionError``. The commands
turn this tree into one line and exit code 1 and leave every other traceback alone.
"""

from __future__ import annotations

__all__ = [
    "ConversionError",
    "DaliLmdbError",
    "DeviceError",
    "RecordError",
    "SourceError",
    "StateError",
    "StoreDamagedError",
    "StoreError",
    "StoreFormatError",
    "StoreNotFoundError",
    "one_line",
]


def one_line(text: str) -> str:
    r"""Text on one line: what is not printable is escaped, as in ``\n``, ``\x1b``, ``\u202e``.

    Bytes of file names that are not UTF-8 become ``\xff``.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # surrogateescape
        return f"\\x{ord(char) - 0xDC00:02x}"
    return repr(char)[1:-1]


class DaliLmdbError(Exception):
    """Base of all errors of this package; the message is one line, whatever is in the names it cites."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class StoreError(DaliLmdbError):
    """A store cannot be used."""


class StoreNotFoundError(StoreError):
    """There is no store at the path."""


class StoreFormatError(StoreError):
    """The file is not an LMDB file, not one of this package, or of a newer format."""


class StoreDamagedError(StoreError):
    """The file is truncated or its bytes are not what was written."""


class RecordError(DaliLmdbError):
    """One record cannot be read or decoded; the message names store, index, name and cause.

    Attributes:
        end: the position of the epoch after the step that failed, where the loader goes on; None outside a loader.
    """

    end: int | None = None


class SourceError(DaliLmdbError):
    """Images to convert or to read are missing or unusable."""


class ConversionError(DaliLmdbError):
    """A store cannot be written."""


class StateError(DaliLmdbError):
    """A saved state belongs to other data or other settings; or it, or a run's log, cannot be written."""


class DeviceError(DaliLmdbError):
    """The device that was asked for is not there."""
