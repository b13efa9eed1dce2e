"""Checkpoints: written atomically, with tensors and plain values only, and read only if their checksum is right.

A run resumes from ``last.pt``. ``best.pt``, of the epoch with the best evaluation, and ``epoch-0007.pt`` of
``--keep`` are further names of files that were ``last.pt``: hard links, which take no room until it is replaced.

A checkpoint is written by ``torch.save`` and read by ``torch.load``, which ignores the checksums in a zip archive.
So the archive's comment, its last bytes, is a CRC-32 of everything before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dali_lmdb.disk import os_errors, sync_folder
from dali_lmdb.errors import StateError
from dali_lmdb.store.checksum import crc32
from dali_lmdb.store.regular import check_regular

__all__ = [
    "BEST_NAME",
    "FILE_NAME",
    "FORMAT_VERSION",
    "check_fits",
    "check_folder",
    "epoch_name",
    "is_one",
    "load",
    "only_writer",
    "remove_epochs",
    "save",
]

FILE_NAME = "last.pt"
BEST_NAME = "best.pt"
FORMAT_VERSION = 3
"""2 since there is a checksum, 3 since there is a best checkpoint beside the last one and a history in each."""

_EPOCHS = "epoch-*.pt"
_NAME_OF_FORMAT_2 = "checkpoint.pt"

_COMMENT = b"dali_lmdb crc32 %08x"
_COMMENT_BYTES = len(_COMMENT % 0)
_BLOCK_BYTES = 1 << 20

_locked: set[int] = set()  # descriptors of folders


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Create and lock the output folder, and remove what a killed run was writing; no lock is ever left behind.

    Raises:
        StateError: another run has locked it, or it cannot be created.
    """
    with os_errors(folder, "cannot be created", StateError, then="or choose another --output"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _locked.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for partial in folder.glob("*.pt.partial"):
                partial.unlink(missing_ok=True)
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


def epoch_name(epoch: int) -> str:
    """The name of an epoch's checkpoint that ``--keep`` keeps."""
    return f"epoch-{epoch:04}.pt"


def remove_epochs(folder: Path, *, keep: int) -> None:
    """Remove all but the last ``keep`` epochs' checkpoints; one that cannot be removed stays."""
    epochs = sorted(folder.glob(_EPOCHS))
    for path in epochs[: len(epochs) - keep]:
        with contextlib.suppress(OSError):
            path.unlink()


def check_folder(folder: Path, *, resume: bool) -> None:
    """Raise StateError if the folder holds checkpoints of another run, or of an earlier version."""
    old = folder / _NAME_OF_FORMAT_2
    if os.path.lexists(old):  # Path.exists raises where the name is too long
        raise StateError(f"{old}: of an earlier version, which this one cannot resume; choose another --output")
    if not os.path.isdir(folder):
        return
    last, *others = (folder / FILE_NAME, folder / BEST_NAME, *sorted(folder.glob(_EPOCHS)))
    found = [path for path in (last, *others) if os.path.lexists(path)]
    if resume and found and found[0] != last:
        raise StateError(
            f"{last} is missing, but {found[-1].name} is there: copy that to {FILE_NAME} to resume from it, or "
            "choose another --output"
        )
    if found and not resume:
        raise StateError(f"{found[0]} exists; resume that run with --resume, or choose another --output")


def save(path: Path, content: dict[str, Any], *, also: Sequence[str] = ()) -> None:
    """Write ``content`` to ``path``; a crash at any instant leaves the old file or the new one.

    Args:
        also: further names of the same file, in its folder; replaced before ``path`` is.

    Raises:
        StateError: it cannot be written; the old files are still there, and nothing else.
    """
    data = _encode({"format": FORMAT_VERSION, **content})
    partial = _partial(path)
    then = "then continue with --resume from the previous checkpoint, which is kept"
    with os_errors(path, "cannot be written", StateError, then=then):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # that of a killed run; it may take the room that this one needs
        try:
            with open(partial, "xb") as file:  # follows no link
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            for name in also:
                _add_name(partial, path.with_name(name))
            os.replace(partial, path)
        except BaseException:
            for left_over in (partial, *(_partial(path.with_name(name)) for name in also)):
                with contextlib.suppress(OSError):
                    left_over.unlink()
            raise
        sync_folder(path.parent)


def _add_name(file: Path, name: Path) -> None:
    """Give a whole file a second name; an older file of that name is replaced in one instant."""
    partial = _partial(name)
    partial.unlink(missing_ok=True)
    try:
        os.link(file, partial)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, partial)
    os.replace(partial, name)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _encode(content: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()  # torch.save to a file would hide the cause of a failed write
    torch.save(content, buffer)
    buffer.seek(-2, os.SEEK_END)  # a zip archive ends with the length of its comment and the comment
    assert buffer.read() == b"\0\0", "torch.save writes a comment of its own"
    buffer.seek(-2, os.SEEK_END)
    buffer.write(_COMMENT_BYTES.to_bytes(2, "little"))
    buffer.write(_COMMENT % crc32(buffer.getbuffer()))
    return buffer.getbuffer()


def load(path: Path, *, then: str = "choose another --output") -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Nothing in the file is executed.

    Args:
        then: what to do about one that cannot be used, besides what its cause suggests; for messages.

    Raises:
        StateError: not a checkpoint, a damaged one, or one of another format; or it cannot be read.
    """
    with os_errors(path, "cannot be read", StateError, then=f"or {then}"):
        check_regular(path, error=StateError)
        with open(path, "rb") as file:
            _check_checksum(file, path, then)
            file.seek(0)
            try:
                content: Any = torch.load(file, map_location="cpu", weights_only=True)
            except OSError:
                raise
            except Exception as cause:  # torch raises almost anything on what it cannot read
                reason = " ".join(str(cause).split())[:200]
                raise _unreadable(path, reason, then) from cause
    if not isinstance(content, dict) or content.get("format") != FORMAT_VERSION:
        version = content.get("format") if isinstance(content, dict) else None
        raise StateError(f"{path}: format {version}, this version reads {FORMAT_VERSION}; {then}")
    return content


def is_one(path: Path) -> bool:
    """Whether a file ends like a checkpoint, damaged or not.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _COMMENT_BYTES))
        return file.read(_COMMENT_BYTES).startswith(_COMMENT[:-4])


def _check_checksum(file: BinaryIO, path: Path, then: str) -> None:
    num_bytes = max(0, os.fstat(file.fileno()).st_size - _COMMENT_BYTES)
    checksum = 0
    while num_bytes and (block := file.read(min(num_bytes, _BLOCK_BYTES))):
        checksum = crc32(block, checksum)
        num_bytes -= len(block)
    comment = file.read(_COMMENT_BYTES)
    if not comment.startswith(_COMMENT[:-4]):
        raise _unreadable(path, "no checksum at its end, as if cut off or of a format before 2", then)
    if comment != _COMMENT % checksum:
        raise _unreadable(path, "its bytes are not what was written (wrong checksum)", then)


def _unreadable(path: Path, reason: str, then: str) -> StateError:
    return StateError(f"{path}: not a readable checkpoint: {reason}; put a copy of it in its place, or {then}")


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
