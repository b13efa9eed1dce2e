"""What file systems do not all offer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

__all__ = ["sync_folder"]

# fsync(2) of a folder where a file system has none: EINVAL on old CIFS and DrvFs, ENOSYS and EOPNOTSUPP on FUSE;
# PostgreSQL's fsync_fname_ext passes over EBADF, too. Such a file system could not keep more than it does.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where its file system offers that.

    Raises:
        OSError: the disk refuses.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # it may be written but not listed, so nobody can sync it
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
