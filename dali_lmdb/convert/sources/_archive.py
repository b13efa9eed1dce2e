"""Uncompressed tar files, read in place: members are listed once and read by offset, never unpacked to disk."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from dali_lmdb.convert.sources._files import read_image, reading
from dali_lmdb.convert.sources._names import printable, safe_path
from dali_lmdb.convert.sources._whole_files import FileState
from dali_lmdb.disk import describe_os_error
from dali_lmdb.errors import SourceError

__all__ = ["COMPRESSED", "Archive", "Member"]

_BLOCK_BYTES = tarfile.BLOCKSIZE
_MAX_HEADER_BYTES = 1 << 20  # real names and PAX headers are shorter; a damaged length must not allocate gigabytes
COMPRESSED = {
    b"\x1f\x8b": "gzip -dk",
    b"BZh": "bzip2 -dk",
    b"\xfd7zXZ\0": "xz -dk",
    b"\x28\xb5\x2f\xfd": "zstd -dk",
}
"""First bytes of compressed files, and the command that decompresses them."""


class Member(NamedTuple):
    """A file or folder in an archive."""

    path: str
    """Relative, without ``.`` and ``..``; may contain surrogates, like file names from ``os``."""
    offset: int
    """Where its bytes start in the archive; -1 for a folder."""
    size: int

    @property
    def is_folder(self) -> bool:
        return self.offset < 0


class Archive:
    """One tar file.

    Raises:
        SourceError: it is missing, cannot be read, or is compressed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.state = Path(path), FileState.of(path)
        with reading(path), open(path, "rb") as stream:
            magic = stream.read(8)
        for start, command in COMPRESSED.items():
            if magic.startswith(start):
                raise SourceError(
                    f"{path}: compressed; images are read in place, so decompress it first: {command} {path}"
                )

    def members(self, wanted: Callable[[str], bool], *, inner: Member | None = None) -> Iterator[Member]:
        """Yield all folders, and the files whose names are wanted, in the archive's order; only headers are read.

        Args:
            inner: a tar inside this one to list instead.

        Raises:
            SourceError: the archive is damaged or cut off, a member's name points outside, or a wanted name
                belongs to a link, a device or a sparse file.
        """
        where = str(self.path) if inner is None else f"{self.path}: {printable(inner.path)}"
        _, offset, size = inner or Member("", 0, self.state.size)
        before = "its start"
        with open(self.path, "rb") as stream:
            window = _Window(stream.fileno(), offset, size)
            try:
                tar = tarfile.TarFile(fileobj=window, mode="r", encoding="utf-8", errors="surrogateescape")
                while (info := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else a million of them stay in memory
                    if info.size < 0 or (info.isreg() and info.offset_data + info.size > window.size):
                        raise SourceError(
                            f"{where}: cut off in {printable(info.name)!r}: {info.size} bytes at "
                            f"{info.offset_data} of a file of {window.size}; copy or download it again"
                        )
                    before = repr(printable(info.name))
                    member = _member(info, wanted, offset, where)
                    if member is not None:
                        yield member
            except SourceError:
                raise
            except Exception as error:  # tarfile's parsers raise almost anything on damaged headers
                raise SourceError(f"{where}: not a readable tar after {before}: {error}") from error
            _check_end(window, tar.offset, where, before)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """The bytes of one member; may be called in any thread.

        Raises:
            RefusedImageError: see ``read_image``.
            SourceError: the archive vanished or changed since this object was made.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = os.fstat(descriptor)
                data = read_image(descriptor, size, offset, where=f"{self.path}: {name}")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise SourceError(describe_os_error(self.path, f"{name}: cannot be read", error)) from error
        if FileState.from_stat(self.path, found) != self.state or len(data) != size:
            raise SourceError(
                f"{self.path}: {name}: the archive changed while it was read; convert again when nothing "
                "writes to it"
            )
        return data


class _Window(io.RawIOBase):
    """A part of an open file, with the methods that tarfile needs; the file's own position does not move."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self._descriptor, self._offset, self.size = descriptor, offset, size
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        size = max(0, min(size, self.size - self._position))
        data = os.pread(self._descriptor, size, self._offset + self._position)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        if offset < 0:
            raise tarfile.ReadError(f"a header that points to {offset}")
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position


def _member(info: tarfile.TarInfo, wanted: Callable[[str], bool], offset: int, where: str) -> Member | None:
    """Convert tarfile's entry of a folder, or of a file whose name is wanted; None for others."""
    path = safe_path(info.name, where=where)
    if info.isdir():
        return Member(path, -1, 0)
    if not wanted(path):
        return None
    name = f"{where}: {printable(info.name)!r}"
    if info.islnk() or info.issym():
        target = f"a {'hard' if info.islnk() else 'symbolic'} link to {printable(info.linkname)!r}"
        option = "--hard-dereference" if info.islnk() else "--dereference"
        raise SourceError(f"{name}: {target}, expected a file; pack it again with: tar {option}")
    if info.issparse():
        raise SourceError(f"{name}: a sparse file; pack it again without: tar --sparse")
    if not info.isreg():
        raise SourceError(f"{name}: not a regular file (type {info.type!r}); pack the tar again without it")
    return Member(path, offset + info.offset_data, info.size)


def _check_end(window: _Window, end: int, where: str, before: str) -> None:
    """Refuse an archive without an end mark: tarfile stops silently at a damaged header or the end of the file."""
    window.seek(end)
    block = window.read(_BLOCK_BYTES)
    if block != bytes(_BLOCK_BYTES):
        reason = "a damaged header" if len(block) == _BLOCK_BYTES else "cut off, no end-of-archive mark"
        raise SourceError(f"{where}: {reason} after {before}; copy or download it again")
    if window.read(_MAX_HEADER_BYTES).strip(b"\0"):
        raise SourceError(
            f"{where}: more data after its end-of-archive mark; archives are joined with tar -A, not with cat"
        )
