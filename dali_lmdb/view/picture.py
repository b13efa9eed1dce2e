"""Writing a picture: whole or not at all, and over nothing but another picture."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from dali_lmdb.disk import os_errors, sync_folder
from dali_lmdb.errors import StateError

__all__ = ["check_picture", "write_picture"]

_PNG = b"\x89PNG\r\n\x1a\n"


def check_picture(path: str, *, option: str) -> None:
    """Find what would stop ``write_picture``, before any image is loaded.

    Raises:
        ValueError: the file is not named ``.png`` or has no folder, or something else than a PNG has its name.
        StateError: it is not accessible.
    """
    if not path.lower().endswith(".png"):
        raise ValueError(f"{option} {path}: expected a name that ends with .png, since the picture is a PNG")
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: no folder {folder}; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: its folder is not writable; choose another")
    if os.path.lexists(_partial(path)):
        raise ValueError(f"{option} {path}: {_partial(path)} exists; remove it or choose another file")
    if not os.path.lexists(path):
        return
    with os_errors(path, "cannot be read", StateError):
        is_picture = os.path.isfile(path) and not os.path.islink(path)
        if is_picture:
            with open(path, "rb") as file:
                is_picture = file.read(len(_PNG)) == _PNG
    if not is_picture:
        raise ValueError(f"{option} {path}: exists and is not a PNG; choose another file")


def write_picture(path: str, data: bytes) -> None:
    """Write a PNG in place of the one that ``check_picture`` has found, if any.

    Raises:
        StateError: it cannot be written; the one before is still there.
    """
    partial = _partial(path)
    with os_errors(path, "cannot be written", StateError):
        with open(partial, "xb") as file:  # follows no link
            try:
                file.write(data)
                file.flush()
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise
        sync_folder(partial.absolute().parent)


def _partial(path: str) -> Path:
    return Path(f"{path}.partial")
