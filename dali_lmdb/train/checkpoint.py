"""Checkpoints: written atomically, with tensors and plain values only."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dali_lmdb.disk import sync_folder
from dali_lmdb.errors import StateError
from dali_lmdb.store.regular import check_regular

__all__ = ["FILE_NAME", "FORMAT_VERSION", "check_fits", "load", "only_writer", "save"]

FILE_NAME = "checkpoint.pt"
FORMAT_VERSION = 1

_locked: set[int] = set()  # descriptors of folders


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Create and lock the output folder; no lock is left behind, however this process ends.

    Raises:
        StateError: another run has locked it, or it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StateError(f"{folder}: cannot be created: {error.strerror}; choose another --output") from error
    _locked.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                f"{folder}: another run is writing there; let it finish or choose another --output"
            ) from None
        except OSError:
            pass  # a file system without locks, or NFS, which cannot lock folders
        yield
    finally:
        _locked.discard(descriptor)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _close_locks() -> None:
    # A forked process shares the lock. DataLoader workers outlive a killed rank by some seconds; the rank started
    # in its place must not find the folder locked.
    while _locked:
        os.close(_locked.pop())


os.register_at_fork(after_in_child=_close_locks)


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path``; a crash at any instant leaves the old file or the new one.

    Raises:
        StateError: it cannot be written; the old file is still there.
    """
    partial = path.with_name(path.name + ".partial")
    buffer = io.BytesIO()  # torch.save to a file would hide the cause of a failed write
    torch.save({"format": FORMAT_VERSION, **content}, buffer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise StateError(
            f"{path}: cannot be written: {error.strerror}; fix that, then continue from the previous one with "
            "--resume"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Nothing in the file is executed.

    Raises:
        StateError: not a checkpoint, a damaged one, or one of another format; or it cannot be read.
    """
    try:
        check_regular(path, error=StateError)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise StateError(
            f"{path}: cannot be read: {error.strerror or error}; fix that or choose another --output"
        ) from error
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as cause:
        reason = " ".join(str(cause).split())[:200]
        raise StateError(f"{path}: not a readable checkpoint: {reason}; remove it to start over") from cause
    if not isinstance(content, dict) or "format" not in content:
        raise StateError(f"{path}: not a checkpoint of this program; choose another --output")
    if content["format"] != FORMAT_VERSION:
        raise StateError(
            f"{path}: format {content['format']}, this version reads {FORMAT_VERSION}; choose another --output"
        )
    return content


def check_fits(content: dict[str, Any], *, arch: str, classes: Sequence[str], path: Path) -> None:
    """Raise StateError, naming both, if the checkpoint's model or classes are not those to be trained."""
    found = content["settings"]["arch"]
    if found != arch:
        raise StateError(f"{path}: holds a {found}, --arch is {arch}; use --arch {found} or another --output")
    if content["classes"] != list(classes):
        raise StateError(
            f"{path}: trained on {len(content['classes'])} classes, which are not the {len(classes)} of "
            "the data set; choose another --output"
        )
