"""Files must be regular: opening a pipe waits, and writing through a planted link overwrites its target."""

from __future__ import annotations

import os
import stat

from dali_lmdb.errors import DaliLmdbError

__all__ = ["check_own", "check_regular", "open_own"]

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
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


def check_own(path: str | os.PathLike[str], *, error: type[DaliLmdbError]) -> None:
    """Check a file that this package writes, before it is opened: it must be absent or a regular file, not a link.

    Raises:
        DaliLmdbError: of type ``error``, if something else has its name.
        OSError: it is not accessible.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise error(_not_ours(path, mode))


def open_own(path: str | os.PathLike[str], flags: int, *, error: type[DaliLmdbError]) -> int:
    """Open a file that this package writes, without following a link or waiting for a pipe.

    Args:
        flags: as for ``os.open``.

    Raises:
        DaliLmdbError, OSError: as ``check_own``, or it cannot be opened.
    """
    check_own(path, error=error)
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):  # since the check
        os.close(descriptor)
        raise error(_not_ours(path, mode))
    return descriptor


def _not_ours(path: str | os.PathLike[str], mode: int) -> str:
    found = _KINDS.get(stat.S_IFMT(mode), "not a regular file")
    return f"{os.fspath(path)}: {found}, expected none or a file that dali_lmdb wrote; remove it"
