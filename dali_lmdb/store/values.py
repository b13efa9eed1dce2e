"""Values of an LMDB file, read without mapping them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["read_values"]

# Values are close together if the range that they span is at most twice their size, plus this.
_ADVISED_SLACK_BYTES = 16 << 20


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
                value = os.pread(file.fileno(), length, offset)
            except OSError as error:
                yield error
            else:
                yield value
