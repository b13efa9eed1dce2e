"""Names for the classes of a source that only has numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from dali_lmdb.convert.sources._names import check_classes, record_name
from dali_lmdb.convert.sources.base import Item, Source
from dali_lmdb.errors import SourceError

__all__ = ["NamedSource"]


class NamedSource(Source):
    """Another source, its class ``"3"`` named as the fourth of some names, and its record ``3/x.jpg`` after it.

    Args:
        source: the other one.
        names: the class names in the order of the labels; there may be more than are used.
        where: where the names are from, for messages.

    Raises:
        SourceError: a name is empty or repeated; on first use: there are too few, or the source has names.
    """

    def __init__(self, source: Source, names: Sequence[str], *, where: object) -> None:
        self._source, self._names, self._where = source, list(names), where
        check_classes(self._names, where=where)
        self._digest = hashlib.sha256("\n".join(self._names).encode()).hexdigest()[:32]
        self.kind, self.reads_in_order, self.kept_bytes = source.kind, source.reads_in_order, source.kept_bytes

    @property
    def classes(self) -> list[str]:
        self._source.kept_bytes = self.kept_bytes
        numbered = self._source.classes
        if numbered != [str(label) for label in range(len(numbered))]:
            raise SourceError(
                f"{self._where}: names for classes that have names, such as {numbered[0]!r}; leave out "
                "--class-names (class_names)"
            )
        if len(self._names) < len(numbered):
            raise SourceError(
                f"{self._where}: {len(self._names)} class names, but labels up to {len(numbered) - 1}; add "
                "the others, and convert again with --restart"
            )
        return self._names

    def items(self) -> Iterator[Item]:
        names = self.classes
        for item in self._source.items():
            path = item.name.removeprefix(f"{item.label}/")
            yield item._replace(name=record_name(names[item.label], path))

    def identity(self) -> dict[str, Any]:
        return {**self._source.identity(), "class_names": self._digest}

    def left_out(self) -> Iterator[tuple[str, str]]:
        return self._source.left_out()

    def count(self) -> int:
        self._source.kept_bytes = self.kept_bytes
        return self._source.count()
