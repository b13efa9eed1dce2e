"""Reject all but regular files before opening them: opening a pipe blocks, and it cannot be read twice."""

from __future__ import annotations

import os
import stat

from dali_lmdb.errors import DaliLmdbError

__all__ = ["check_regular"]

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def check_regular(path: str | os.PathLike[str], *, error: type[DaliLmdbError]) -> os.stat_result:
    """Return the status of a file that is about to be opened.

    Raises:
        DaliLmdbError: of type ``error``, if it is not a regular file or a link to one.
        OSError: it does not exist or is not accessible.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        found = _KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")
        remedy = "give a file in it" if found == "a folder" else "save its output to a file first"
        raise error(f"{os.fspath(path)}: {found}, expected a file; {remedy}")
    return status
