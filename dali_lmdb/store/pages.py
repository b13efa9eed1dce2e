"""Bounds-checked look-ups in an LMDB file, straight from its pages.

liblmdb trusts the pages it maps: a flipped bit in a value's size makes it read past the end of
the file, and the process dies with SIGBUS. It also forbids opening a file twice in a process and
using an environment after ``fork``. A published store only needs look-ups, and those are a few
bounded reads, so this module does them on its own read-only map. No content of a file can make it
access a byte outside the map, the map may be shared by threads and forked processes, and it lives
exactly as long as the arrays that view it. Writing is left to liblmdb (``writer.py``).

Format: LMDB 0.9, data version 1, little-endian, 64 bit; names as in liblmdb's ``mdb.c``::

    page      pgno u64 | pad u16 | flags u16 | lower u16, upper u16 (overflow: pages u32) | ...
    meta      page header | magic u32 | version u32 | address u64 | mapsize u64
              | free db (48 bytes, its pad is the page size) | main db (48 bytes) | last_pg | txnid
    node      lo u16 | hi u16 | flags u16 | ksize u16 | key | value
              (branch: the child's page number in lo, hi, flags; leaf: the value's size in lo, hi;
              with F_BIGDATA the value is the number of the overflow page that holds it)
"""

from __future__ import annotations

import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dali_lmdb.disk import describe_os_error
from dali_lmdb.errors import StoreDamagedError, StoreError, StoreFormatError, StoreNotFoundError
from dali_lmdb.store.regular import check_regular

__all__ = ["Extent", "PageFile", "is_lmdb"]

_MAGIC = 0xBEEFC0DE
_DATA_VERSION = 1
_PAGE_HEADER_BYTES = 16
_META_BYTES = 152  # up to and including txnid, from the start of the page
_P_BRANCH, _P_LEAF, _P_OVERFLOW = 0x01, 0x02, 0x04
_P_KIND = 0x07
_F_BIGDATA, _F_SUBDATA = 0x01, 0x02
_MAX_DEPTH = 32  # CURSOR_STACK in mdb.c
_NODE = struct.Struct("<HHHH")
_DB = struct.Struct("<IHHQQQQQ")  # pad, flags, depth, branch, leaf, overflow pages, entries, root
_NO_PAGE = (1 << 64) - 1
_LEAVES_MAPPED = 1024  # pages that a walk over the tree reads before it releases them, to keep RSS low
_KEYS_SHOWN = 3


class Extent(NamedTuple):
    """Position of a value in the file, in bytes."""

    offset: int
    length: int


class _Meta(NamedTuple):
    page_size: int
    entries: int
    root: int
    last_page: int
    txnid: int


def is_lmdb(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a file that begins like an LMDB file.

    Raises:
        StoreError: the file cannot be read.
    """
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(_PAGE_HEADER_BYTES + 4)[_PAGE_HEADER_BYTES:] == struct.pack("<I", _MAGIC)
    except OSError as error:
        raise StoreError(describe_os_error(path, "cannot be read", error)) from error


class PageFile:
    """A read-only map of one LMDB file.

    Attributes:
        data: the whole file, uint8 of shape (file size,); slices of it keep the map alive.
        entries: number of keys in the main database.
        txnid: number of the last committed transaction.

    Raises:
        StoreNotFoundError: no file at ``path``.
        StoreError: it cannot be read or mapped.
        StoreFormatError: a folder or a pipe, or not an LMDB file of data version 1.
        StoreDamagedError: the file is too short for its pages.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            if self.path.is_dir():
                raise StoreFormatError(f"{path}: a folder, expected an LMDB file; give the file inside it")
            check_regular(path, error=StoreFormatError)
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < _META_BYTES:
                    raise StoreFormatError(
                        f"{path}: {size} bytes, not an LMDB file; give a store made by: dali-lmdb convert"
                    )
                map_ = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise StoreNotFoundError(
                f"no store at {path}; make one with: dali-lmdb convert IMAGES {path}"
            ) from None
        except OSError as error:
            raise StoreError(describe_os_error(path, "cannot be read", error)) from error
        map_.madvise(mmap.MADV_RANDOM)  # random access: the kernel's readahead would be wasted
        self.data: npt.NDArray[np.uint8] = np.frombuffer(map_, dtype=np.uint8)
        self._map = map_
        self._view = memoryview(map_)
        meta = self._newest_meta()
        self.page_size, self.entries, self._root, self.last_page, self.txnid = meta
        if (self.last_page + 1) * self.page_size > size:
            raise StoreDamagedError(
                f"{path}: truncated: {size:,} bytes, its pages need {(self.last_page + 1) * self.page_size:,}; "
                "copy or convert it again"
            )

    def find(self, key: bytes) -> Extent | None:
        """Locate the value of ``key``; None if there is no such key, or it is the name of a database.

        Raises:
            StoreDamagedError: a page on the path to the key is damaged.
        """
        for _, base, pointers in self._leaves(key):
            position = self._bisect(base, pointers, key)
            if position == len(pointers) or self._key(base, pointers[position]) != key:
                break
            pointer = pointers[position]
            return None if self._is_database(base, pointer) else self._value(base, pointer)
        return None

    def record_extents(self, start: int, stop: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        """Locate the values of the 8-byte big-endian keys start .. stop - 1.

        Reads the leaf pages only (about 30 bytes a record), never the values.

        Returns:
            (offsets, lengths): uint64 and uint32 of shape (stop - start,), in bytes.

        Raises:
            StoreDamagedError: a key is missing or out of order, or a page is damaged.
        """
        offsets = np.zeros(stop - start, dtype=np.uint64)
        lengths = np.zeros(stop - start, dtype=np.uint32)
        first = start.to_bytes(8, "big")
        done = 0
        for page, base, pointers in self._leaves(first):
            if done == stop - start:
                break
            if done == 0:
                pointers = pointers[self._bisect(base, pointers, first) :]
            done += self._leaf_extents(page, base, pointers, start + done, offsets[done:], lengths[done:])
        if done != stop - start:
            raise StoreDamagedError(
                f"{self.path}: {start + done} records in order, expected {stop}; convert it again"
            )
        return offsets, lengths

    def items(self, first: bytes = b"") -> Iterator[tuple[bytes, Extent]]:
        """Yield keys in order, each with the extent of its value; names of databases are left out.

        Reads only the tree's pages, never the values: extents are inside the file, but the headers of overflow
        pages are not validated.

        Args:
            first: begin with the leaf page that contains or would contain this key; by default, with all keys.

        Raises:
            StoreDamagedError: a page is damaged.
        """
        for _, base, pointers in self._leaves(first):
            for pointer in pointers:
                if not self._is_database(base, pointer):
                    yield self._key(base, pointer), self._value(base, pointer, validate=False)

    def count_keys(self) -> int:
        """Count the keys in the leaf pages; ``entries`` is only what the file says.

        Raises:
            StoreDamagedError: a page is damaged.
        """
        return sum(len(pointers) for _, _, pointers in self._leaves())

    def has_databases(self) -> bool:
        """Return whether the file has named databases; reads all leaf pages.

        Raises:
            StoreDamagedError: a page is damaged.
        """
        return any(
            self._is_database(base, pointer) for _, base, pointers in self._leaves() for pointer in pointers
        )

    def describe(self) -> str:
        """Describe an LMDB file of an unknown layout: ``3 keys: 'image-1', 'label-1', 'num-samples'``.

        Raises:
            StoreDamagedError: a page is damaged.
        """
        keys = (self._key(base, pointer) for _, base, pointers in self._leaves() for pointer in pointers)
        first = [ascii(key.decode("latin-1")) for key in islice(keys, _KEYS_SHOWN)]
        if self.entries > len(first):
            first.append("...")
        count = f"{self.entries:,} key{'s' if self.entries != 1 else ''}"
        return f"{count}: {', '.join(first)}" if first else count

    def leaf_of(self, key: bytes) -> Extent:
        """The leaf page that contains or would contain a key; (0, 0) if the file is empty."""
        for _, base, _ in self._leaves(key):
            return Extent(base, self.page_size)
        return Extent(0, 0)

    def view(self, extent: Extent) -> memoryview:
        """The bytes of an extent that ``find`` returned; a read-only view of the map."""
        return self._view[extent.offset : extent.offset + extent.length]

    def release_pages(self) -> None:
        """Unmap all pages, which are mapped again when they are read.

        Each access also maps the pages around it, and all of them add to RSS.
        """
        self._map.madvise(mmap.MADV_DONTNEED)

    def _newest_meta(self) -> _Meta:
        """The valid meta page with the greater transaction number, as mdb_env_pick_meta chooses it."""
        first = self._meta_at(0)
        # The second meta page follows the first; if that is damaged, try the page sizes that LMDB allows.
        sizes = [first.page_size] if first else [1 << bits for bits in range(8, 16)]
        second = next((meta for size in sizes if (meta := self._meta_at(size)) is not None), None)
        metas = [meta for meta in (first, second) if meta is not None]
        if not metas:
            raise StoreFormatError(
                f"{self.path}: not an LMDB file of data version {_DATA_VERSION}; "
                "give a store made by: dali-lmdb convert"
            )
        return max(metas, key=lambda meta: meta.txnid)

    def _meta_at(self, base: int) -> _Meta | None:
        if base + _META_BYTES > len(self._view):
            return None
        magic, version = struct.unpack_from("<II", self._view, base + 16)
        if magic != _MAGIC or version != _DATA_VERSION:
            return None
        page_size = _DB.unpack_from(self._view, base + 40)[0]
        *_, entries, root = _DB.unpack_from(self._view, base + 88)
        last_page, txnid = struct.unpack_from("<QQ", self._view, base + 136)
        if page_size not in (1 << bits for bits in range(8, 16)):
            return None
        return _Meta(page_size, entries, root, last_page, txnid)

    def _page(self, page: int) -> tuple[int, int, tuple[int, ...]]:
        """Validate a tree page; return (its offset in the file, P_BRANCH or P_LEAF, node offsets inside it)."""
        base = page * self.page_size
        if page > self.last_page or base + self.page_size > len(self._view):
            raise self._damaged(page, f"outside the file's {self.last_page + 1} pages")
        number, _, flags, lower, upper = struct.unpack_from("<QHHHH", self._view, base)
        kind = flags & _P_KIND
        if number != page or kind not in (_P_BRANCH, _P_LEAF):
            raise self._damaged(page, "not a tree page")
        if not _PAGE_HEADER_BYTES <= lower <= upper <= self.page_size or lower % 2:
            raise self._damaged(page, "impossible free space")
        count = (lower - _PAGE_HEADER_BYTES) // 2
        pointers = struct.unpack_from(f"<{count}H", self._view, base + _PAGE_HEADER_BYTES)
        if count and (min(pointers) < lower or max(pointers) + _NODE.size > self.page_size):
            raise self._damaged(page, "a node outside the page")
        return base, kind, pointers

    def _key(self, base: int, pointer: int) -> bytes:
        key_bytes = _NODE.unpack_from(self._view, base + pointer)[3]
        start = pointer + _NODE.size
        if start + key_bytes > self.page_size:
            raise self._damaged(base // self.page_size, "a key outside the page")
        return bytes(self._view[base + start : base + start + key_bytes])

    def _bisect(self, base: int, pointers: tuple[int, ...], key: bytes, first: int = 0) -> int:
        """Position of the first node, from ``first`` on, whose key is not less than ``key``."""
        return bisect_left(pointers, key, lo=first, key=partial(self._key, base))

    def _child(self, base: int, pointer: int) -> int:
        low: int
        high: int
        flags: int
        low, high, flags, _ = _NODE.unpack_from(self._view, base + pointer)
        return low | high << 16 | flags << 32

    def _is_database(self, base: int, pointer: int) -> bool:
        """Whether a leaf's node is a named database: its value would be the root of another tree."""
        length, _, flags, _ = _NODE.unpack_from(self._view, base + pointer)
        return bool(flags == _F_SUBDATA and length == _DB.size)  # another length is damage

    def _value(self, base: int, pointer: int, *, validate: bool = True) -> Extent:
        low, high, flags, key_bytes = _NODE.unpack_from(self._view, base + pointer)
        length = low | high << 16
        start = pointer + _NODE.size + key_bytes
        page = base // self.page_size
        if flags == 0:
            if start + length > self.page_size:
                raise self._damaged(page, "a value outside the page")
            return Extent(base + start, length)
        if flags != _F_BIGDATA or start + 8 > self.page_size:
            raise self._damaged(page, "a node of an unexpected kind")
        (first,) = struct.unpack_from("<Q", self._view, base + start)
        return self._overflow(first, length, validate=validate)

    def _overflow(self, page: int, length: int, *, validate: bool) -> Extent:
        base = page * self.page_size
        offset = base + _PAGE_HEADER_BYTES
        if page > self.last_page or offset + length > len(self._view):
            raise self._damaged(page, "a value outside the file")
        if not validate:
            return Extent(offset, length)
        number, _, flags, pages = struct.unpack_from("<QHHI", self._view, base)
        if number != page or flags & _P_KIND != _P_OVERFLOW:
            raise self._damaged(page, "not an overflow page")
        if pages * self.page_size < _PAGE_HEADER_BYTES + length:
            raise self._damaged(page, "a value longer than its pages")
        return Extent(offset, length)

    def _leaves(self, first: bytes = b"") -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Yield (page number, offset in the file, node offsets) of leaf pages, from that of ``first`` on."""
        # The pages still to visit on each level of the tree.
        levels: list[Iterator[int]] = [iter(() if self._root == _NO_PAGE else (self._root,))]
        num_pages = num_leaves = 0
        while levels:
            page = next(levels[-1], None)
            if page is None:
                levels.pop()
                continue
            base, kind, pointers = self._page(page)
            num_pages += 1
            if num_pages > self.last_page + 1:
                raise self._damaged(page, "more tree pages than the file has pages")
            if kind == _P_LEAF:
                yield page, base, pointers
                num_leaves += 1
                if num_leaves % _LEAVES_MAPPED == 0:
                    self.release_pages()
                continue
            if len(levels) == _MAX_DEPTH:
                raise self._damaged(page, "a tree deeper than LMDB makes")
            if not pointers:
                raise self._damaged(page, "an empty branch page")
            # Only on the path to the first leaf; the pages to its right hold greater keys.
            position = self._child_position(base, pointers, first) if num_leaves == 0 else 0
            levels.append(map(partial(self._child, base), pointers[position:]))

    def _child_position(self, base: int, pointers: tuple[int, ...], key: bytes) -> int:
        """Position of the child of a branch page that may hold a key: left of the first greater key."""
        # LMDB does not use the first node's key.
        position = self._bisect(base, pointers, key, first=1)
        if position == len(pointers) or self._key(base, pointers[position]) != key:
            position -= 1
        return position

    def _leaf_extents(
        self,
        page: int,
        base: int,
        pointers: tuple[int, ...],
        record: int,
        offsets: npt.NDArray[np.uint64],
        lengths: npt.NDArray[np.uint32],
    ) -> int:
        """Fill offsets and lengths from one leaf page, ``record`` first; return its number of records."""
        nodes = np.asarray(pointers[: len(offsets)], dtype=np.int64)
        # Node header, key and 8 bytes of value, clipped at the page's end: a short value there needs no more.
        body = self.data[base : base + self.page_size]
        head = body[np.minimum(nodes[:, None] + np.arange(24), self.page_size - 1)]
        fields = head[:, :8].view("<u2").astype(np.uint64)
        keys, first = head[:, 8:].copy().view(">u8")[:, 0], head[:, 16:].copy().view("<u8")[:, 0]
        expected = np.arange(record, record + len(nodes), dtype=np.uint64)
        good = (fields[:, 3] == 8) & (nodes + 16 <= self.page_size) & (keys == expected)
        count = int(len(nodes) if good.all() else np.argmin(good))
        nodes, fields, first = nodes[:count], fields[:count], first[:count]
        size = fields[:, 0] | fields[:, 1] << np.uint64(16)
        big = fields[:, 2] == _F_BIGDATA
        inline = (nodes + 16).astype(np.uint64)
        if (fields[:, 2] > _F_BIGDATA).any() or (inline + np.where(big, 8, size) > self.page_size).any():
            raise self._damaged(page, "a value outside the page")
        where = np.where(big, first * self.page_size + _PAGE_HEADER_BYTES, base + inline)
        if (first[big] > self.last_page).any() or (where + size > len(self._view)).any():
            raise self._damaged(page, "a value outside the file")
        offsets[:count], lengths[:count] = where, size
        return count

    def _damaged(self, page: int, what: str) -> StoreDamagedError:
        return StoreDamagedError(f"{self.path}: damaged: page {page}: {what}; convert it again")
