"""Arguments that name several files: a folder, ``shard-*.tar`` or ``shard-{000..009}.tar``."""

from __future__ import annotations

import glob
import math
import os
import re
from itertools import product
from pathlib import Path

from dali_lmdb.convert.sources._files import is_folder, list_folder
from dali_lmdb.errors import SourceError

__all__ = ["SPLITS", "files_of", "matches_of", "stems_of"]

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_FILES = 1_000_000
SPLITS = frozenset({"train", "val", "valid", "validation", "test", "dev"})
"""Words that name a part of a data set, in lower case."""


def matches_of(path: str) -> list[str]:
    """The paths that an argument names, sorted: itself if it exists or is no pattern, else the pattern's matches.

    Leading folders that exist are taken literally, even if their names look like patterns.

    Raises:
        SourceError: nothing matches, or a name from braces is missing.
    """
    if os.path.lexists(path) or not (glob.has_magic(path) or _BRACES.search(path)):
        return [path]
    folder, pattern = path, ""
    while folder and not os.path.lexists(folder):
        folder, name = os.path.split(folder)
        pattern = os.path.join(name, pattern) if pattern else name
    found = {os.path.join(folder, match) for name in _expanded(pattern) for match in _matches(name, folder)}
    if not found:
        raise SourceError(f"{path}: no {Path(path).suffix or 'such'} file there; check the folder or pattern")
    return [str(file) for file in sorted(map(Path, found))]


def files_of(path: str | os.PathLike[str], *, suffix: str) -> list[Path]:
    """The files that an argument names, sorted.

    Args:
        path: a file; a folder, meaning its files with that suffix, in upper or lower case; or a pattern with
            ``*``, ``?``, ``[]`` and the shell's braces: ``{a,b}``, ``{000..009}``.

    Raises:
        SourceError: no file matches, a name from braces is missing, or a folder mixes splits (train, val ...).
    """
    found = matches_of(os.fspath(path))
    if len(found) > 1 or not os.path.isdir(found[0]):
        return [Path(file) for file in found]
    (folder,) = found
    files = [
        Path(entry.path)
        for entry in list_folder(folder)
        if entry.name.lower().endswith(suffix) and not entry.name.startswith(".") and not is_folder(entry)
    ]
    if not files:
        raise SourceError(f"{folder}: no {suffix} file there; check the folder or pattern")
    _check_one_split(folder, files, suffix)
    return files


def stems_of(files: list[Path]) -> list[str]:
    """A short name for each file: its path below the folder they share, without the suffix."""
    top = os.path.commonpath([os.path.abspath(file.parent) for file in files])
    return [os.path.splitext(os.path.relpath(file, top))[0] for file in files]


def _matches(name: str, folder: str) -> list[str]:
    """Matches of a pattern without braces in a folder, relative to it."""
    path = os.path.join(folder, name)
    if os.path.lexists(path):
        return [name]
    if glob.has_magic(name):
        return glob.glob(name, root_dir=folder or None)
    raise SourceError(f"{path}: no such file, but the braces name it; give a pattern of files that are there")


def _expanded(pattern: str) -> list[str]:
    """Expand the braces of a pattern in every combination."""
    parts = _BRACES.split(pattern)  # text, braces, text, braces ... text
    choices = [[part] if i % 2 == 0 else _choices(part, pattern) for i, part in enumerate(parts)]
    count = math.prod(map(len, choices))
    if count > _MAX_FILES:
        raise SourceError(f"{pattern}: the braces name {count} files, expected at most {_MAX_FILES}")
    return ["".join(some) for some in product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    span = _RANGE.fullmatch(inside)
    if span is None:
        return inside.split(",")
    first, last = span.groups()
    if not int(first) <= int(last) < int(first) + _MAX_FILES:
        raise SourceError(f"{pattern}: range {inside}, expected an ascending one of at most {_MAX_FILES} files")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def _check_one_split(folder: str, files: list[Path], suffix: str) -> None:
    """Refuse a folder of several splits: training and validation images must not end up in one store."""
    words = {word for file in files for word in re.split(r"[^a-z]+", file.name.lower())} & SPLITS
    if len(words) > 1:
        example = os.path.join(folder, f"*{min(words)}*{suffix}")
        raise SourceError(
            f"{folder}: files of several splits ({', '.join(sorted(words))}); give one of them, such as "
            f"'{example}'"
        )
