"""JSON Lines files that contain only whole lines, even after a disk error."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping
from typing import Any

__all__ = ["write_line"]


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
