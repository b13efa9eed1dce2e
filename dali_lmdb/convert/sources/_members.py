"""Table of an archive's members: names and positions."""

from __future__ import annotations

from collections.abc import Iterator

from dali_lmdb.convert.sources._scratch import Spool

__all__ = ["MemberTable"]


class MemberTable:
    """Members in the order they were added; tables that share a spool may grow alternately."""

    def __init__(self, spool: Spool) -> None:
        self._spool, self._number = spool, spool.new()
        self._num_rows = 0

    def add(self, name: str, offset: int, size: int, label: int = 0) -> None:
        """Append a member; its name has no NUL."""
        row = f"{name}\0{offset}\0{size}\0{label}\0"
        self._spool.append(self._number, row.encode(errors="surrogateescape"))
        self._num_rows += 1

    def __len__(self) -> int:
        return self._num_rows

    def rows(self) -> Iterator[tuple[str, int, int, int]]:
        """Yield (name, offset, size, label) of each member, in the order they were added."""
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
