"""Values of an LMDB file, read without mapping them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["read_at", "read_values"]

# Values are close together if the range that they span is at most twice their size, plus this.
_ADVISED_SLACK_BYTES = 16 << 20
_MAX_READ_BYTES = 0x7FFFF000  # the most that Linux transfers in one call, see read(2)


def read_values(
    path: Path, offsets: npt.NDArray[np.uint64], lengths: npt.NDArray[np.uint32]
) -> Iterator[bytes | OSError]:
    """Yield values in the given order; in place of one that cannot be read, the error.

    They are read with ``pread``, since mapped pages add to RSS. If they are close together, the kernel is asked to
    read all of them ahead. A value is shorter than its length if the file ends there.

    Args:
        path: the LMDB file.
        offsets, lengths: positions of the values, of shape (n,), in bytes.
    """
    extents = list(zip(offsets.tolist(), lengths.tolist(), strict=True))
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115  closed below
    except OSError as error:
        yield from repeat(error, len(extents))
        return
    with file:
        start = min((offset for offset, _ in extents), default=0)
        size = max((offset + length for offset, length in extents), default=0) - start
        if 0 < size <= 2 * sum(length for _, length in extents) + _ADVISED_SLACK_BYTES:
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_WILLNEED)
        for offset, length in extents:
            try:
                value = read_at(file.fileno(), length, offset)
            except OSError as error:
                yield error
            else:
                yield value


def read_at(descriptor: int, num_bytes: int, offset: int) -> bytes:
    """Read bytes of a file, however many; fewer if it ends there. May move the descriptor's position."""
    if num_bytes <= _MAX_READ_BYTES:
        data = os.pread(descriptor, num_bytes, offset)
        if len(data) in (0, num_bytes):
            return data
    with open(descriptor, "rb", closefd=False) as file:  # reads piece by piece into one buffer
        file.seek(offset)
        return file.read(num_bytes)
