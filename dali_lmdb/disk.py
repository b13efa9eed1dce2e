"""Errors of the operating system as one line with advice that names the limit, and durable renames."""

from __future__ import annotations

import errno
import os
import pwd
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dali_lmdb.errors import DaliLmdbError

__all__ = ["describe_lack", "describe_os_error", "ensure_descriptors", "os_errors", "sync_folder"]

_NOT_OFFERED = "its file system does not support this; use another disk"
_LOST = "the network file system lost it; check the mount, then try again"
_ADVICE = {
    errno.ENOENT: "check that it still exists",
    errno.ENOTDIR: "a part of its path is not a folder; check the path",
    errno.EISDIR: "it is a folder; give a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its symbolic links form a loop; give the file itself",
    errno.EROFS: "its file system is read-only; use another disk or mount it writable",
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "your quota there is exhausted; make room or use another disk",
    errno.EFBIG: "it would exceed the file size limit there; raise it with: ulimit -f, or use another file system",
    errno.EIO: "the device failed; read the kernel's log (dmesg) and check the disk",
    errno.ENFILE: "the machine's limit on open files is reached; close programs or raise fs.file-max",
    errno.ENOMEM: "no memory or address space is left; free some or raise ulimit -v and vm.max_map_count",
    errno.EAGAIN: "there are too many; stop some, or raise the container's limit (pids.max)",
    errno.ENODEV: "its file system cannot map files into memory; copy it to a local disk",
    errno.EINVAL: _NOT_OFFERED,
    errno.ENOSYS: _NOT_OFFERED,
    errno.ENOLCK: _NOT_OFFERED,
    errno.EOPNOTSUPP: _NOT_OFFERED,
    errno.ESTALE: _LOST,
    errno.ENOTCONN: _LOST,
    errno.ETIMEDOUT: _LOST,
    errno.ENXIO: "nothing reads this pipe; start its reader first, or give a file",
    errno.EBUSY: "it is in use; stop whatever uses it or choose another name",
}
# Errors of fsync(2) on a folder if the file system does not support it: EINVAL on old CIFS and DrvFs, ENOSYS and
# EOPNOTSUPP on FUSE; PostgreSQL's fsync_fname_ext ignores EBADF, too. Nothing more can be done there.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
# Limits of this process (getrlimit(2)) that cause an error if they are set: what is limited, and ulimit's option.
_LIMITS = {
    errno.EMFILE: ((resource.RLIMIT_NOFILE, "{} open files", "-n"),),
    errno.EFBIG: ((resource.RLIMIT_FSIZE, "files of at most {} bytes", "-f"),),
    errno.ENOMEM: (
        (resource.RLIMIT_AS, "{} bytes of address space", "-v"),
        (resource.RLIMIT_DATA, "{} bytes of data", "-d"),
    ),
    errno.EAGAIN: ((resource.RLIMIT_NPROC, "{} processes and threads, with those of its user", "-u"),),
}
_SPARE_DESCRIPTORS = 256  # requested beyond what is needed, if the hard limit allows it


def describe_os_error(path: str | os.PathLike[str], what: str, error: OSError, *, then: str = "") -> str:
    """Describe an ``OSError`` in one line: ``PATH: WHAT: CAUSE; ADVICE``.

    Args:
        path: the file or folder that the error is about.
        what: what could not be done, such as ``"cannot be read"``.
        then: what to do once the advice is followed, such as ``"then run the same command again"``.
    """
    if error.errno in (errno.EACCES, errno.EPERM):
        advice = _about_permissions(Path(path))
    else:
        advice = _advice(error.errno or 0)
    cause = error.strerror or str(error)
    return f"{os.fspath(path)}: {what}: {cause}; {advice}{', ' if then else ''}{then}"


@contextmanager
def os_errors(
    path: str | os.PathLike[str], what: str, kind: type[DaliLmdbError], *, then: str = ""
) -> Iterator[None]:
    """Convert an ``OSError`` to ``kind``, see ``describe_os_error``; a broken pipe is raised unchanged.

    Args:
        path: the file to name, unless the error names one itself.
        what, then: see ``describe_os_error``.
    """
    try:
        yield
    except (BrokenPipeError, DaliLmdbError):  # StoreNotFoundError is an OSError, too
        raise
    except OSError as error:
        named = error.filename if isinstance(error.filename, str | bytes) else path
        raise kind(describe_os_error(os.fsdecode(named), what, error, then=then)) from error


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, if its file system supports that.

    Raises:
        OSError: the folder cannot be synced.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # writable but not readable, so it cannot be opened for syncing
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def ensure_descriptors(count: int) -> str | None:
    """Raise this process's soft limit on open files to allow ``count`` more.

    Returns:
        None, or if the hard limit is too low, a phrase with both numbers and the remedy.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _num_open(soft) + count
    wanted = needed + _SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return None
    return f"needs {needed} open files, the limit is {hard}; raise it with: ulimit -n {wanted}"


def _num_open(limit: int) -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError as error:  # no /proc, or no descriptor is left
        return limit if error.errno == errno.EMFILE else 0


def describe_lack(error: BaseException) -> str | None:
    """Describe a lack of memory, threads or files in one line that names the limit; None for any other error."""
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, ImportError) and "failed to map segment" in text):
        return f"no memory is left: {_advice(errno.ENOMEM)}"
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return f"no more files can be opened: {_advice(errno.EMFILE)}"
    if isinstance(error, BlockingIOError) or (isinstance(error, RuntimeError) and "start new thread" in text):
        # A thread needs a stack, too: memory is the likelier cause where it is limited.
        memory = any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit, *_ in _LIMITS[errno.ENOMEM])
        return f"no thread or process can be started: {_advice(errno.ENOMEM if memory else errno.EAGAIN)}"
    return None


def _advice(code: int) -> str:
    """What to do about an error number; if a limit of this process may be the cause, its value and option."""
    for limit, what, option in _LIMITS.get(code, ()):
        soft, hard = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
            return (
                f"this process may have {what.format(f'{soft:,}')} (hard limit {most}); raise the limit with: "
                f"ulimit {option}"
            )
    return _ADVICE.get(code, "check the path and its disk")


def _about_permissions(path: Path) -> str:
    """Advice that names the owner and mode of an inaccessible file, or of the folder that denies access."""
    for place in (path, *path.absolute().parents):
        try:
            status = os.stat(place)
        except OSError:  # missing, or in a folder that may not be searched
            continue
        it = "it" if place == path else f"its folder {place}"
        mode = stat.filemode(status.st_mode)
        if status.st_uid == os.geteuid():
            return f"{it} is yours, with mode {mode}; change that with chmod, or use another path"
        owner = _user(status.st_uid)
        return f"{it} belongs to {owner}, with mode {mode}, and you are {_user(os.geteuid())}; " + (
            f"ask {owner} for access, or use another path"
        )
    return "check its permissions"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
