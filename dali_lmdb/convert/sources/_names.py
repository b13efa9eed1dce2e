"""Names of images and classes inside a source: checked, printable, distinct."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dali_lmdb.errors import SourceError

__all__ = [
    "check_classes",
    "classes_of",
    "integer",
    "listed",
    "numbered_classes",
    "path_problem",
    "plain_path",
    "printable",
    "record_name",
    "repeated_name",
    "safe_path",
]

_MAX_CLASSES = 1 << 20
"""Limit of integer labels: one wild label must not make 2^31 classes. ImageNet-21k has 21,841."""


def safe_path(name: str, *, where: object) -> str:
    """Normalise a path inside a source: without ``./``; "" for the top itself.

    Args:
        where: what holds the name, for error messages.

    Raises:
        SourceError: it is absolute, or has ``..`` or a NUL, so that it could name something outside.
    """
    reason = path_problem(name)
    if reason is not None:
        raise SourceError(f"{where}: {printable(name)!r}: {reason} is refused; name it relative to the top")
    return plain_path(name)


def path_problem(name: str) -> str | None:
    """Why a path could name something outside of its source, or None."""
    return "an absolute name" if name.startswith("/") else _name_problem(name)


def plain_path(name: str) -> str:
    """A path without ``./`` and the like; "" for the top itself."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _name_problem(name: str) -> str | None:
    if "\0" in name:
        return "a name with a NUL"
    if ".." in name.split("/"):
        return "a name that leaves its folder with '..'"
    return None


def printable(name: str) -> str:
    r"""A name as valid UTF-8: bytes of a file name that are not UTF-8 become ``\xff``."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def record_name(class_name: str, path: str) -> str:
    """A record's name, ``class/path``; the class is not repeated if the path begins with it."""
    name = path if path.startswith(class_name + "/") else f"{class_name}/{path}"
    return printable(name)


def classes_of(labels: Iterable[str], *, where: object) -> list[str]:
    """Make class names from labels written as text.

    Returns:
        The distinct labels, sorted; if all of them are integers, they are used as labels and the names are
        ``"0"``, ``"1"`` ... up to the largest one.

    Raises:
        SourceError: a label that cannot be a class name, or an integer that is negative or unreasonably
            large.
    """
    names = sorted(set(labels))
    numbers = [number for number in map(integer, names) if number is not None]
    if names and len(numbers) == len(names):
        return numbered_classes(numbers, where=where)
    check_classes(names, where=where)
    return names


def check_classes(names: list[str], *, where: object, are_folders: bool = False) -> None:
    """Refuse class names that are empty, unsafe or repeated.

    Args:
        are_folders: whether they must be valid names of folders. Labels from a table need not be:
            ``/a/airfield`` is a class of Places365, and ``.`` and ``/`` are classes of characters.

    Raises:
        SourceError: a name is empty, leaves its folder, or is repeated.
    """
    for name in names:
        reason = _name_problem(name)
        if reason is not None:
            raise SourceError(f"{where}: {printable(name)!r}: {reason} is refused; rename the class")
        if not name or (are_folders and plain_path(name) != name):
            expected = "a valid folder name" if are_folders else "at least one character"
            raise SourceError(
                f"{where}: {printable(name)!r} as a class name, expected {expected}; rename the class"
            )
    name_twice = repeated_name(names)
    if name_twice is not None:
        raise SourceError(f"{where}: two classes are named {printable(name_twice)!r}; give them different names")


def integer(text: str) -> int | None:
    """The integer that ``str`` would write as ``text``, else None: ``"07"`` is a name."""
    digits = text[1:] if text.startswith("-") else text
    if len(digits) > 18 or not digits.isascii() or not digits.isdigit() or str(int(text)) != text:
        return None
    return int(text)


def numbered_classes(labels: Iterable[int], *, where: object) -> list[str]:
    """``"0"``, ``"1"`` ... up to the largest label.

    Raises:
        SourceError: a label is negative or unreasonably large.
    """
    count = 0
    for label in labels:
        if not 0 <= label < _MAX_CLASSES:
            raise SourceError(
                f"{where}: label {label}, expected 0 to {_MAX_CLASSES - 1}; -1 often means unlabelled"
            )
        count = max(count, label + 1)
    return [str(label) for label in range(count)]


def repeated_name(names: Iterable[str]) -> str | None:
    """The first name to occur a second time, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def listed(names: Sequence[str]) -> str:
    """Join names into one line; if there are more than five, the first five and the total."""
    shown = [name if name.isprintable() else repr(name) for name in map(printable, names[:5])]
    return ", ".join(shown) + (f", ... ({len(names):,})" if len(names) > 5 else "")
