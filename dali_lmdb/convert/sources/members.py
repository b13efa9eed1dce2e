"""Names and places of an archive's members: in memory, or for many of them in a temporary file."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from dali_lmdb.convert.sources.scratch import ScratchFile

__all__ = ["MemberTable", "Spool"]

_KEPT_BYTES = 64 << 20  # 1.28 million members of ImageNet's training tar take 55 MB
_PIECE_BYTES = 64 << 10  # read back at a time; as objects of Python they take ten times as much


class Spool:
    """Byte strings that grow in turn; when they take more than ``_KEPT_BYTES`` together, a file takes them."""

    def __init__(self) -> None:
        self._file = ScratchFile()
        self._written: list[array[int]] = []
        """(start, length) in the file of what was written of each string, one after the other."""
        self._kept: list[bytearray] = []
        """What each string goes on with, in memory."""
        self._num_kept = 0

    def new(self) -> int:
        """The number of one more string, empty."""
        self._written.append(array("q"))
        self._kept.append(bytearray())
        return len(self._kept) - 1

    def append(self, number: int, data: bytes) -> None:
        """Add to the end of a string."""
        self._kept[number] += data
        self._num_kept += len(data)
        if self._num_kept > _KEPT_BYTES:
            self._write()

    def pieces(self, number: int) -> Iterator[bytes]:
        """A string from its start, cut anywhere; no string may grow meanwhile."""
        written = iter(self._written[number])
        for start, length in zip(written, written, strict=True):
            for at in range(start, start + length, _PIECE_BYTES):
                yield self._file.read(at, min(_PIECE_BYTES, start + length - at))
        kept = self._kept[number]
        for at in range(0, len(kept), _PIECE_BYTES):
            yield bytes(kept[at : at + _PIECE_BYTES])

    def _write(self) -> None:
        for number, kept in enumerate(self._kept):
            if kept:
                self._written[number].extend((self._file.append(kept), len(kept)))
                self._kept[number] = bytearray()
        self._num_kept = 0


class MemberTable:
    """Members in the order they came; many tables may share a spool, and grow in turn."""

    def __init__(self, spool: Spool) -> None:
        self._spool, self._number = spool, spool.new()
        self._num_rows = 0

    def add(self, name: str, offset: int, size: int, label: int = 0) -> None:
        """Take one more; a name has no NUL."""
        row = f"{name}\0{offset}\0{size}\0{label}\0"
        self._spool.append(self._number, row.encode(errors="surrogateescape"))
        self._num_rows += 1

    def __len__(self) -> int:
        return self._num_rows

    def rows(self) -> Iterator[tuple[str, int, int, int]]:
        """(name, offset, size, label) of each, in the order they came."""
        fields = self._fields()
        numbers = map(int, fields)
        return zip(fields, numbers, numbers, numbers, strict=True)  # which take from ``fields`` in turn

    def _fields(self) -> Iterator[str]:
        rest = b""
        for piece in self._spool.pieces(self._number):
            piece = rest + piece
            end = piece.rfind(b"\0") + 1
            rest = piece[end:]
            yield from piece[:end].decode(errors="surrogateescape").split("\0")[:-1]
