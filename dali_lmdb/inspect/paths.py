"""Safe paths for a store's records as files in a folder, whatever their names."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dali_lmdb.errors import ConversionError, RecordError
from dali_lmdb.images.header import read_header
from dali_lmdb.images.kinds import Kind
from dali_lmdb.images.names import is_image_name
from dali_lmdb.images.opening import BadImageError
from dali_lmdb.inspect.records import duplicates
from dali_lmdb.store import Store

__all__ = ["extension_of", "is_case_sensitive", "record_paths"]

_USE_TAR = "export it with --tar, which does not use names"
_SHOWN = 80  # characters of a name in a message
_AT_ONCE = 1 << 16  # names that are converted to Python strings at a time
_EXTENSIONS: dict[int, str] = {
    **{kind: ".jpg" for kind in Kind if kind.is_jpeg},
    Kind.PNG: ".png",
    Kind.WEBP: ".webp",
    Kind.BMP: ".bmp",
    Kind.TIFF: ".tiff",
    Kind.PNM: ".ppm",
}


def extension_of(kind: int) -> str:
    """The usual extension of a kind of image, with its dot; "" if unknown, or none of ImageFolder's."""
    return _EXTENSIONS.get(kind, "")


def _missing_extension(store: Store, record: int, name: str, kind: int) -> str:
    """The extension of a record's kind, if its name has neither that nor another that would do."""
    if kind == Kind.UNKNOWN:
        try:
            kind = read_header(store.copy(record), max_pixels=None).kind
        except BadImageError:
            return ""
    if kind in (Kind.OTHER, Kind.GIF):  # ImageFolder only finds its extensions; readers look at the contents
        return "" if name.lower().endswith(".gif") else ".jpg"
    return "" if name.lower().endswith(extension_of(kind)) else extension_of(kind)


def record_paths(store: Store, *, fold_case: bool, max_name_bytes: int = 255) -> pa.ChunkedArray:
    """Return a path for each record: its class's folder, then its name (which may begin with that folder already).

    A name without an image's extension, such as one made of a row's number, gets that of the record's kind.

    Args:
        fold_case: treat names that differ only in case as the same file.
        max_name_bytes: the file system's limit on a file's or folder's name; usually 255.

    Returns:
        One string per record: relative, without ``..``, and unique.

    Raises:
        RecordError: a name cannot be such a path, or two records would be the same file.
        ConversionError: a class name cannot be a folder's.
    """
    classes = store.classes
    for name in classes:
        problem = "has a slash" if "/" in name else _path_problem(name, max_name_bytes)
        if problem:
            raise ConversionError(
                f"{store.path}: class {_shortened(name)} cannot be a folder's name: it {problem}; {_USE_TAR}"
            )
    names, chunks = store.names(), []
    for start in range(0, len(store), _AT_ONCE):
        run = range(start, min(start + _AT_ONCE, len(store)))
        paths = []
        labels, kinds = (store.gather(of, np.arange(run.start, run.stop)).tolist() for of in ("label", "kind"))
        rows = zip(run, labels, kinds, names[run.start : run.stop].to_pylist(), strict=True)
        for record, label, kind, name in rows:
            if not is_image_name(name):
                name += _missing_extension(store, record, name, kind)
            problem = _path_problem(name, max_name_bytes)
            if problem:
                raise RecordError(
                    f"{store.path}: record {record}: its name {_shortened(name)} {problem}; {_USE_TAR}"
                )
            paths.append(name if name.startswith(classes[label] + "/") else f"{classes[label]}/{name}")
        chunks.append(pa.array(paths, pa.large_string()))
    paths = pa.chunked_array(chunks, pa.large_string())
    _check_different(store, paths, fold_case=fold_case)
    return paths


def _shortened(name: str) -> str:
    return repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "...")


def _path_problem(name: str, max_name_bytes: int) -> str | None:
    """Why a name cannot be a path inside a folder, or None."""
    if name.startswith("/"):
        return "is absolute"
    if "\0" in name:
        return "has a NUL"
    if ".." in name.split("/"):
        return "leaves the folder"
    if "" in name.split("/") or "." in name.split("/"):
        return "is not a plain path"
    try:
        longest = max(map(len, os.fsencode(name).split(b"/")))
    except UnicodeEncodeError:
        return "is not Unicode text"
    if longest > max_name_bytes:
        return f"needs {longest} bytes, file names there have at most {max_name_bytes}"
    return None


def _check_different(store: Store, paths: pa.ChunkedArray, *, fold_case: bool) -> None:
    """Reject two records that would be the same file, and a file that would be a folder."""
    folders = set(store.classes)
    for chunk in paths.chunks:
        for parent in {path.rpartition("/")[0] for path in chunk.to_pylist()} - folders:
            folders |= {parent, *(str(above) for above in PurePosixPath(parent).parents)}
    if fold_case:
        folded: dict[str, str] = {}
        for folder in sorted(folders):
            other = folded.setdefault(folder.lower(), folder)
            if other != folder:
                raise ConversionError(
                    f"{store.path}: folders {other!r} and {folder!r} are the same on this file system; {_USE_TAR}"
                )
        folders, paths = set(folded), pc.utf8_lower(paths)
    again = duplicates(paths)
    if again:
        record, earlier = again[0]
        raise RecordError(
            f"{store.path}: record {record}: its name {paths[record].as_py()!r} is also that of record {earlier}; "
            f"{_USE_TAR}"
        )
    is_folder = pc.is_in(paths, value_set=pa.array(sorted(folders), pa.large_string())).to_numpy()
    if is_folder.any():
        record = int(is_folder.argmax())
        raise RecordError(
            f"{store.path}: record {record}: its name {paths[record].as_py()!r} is also a folder; {_USE_TAR}"
        )


def is_case_sensitive(folder: Path) -> bool:
    """Return whether the file system of a folder distinguishes the names ``a`` and ``A``."""
    probe = folder / "case"
    probe.touch()
    try:
        return not (folder / "CASE").exists()
    finally:
        probe.unlink()
