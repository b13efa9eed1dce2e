"""JSON Lines files that contain only whole lines, even after a disk error."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping
from typing import Any

__all__ = ["open_lines", "write_line"]


def open_lines(path: str | os.PathLike[str], *, append: bool) -> io.FileIO:
    """Open a file, a device or a pipe for ``write_line``, without waiting for a reader of the pipe.

    Args:
        append: keep existing lines.

    Raises:
        OSError: it cannot be opened; ENXIO if nothing reads the pipe.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if append else os.O_TRUNC)
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    os.set_blocking(descriptor, True)
    # Unbuffered, so that a killed run has written everything.
    return io.FileIO(descriptor, "a" if append else "w")


def write_line(file: io.FileIO, values: Mapping[str, Any]) -> None:
    """Write one object as a line at the end of an unbuffered file.

    Raises:
        OSError: it cannot be written; a partly written line is removed.
        ValueError: a value is NaN or infinite.
    """
    line = (json.dumps(values, allow_nan=False) + "\n").encode()
    written = 0
    try:
        while written < len(line):  # a full disk first accepts a part, and reports the error on the next write
            written += file.write(line[written:])
    except OSError:
        with contextlib.suppress(OSError):  # a device or a pipe cannot be truncated
            end = file.tell()
            if os.fstat(file.fileno()).st_size == end:  # no other process has added a line since
                file.truncate(end - written)
        raise
