"""A folder that appears when it is complete: written under a partial name beside its own, then renamed.

``FOLDER.partial`` holds a file that marks it as ours, locked while an export is running. So what a killed export,
or one interrupted twice, has left is recognised, and the next export to the same folder removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dali_lmdb.disk import describe_os_error, sync_folder
from dali_lmdb.errors import ConversionError
from dali_lmdb.store.regular import open_own

__all__ = ["publishing"]

_MARK = ".dali-lmdb-export"


@contextlib.contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """Yield a new folder beside ``target``; rename it to ``target`` on success, remove it on failure.

    Raises:
        ConversionError: ``target`` cannot be written, is not empty, or another export is writing it.
        KeyboardInterrupt: with a message if an interrupt left the folder behind.
    """
    _check_target(target)
    partial = target.with_name(target.name + ".partial")
    mark = _create(partial, target)
    try:
        try:
            _empty(partial)
            yield partial
            _sync_file_system(partial)
            (partial / _MARK).unlink()
            os.rename(partial, target)
            sync_folder(target.parent)
        except OSError as error:
            left = "nothing was left there" if _clean_up(partial) else f"{partial} is left, remove it"
            raise ConversionError(describe_os_error(target, "cannot be written", error, then=left)) from error
        except BaseException as error:
            if not _clean_up(partial) and isinstance(error, KeyboardInterrupt):
                raise _interrupted(partial) from None
            raise
    finally:
        os.close(mark)


def _create(partial: Path, target: Path) -> int:
    """Create the partial folder, or take over one that an export left; return its mark's descriptor, locked."""
    exists = ConversionError(f"{partial}: already exists; remove it if no other export to {target} is running")
    try:
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        if partial.is_symlink() or not partial.is_dir():
            raise exists
        is_empty = not os.listdir(partial)
        # Without O_CREAT in a folder that has files: whether they are ours is what the mark says.
        mark = open_own(
            partial / _MARK, os.O_RDWR | (os.O_CREAT | os.O_EXCL if is_empty else 0), error=ConversionError
        )
    except (FileNotFoundError, FileExistsError):
        raise exists from None
    except OSError as error:
        raise ConversionError(describe_os_error(partial, "cannot be created", error)) from error
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(mark), os.lstat(partial / _MARK)):
            raise exists
    except OSError as error:
        # Without locks, only a folder that this process has marked is known to be nobody else's.
        if not is_empty or isinstance(error, BlockingIOError | FileNotFoundError):
            os.close(mark)
            raise exists from None
    except BaseException:
        os.close(mark)
        raise
    return mark


def _clean_up(partial: Path) -> bool:
    """Call ``_remove``; an interrupt says that the folder is left."""
    try:
        return _remove(partial)
    except KeyboardInterrupt:
        raise _interrupted(partial) from None


def _interrupted(partial: Path) -> KeyboardInterrupt:
    return KeyboardInterrupt(f"Stopped. {partial} is left; the same command removes it and starts over.")


def _remove(partial: Path) -> bool:
    """Remove a marked folder; return whether that succeeded. The mark goes last, in case of another interrupt."""
    if _empty(partial):
        with contextlib.suppress(OSError):
            (partial / _MARK).unlink()
            partial.rmdir()
    return not partial.exists()


def _empty(folder: Path) -> bool:
    """Remove all but the mark; return whether that succeeded."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != _MARK:
                os.unlink(entry.path)
        return os.listdir(folder) in ([], [_MARK])
    return False


def _check_target(target: Path) -> None:
    if not target.parent.is_dir():
        raise ConversionError(f"{target}: its folder {target.parent} does not exist; create it first")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ConversionError(f"{target}: exists and is not a folder; choose another name")
    if os.path.ismount(target):
        raise ConversionError(f"{target}: a mount point cannot be replaced; give a folder inside it")
    try:
        with os.scandir(target) as entries:
            empty = next(entries, None) is None
    except OSError as error:
        raise ConversionError(f"{target}: cannot be read: {error.strerror}; choose another") from error
    if not empty:
        raise ConversionError(f"{target}: exists and is not empty; choose another name")


def _sync_file_system(folder: Path) -> None:
    """Flush all files to disk with one syncfs(2); a million calls of fsync would take minutes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)
