"""Exceptions that this package raises about data, devices and saved states.

::

    DaliLmdbError
    ├── StoreError               a store cannot be used
    │   ├── StoreNotFoundError   nothing at that path; a FileNotFoundError, too
    │   ├── StoreFormatError     not an LMDB file, not one of ours, or another format version
    │   └── StoreDamagedError    truncated or altered bytes
    ├── RecordError              one record cannot be read or decoded
    ├── SourceError              images to convert or to read are missing or unusable
    ├── ConversionError          a store cannot be written
    ├── StateError               a saved state belongs to other data or settings, or cannot be written
    ├── DivergedError            the loss of a training run is no longer finite
    └── DeviceError              the requested device is not available, out of memory or broken

Wrong arguments raise ``ValueError``; our own bugs raise ``AssertionError``. The commands report
``DaliLmdbError`` and ``ValueError`` in one line, with exit code 1; a bug keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "ConversionError",
    "DaliLmdbError",
    "DeviceError",
    "DivergedError",
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
    r"""Return ``text`` on one line: non-printable characters are escaped, as in ``\n``, ``\x1b``, ``\u202e``.

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
    """Base class of this package's errors; the message is always one line, whatever names it contains."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class StoreError(DaliLmdbError):
    """A store cannot be used."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store at the path."""


class StoreFormatError(StoreError):
    """The file is not an LMDB file, not a store of this package, or has another format version."""


class StoreDamagedError(StoreError):
    """The file is truncated or its bytes are not what was written."""


class RecordError(DaliLmdbError):
    """One record cannot be read or decoded; the message names store, index, name and cause.

    Attributes:
        end: position in the epoch after the failed step, where the loader continues; None outside a loader.
    """

    end: int | None = None


class SourceError(DaliLmdbError):
    """Images to convert or to read are missing or unusable."""


class ConversionError(DaliLmdbError):
    """A store cannot be written."""


class StateError(DaliLmdbError):
    """A saved state belongs to other data or settings; or a state or a run's log cannot be written."""


class DeviceError(DaliLmdbError):
    """The requested device is not available, is out of memory, or fails for every image."""


class DivergedError(DaliLmdbError, FloatingPointError):
    """The loss of a training run is no longer finite; the last checkpoint is from before that."""
