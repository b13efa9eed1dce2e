"""The files of a conversion: their paths, and whether they may be created.

For a target ``NAME.lmdb``, all beside it, so that publishing is one rename:

* ``NAME.lmdb.partial``: the LMDB file while it grows;
* ``NAME.lmdb.partial-journal``: what is done so far, see ``_journal.py``;
* ``NAME.lmdb.bad.tsv``: bad images and ignored files, with reasons.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from dali_lmdb.disk import describe_os_error
from dali_lmdb.errors import ConversionError
from dali_lmdb.store.regular import check_own
from dali_lmdb.store.shards import RESERVED_SUFFIXES, set_files, shard_name

__all__ = ["Files", "check_name", "check_target"]

_MAX_NAME_BYTES = 255  # NAME_MAX of most Linux file systems


class Files:
    """The paths beside a target."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        self.journal = target.with_name(target.name + ".partial-journal")
        self.report = target.with_name(target.name + ".bad.tsv")


def check_target(target: Path, all_files: Sequence[Files]) -> None:
    """Refuse a target that cannot be written, or whose name could not be opened unambiguously afterwards."""
    folder = target.parent
    if target.is_dir():
        raise ConversionError(f"{target}: a folder, expected the name of the file to make, such as train.lmdb")
    if not folder.is_dir():
        raise ConversionError(f"{target}: its folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        raise ConversionError(describe_os_error(folder, "not writable", OSError(code, os.strerror(code))))
    longest = max(len(os.fsencode(files.journal.name)) for files in all_files)
    if longest > _MAX_NAME_BYTES:
        raise ConversionError(
            f"{target}: its name, with the suffix added during the conversion, is too long by "
            f"{longest - _MAX_NAME_BYTES} bytes; choose a shorter one"
        )
    for files in all_files:
        if files.target.is_symlink() and not files.target.exists():
            raise ConversionError(
                f"{files.target}: a dangling link, which would be replaced; give {os.readlink(files.target)}"
            )
        for beside in (files.partial, files.journal, files.report):
            check_own(beside, error=ConversionError)
    check_name(target, all_files)


def check_name(target: Path, all_files: Sequence[Files]) -> None:
    """Refuse a name under which something else already opens, or that is reserved for files beside a store."""
    ending = next((ending for ending in RESERVED_SUFFIXES if target.name.endswith(ending)), None)
    if ending is not None:
        raise ConversionError(
            f"{target}: names that end in {ending} are reserved for files beside a store; choose another"
        )
    own = {files.target for files in all_files}
    existing = [file for file in set_files(target) if file not in own]
    if target not in own:
        existing += [target] if os.path.lexists(target) else []
    elif (shard := shard_name(target)) is not None:  # one file named like a shard: that set's name opens it too
        existing += [f for f in set_files(target.with_name(shard.set_name)) if not f.match(shard.pattern())]
    if existing:
        found = "exists, and its shards" if existing[0] == target else f"{existing[0].name} exists and"
        raise ConversionError(f"{target}: {found} would open under the same name; choose another name")
