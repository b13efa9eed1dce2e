"""Checks of a store: whether it opens, on which file system it is, and how much of it is in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dali_lmdb.doctor.findings import Finding, ok, unknown, warning
from dali_lmdb.doctor.machine import available_memory, gigabytes

__all__ = ["CHECKS", "file_system", "page_cache", "store"]

_NETWORK = re.compile(
    r"nfs4?|cifs|smb3?|smbfs|9p|afs|ceph|lustre|gpfs|beegfs\w*|glusterfs|panfs|pvfs2|orangefs|virtiofs|ncpfs|"
    r"fuse\.(sshfs|s3fs|gcsfuse|rclone|glusterfs|ceph\w*|juicefs|goofys|blobfuse\w*|mount-s3|davfs|lustre\w*|seaweedfs)"
)
_VIRTUAL = ("vd", "xvd")  # disks of virtual machines, which call themselves rotating whatever they are
_CACHE_SHARE = 0.8  # of the memory, beside which programs need some
_CHUNK_BYTES = 1 << 30  # of a file that is mapped at a time


def store(path: Path) -> Iterator[Finding]:
    """Whether it opens."""
    from dali_lmdb.errors import StoreError
    from dali_lmdb.store import open_store

    try:
        with open_store(path) as opened:
            # Not the classes, for which all of a classic database would be read.
            if len(opened):
                yield ok("store", f"{path}: {len(opened):,} records")
            else:
                yield warning("store", f"{path}: no records", "convert a folder with images in it")
    except StoreError as error:
        text, _, remedy = str(error).rpartition("; ")
        yield warning("store", text or remedy, remedy if text else f"see what is wrong: dali-lmdb verify {path}")


def _files(path: Path) -> list[Path]:
    # Imported when needed, so that a broken library costs only the checks that use it.
    from dali_lmdb.store.classic import database_file
    from dali_lmdb.store.shards import shard_files

    return shard_files(path) or [database_file(path)]


def file_system(path: Path, root: Path) -> Iterator[Finding]:
    """What the store is on: local or network, with seek times or without."""
    file = _files(path)[0]
    status = os.stat(file)
    number = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    kind, source = _mount(file, number, root)
    if _NETWORK.fullmatch(kind):
        remedy = "copy the store to a local disk, or use --shuffle block and a larger --readahead-bytes"
        yield warning("file system", f"{kind}, a network file system ({source})", remedy)
        return
    rotates = _rotates(number, source, root)
    if rotates:
        remedy = "copy the store to an SSD, or use --shuffle block, which reads runs of records"
        yield warning("file system", f"{kind} on {source}, a rotating disk", remedy)
    else:
        disk = (
            "in memory"
            if kind in ("tmpfs", "ramfs")
            else "not rotating"
            if rotates is False
            else "kind of disk unknown"
        )
        yield ok("file system", f"{kind} on {source}, local, {disk}")


def _mount(file: Path, number: str, root: Path) -> tuple[str, str]:
    """Type and source of the file system that holds a file; several may be mounted above it."""
    real = os.path.realpath(file)
    above: list[tuple[bool, int, str, str]] = []
    for line in (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        fields, _, rest = line.partition(" - ")
        _, _, device, _, point, *_ = fields.split(" ")
        kind, source, *_ = rest.split(" ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)
        if real == point or real.startswith(point.rstrip("/") + "/"):
            above.append((device == number, len(point), kind, source))
    if not above:
        raise ValueError(f"no mount of {file} in /proc/self/mountinfo")
    _, _, kind, source = max(above, key=lambda mount: mount[:2])
    return kind, source


def _rotates(number: str, source: str, root: Path) -> bool | None:
    """Whether a block device has to seek; None: the kernel does not say."""
    candidates = [number]
    if source.startswith("/dev/"):  # btrfs has a number of its own
        try:
            device = os.stat(source).st_rdev
            candidates.append(f"{os.major(device)}:{os.minor(device)}")
        except OSError:
            pass
    for candidate in candidates:
        device_folder = Path(os.path.realpath(root / "sys/dev/block" / candidate))
        if device_folder.name.startswith(_VIRTUAL):
            return None
        for folder in (device_folder, device_folder.parent):  # a partition is inside its disk
            file = folder / "queue/rotational"
            if file.exists():
                return file.read_text().strip() == "1"
    return None


def page_cache(path: Path, root: Path) -> Iterator[Finding]:
    """How much of the store is in memory, and whether all of it could be."""
    from dali_lmdb.errors import StoreError
    from dali_lmdb.store.regular import check_regular

    files = _files(path)
    size = sum(check_regular(file, error=StoreError).st_size for file in files)
    memory = available_memory(root)
    parts = [_cached_bytes(file) for file in files]
    cached = [part for part in parts if part is not None]
    is_known = len(cached) == len(parts)
    now = f"{sum(cached) / max(1, size):.0%} of {gigabytes(size)} cached now" if is_known else gigabytes(size)
    if size > _CACHE_SHARE * memory:
        text = f"{now}; it does not fit into {gigabytes(memory)} of memory: each epoch reads from the disk"
        remedy = (
            "put it on a local SSD, shrink the images (convert --resize 512), or read in runs (--shuffle block)"
        )
        yield warning("page cache", text, remedy)
    elif is_known:
        text = (
            f"{now}; it fits into {gigabytes(memory)} of memory, so that only the first epoch reads from the disk"
        )
        yield ok("page cache", text)
    else:
        yield unknown("page cache", f"{now}, which fit into memory; the kernel does not say what is cached")


def _cached_bytes(file: Path) -> int | None:
    """Bytes of a file in the page cache, by mincore(2), which tells only those who own or can write the file."""
    if os.stat(file).st_uid != os.geteuid() and not os.access(file, os.W_OK):
        return None
    library, count = ctypes.CDLL(None, use_errno=True), 0
    size = file.stat().st_size
    with open(file, "rb") as opened:
        for start in range(0, size, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, size - start)
            with mmap.mmap(opened.fileno(), length, access=mmap.ACCESS_READ, offset=start) as map_:
                data = np.frombuffer(map_, np.uint8)
                pages = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
                arguments = ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(length)
                failed = library.mincore(*arguments, ctypes.c_void_p(pages.ctypes.data))
                del data  # otherwise the map cannot be closed
            if failed:
                return None
            count += int(np.count_nonzero(pages & 1)) * mmap.PAGESIZE
    return min(count, size)


CHECKS: dict[str, Callable[[Path, Path], Iterator[Finding]]] = {
    "store": lambda path, root: store(path),
    "file system": file_system,
    "page cache": page_cache,
}
"""The checks, by name, called with the store and ``root``."""
