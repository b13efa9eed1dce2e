"""Detect what kind of source a path is; refuse a path that is ambiguous."""

from __future__ import annotations

import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple, NoReturn

from dali_lmdb.convert.sources._archive import COMPRESSED, Archive
from dali_lmdb.convert.sources._contents import TarContents
from dali_lmdb.convert.sources._files import is_file, is_folder, list_folder, reading
from dali_lmdb.convert.sources._names import listed
from dali_lmdb.convert.sources._patterns import SPLITS
from dali_lmdb.convert.sources.folder import advice_below, has_images
from dali_lmdb.convert.sources.tar import class_of_tar, common_top, is_tar_name
from dali_lmdb.errors import SourceError
from dali_lmdb.images.names import is_image_name
from dali_lmdb.store.regular import check_regular
from dali_lmdb.store.shards import shard_files

__all__ = ["kind_of", "kind_of_several"]

_LMDB_MAGIC = b"\xde\xc0\xef\xbe"  # MDB_MAGIC of lmdb's mdb.c, little-endian, after a page header of 16 bytes
_SYNSET = re.compile(r"n\d{8}")  # a WordNet noun ID; ImageNet's class names
_UNLIKELY_CLASSES = SPLITS | {"data", "image", "images", "img", "imgs"}
_COMPRESSED_TARS = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_EXPECTED = (
    "expected a folder of class folders, a tar or WebDataset shards, Parquet files, a CSV or TSV with path "
    "and label, or an LMDB file"
)


def kind_of(path: str) -> str:
    """Detect the kind of source at a path, or ``"lmdb"`` for a classic database or a store.

    Raises:
        SourceError: the path does not exist, cannot be converted, or is ambiguous.
    """
    if os.path.isdir(path):
        return _kind_of_folder(path)
    try:
        os.lstat(path)
    except FileNotFoundError:
        if shard_files(path):  # the name that a set of shards was converted to
            return "lmdb"
        raise SourceError(f"{path}: no such file or folder; {_EXPECTED}") from None
    except (OSError, ValueError) as error:  # too long, a file used as a folder, a NUL
        raise SourceError(f"{path!r}: not a usable path: {error}") from error
    kind = _kind_of_file(path)
    return _kind_of_tar(path) if kind == "tar" else kind


def kind_of_several(pattern: str, files: list[str]) -> str:
    """Detect the kind that several files, matched by a pattern, have in common.

    Raises:
        SourceError: as for ``kind_of``; the files are of different kinds, or each is a source of its own.
    """
    by_kind: dict[str, list[str]] = defaultdict(list)
    for file in files:
        by_kind["folder" if os.path.isdir(file) else _kind_of_file(file)].append(file)
    (kind, *others) = by_kind
    if others:
        found = " and ".join(f"{kind} ({listed(by_kind[kind])})" for kind in by_kind)
        raise SourceError(f"{pattern}: files of different kinds, {found}; give a pattern for one of them")
    return _kind_of_tars(pattern, files) if kind == "tar" else kind


# Folders.


def _kind_of_folder(folder: str) -> str:
    by_format: dict[str, list[str]] = defaultdict(list)
    entries = list_folder(folder)
    _refuse_saved_to_disk(folder, {entry.name for entry in entries})
    shards = {file.name for file in shard_files(folder) or ()}
    for entry in entries:
        if not entry.name.startswith("."):
            by_format["lmdb" if entry.name in shards else _format_of(entry)].append(entry.name)
    beside = by_format.pop("file", []) + by_format.get("image", [])
    if "folder" in by_format:
        by_format.pop("image", None)  # reported and left out; ImageFolder ignores them too
    if len(by_format) > 1:
        _refuse_mixture(folder, by_format)
    if not by_format:
        return "folder"
    ((found, names),) = by_format.items()
    if found == "folder":
        tables = [name for name in beside if _is_table(name.lower()) or is_image_name(name)]
        classes = {name: _class_folder(os.path.join(folder, name)) for name in names}
        if len(names) == 1:
            _check_only_folder(folder, names[0], classes[names[0]], beside=listed(tables))
        _check_class_folders(folder, classes, beside=listed(tables), kind="folder")
    elif found == "tar":
        return _kind_of_tars(folder, [os.path.join(folder, name) for name in names])
    elif found == "image":
        raise SourceError(
            f"{folder}: images, but no class folders; give their labels with --val-labels FILE, or a CSV "
            "with path and label in place of the folder"
        )
    elif found == "compressed tar":
        raise SourceError(
            f"{folder}: compressed tars ({listed(names)}); images are read in place, so decompress them first"
        )
    elif found == "lmdb" and names != ["data.mdb"] and set(names) != shards:
        raise SourceError(
            f"{folder}: LMDB databases ({listed(names)}), expected the shards of one store; name one"
        )
    return found


def _refuse_saved_to_disk(folder: str, names: set[str]) -> None:
    """Refuse what Hugging Face's ``save_to_disk`` writes: Arrow files, not Parquet."""
    splits = "['train']" if "dataset_dict.json" in names else ""
    if splits or {"dataset_info.json", "state.json"} <= names:
        raise SourceError(
            f"{folder}: a data set that save_to_disk wrote, in Arrow files, expected Parquet; write that with: "
            f"datasets.load_from_disk({folder!r}){splits}.to_parquet('train.parquet')"
        )


def _format_of(entry: os.DirEntry[str]) -> str:
    """What a folder's entry is by its name: a kind of source, ``"image"``, ``"compressed tar"`` or ``"file"``."""
    name = entry.name.lower()
    if is_folder(entry):
        return "lmdb" if os.path.exists(os.path.join(entry.path, "data.mdb")) else "folder"
    if not is_file(entry):
        return "file"
    if is_image_name(name):
        return "image"
    if name.endswith((".lmdb", ".parquet", ".tar")):
        return name.rpartition(".")[2]
    if name == "data.mdb":
        return "lmdb"
    return "compressed tar" if name.endswith(_COMPRESSED_TARS) else "file"


def _is_table(name: str) -> bool:
    return name.endswith((".csv", ".tsv")) and not name.endswith(".bad.tsv")  # the converter's report


def _refuse_mixture(folder: str, by_format: Mapping[str, list[str]]) -> NoReturn:
    sources = {"folder": "folder", "tar": "webdataset, imagenet-tar", "parquet": "parquet", "lmdb": "store"}
    found = " and ".join(f"{name} ({listed(names)})" for name, names in by_format.items())
    kinds = ", ".join(sources[name] for name in by_format if name in sources)
    raise SourceError(
        f"{folder}: {found} side by side, expected data of one kind; move the others away, or say which to take "
        f"with --source ({kinds})"
    )


class _ClassFolder(NamedTuple):
    """What lies directly in a possible class folder."""

    has_image: bool
    folders: set[str]


def _class_folder(path: str) -> _ClassFolder:
    """Inspect a folder, up to its first image."""
    folders = set()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if is_folder(entry):
                    folders.add(entry.name)
                elif is_image_name(entry.name):
                    return _ClassFolder(True, set())
    except OSError:  # the source reports it later
        return _ClassFolder(True, set())
    return _ClassFolder(False, {name for name in folders if not name.startswith(".")})


def _check_only_folder(where: str, name: str, found: _ClassFolder, *, beside: str) -> None:
    """Refuse a lone folder without images of its own, such as ``data``, that is likely the source or above it."""
    if found.has_image or not (beside or name.lower() in _UNLIKELY_CLASSES or len(found.folders) > 1):
        return
    what = f"{where}: one folder, {listed([name])}, without images in it"
    advice = advice_below(where)
    if has_images(os.path.join(where, name)):
        if advice:
            raise SourceError(
                f"{what}, expected a folder for each class; {advice}, or give --source folder to make it a class"
            )
    elif advice:
        raise SourceError(f"{what}; {advice}")
    else:
        raise SourceError(f"{what} or below, expected a folder of images for each class; add them")


def _check_class_folders(where: str, classes: Mapping[str, _ClassFolder], *, beside: str, kind: str) -> None:
    """Refuse folders that may not be classes: splits, folders of class folders, or a single folder.

    Args:
        beside: images and tables beside the folders.
        kind: the ``--source`` that converts them anyway.
    """
    names = sorted(classes)
    splits = [name for name in names if name.lower() in SPLITS]
    one = "convert one of them" if kind == "folder" else "pack one of them by itself"
    if kind == "folder" and len(splits) > 1:
        one = "convert " + " and ".join(f"{os.path.join(where, split)} to {split}.lmdb" for split in splits[:3])
    instead = f"or give --source {kind} to make each folder a class: {listed(names)}"
    for name in names:
        folders = sorted(classes[name].folders)
        if len(folders) > 1 and not classes[name].has_image:
            raise SourceError(
                f"{where}: folder {listed([name])} holds folders ({listed(folders)}) but no images, expected "
                f"class folders of images; {one}, {instead}"
            )
    if len(splits) > 1:
        raise SourceError(f"{where}: folders of several splits ({listed(splits)}); {one}, {instead}")
    if len(names) == 1 and (beside or names[0].lower() in _UNLIKELY_CLASSES):
        found = f"one folder, {listed(names)}" + (f", beside {beside}" if beside else "")
        raise SourceError(
            f"{where}: {found}, expected a folder for each class; give the images' labels with --val-labels FILE, "
            f"or a CSV with path and label in place of the folder, {instead}"
        )


# Files.


def _kind_of_file(path: str) -> str:
    """Kind by first bytes or name; "tar" for every tar."""
    with reading(path):
        check_regular(path, error=SourceError)
        with open(path, "rb") as stream:
            head = stream.read(tarfile.BLOCKSIZE)
    if head[16:20] == _LMDB_MAGIC:
        return "lmdb"
    if head.startswith(b"PAR1"):
        return "parquet"
    if _is_tar_header(head) or head.startswith(tuple(COMPRESSED)) or is_tar_name(path):
        return "tar"
    if path.lower().endswith((".csv", ".tsv", ".txt")):
        return "manifest"
    if path.lower().endswith(".arrow"):
        _refuse_saved_to_disk(os.path.dirname(path) or ".", {"dataset_info.json", "state.json"})
    raise SourceError(f"{path}: not a source of images; {_EXPECTED}")


def _is_tar_header(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


# Tars.


def _kind_of_tar(path: str) -> str:
    """Kind of a tar: WebDataset if it holds labels, ImageNet's if it holds tars, else class folders."""
    archive = Archive(path)
    found = TarContents(archive)
    if found.label is not None:
        return "webdataset"
    if found.tars:
        names = [tar.path for tar in found.tars]
        if found.num_images or found.other:
            others = f"{found.num_images:,} images" if found.num_images else listed([found.other or ""])
            raise SourceError(
                f"{path}: {others} beside tars ({listed(names)}), expected only tars, one for each class; pack "
                "them separately, or say what to take with --source (tar, imagenet-tar)"
            )
        contents = ((tar.path, TarContents(archive, tar)) for tar in found.tars)
        _check_class_tars(path, contents, names, convert_it="unpack it and convert that")
        return "imagenet-tar"
    _check_folders_in_tar(path, found)
    return "tar"


def _check_folders_in_tar(path: str, found: TarContents) -> None:
    """Refuse images outside class folders, WebDataset records without labels, folders that are not classes."""
    num_loose = found.folders[""]
    folders = {folder: count for folder, count in found.folders.items() if folder}
    classes = _class_folders_in_tar(folders)
    if found.siblings:
        instead = f"give --source tar to make each folder a class: {listed(sorted(classes))}"
        if not any(folders.values()):
            instead = "give them with --val-labels FILE"
        raise SourceError(f"{path}: {_record(found.siblings)}; add the labels, or {instead}")
    if num_loose and not any(folders.values()):
        raise SourceError(
            f"{path}: {num_loose:,} images outside class folders; give their labels with --val-labels FILE"
        )
    loose = f"{num_loose:,} images" if num_loose else ""
    if found.num_images:  # else the source says what is missing
        _check_class_folders(path, classes, beside=loose, kind="tar")


def _class_folders_in_tar(folders: Mapping[str, int]) -> dict[str, _ClassFolder]:
    top = common_top(folders)
    classes: dict[str, _ClassFolder] = {}
    for path, num_images in folders.items():
        if path.startswith(top):
            name, _, below = path[len(top) :].partition("/")
            has_image, inside = classes.get(name, _ClassFolder(False, set()))
            inside |= {below.partition("/")[0]} - {""}
            classes[name] = _ClassFolder(has_image or (not below and num_images > 0), inside)
    return classes


def _kind_of_tars(where: str, files: list[str]) -> str:
    """Kind of several tars: WebDataset if all hold labels, ImageNet's class tars if named by synset."""
    contents = [(os.path.basename(file), TarContents(Archive(file))) for file in files]
    with_labels = [name for name, found in contents if found.label is not None]
    without = [name for name, found in contents if found.label is None]
    if not without:
        return "webdataset"
    if with_labels:
        raise SourceError(
            f"{where}: tars with .cls labels ({listed(with_labels)}) beside tars without ({listed(without)}), "
            "expected shards of one data set; move the others away, or give a pattern of shards"
        )
    convert_it = "convert it by itself" if len(files) == 1 else "convert one, or all joined with tar -A"
    _check_class_tars(where, contents, without, convert_it=convert_it)
    return "imagenet-tar"


def _check_class_tars(
    where: str, contents: Iterable[tuple[str, TarContents]], names: list[str], *, convert_it: str
) -> None:
    """Refuse tars that are not like ImageNet's: one for each class, with nothing but images.

    Args:
        where: the tar that holds them, their folder or pattern.
        contents: name and contents of each.
        names: all names.
        convert_it: advice for tars of folders.
    """
    classes = [class_of_tar(name) for name in names]
    instead = f"or give --source imagenet-tar to make each tar a class: {listed(sorted(classes))}"
    expected = "expected only images, of one class"
    for name, found in contents:
        what = f"{where}: {listed([name])}"
        if found.label is not None:
            raise SourceError(f"{what} has .cls labels, like a WebDataset shard; unpack the shards, then convert")
        if found.siblings:
            raise SourceError(f"{what}: {_record(found.siblings)}; add the labels, {instead}")
        if found.subfolders and (found.folders[""] or found.subfolders != [class_of_tar(name)]):
            raise SourceError(
                f"{what} holds folders ({listed(found.subfolders)}), {expected}; {convert_it}, {instead}"
            )
        if found.tars:
            inside = listed([tar.path for tar in found.tars])
            raise SourceError(f"{what} holds tars ({inside}), {expected}; {convert_it}, {instead}")
        if found.other:
            raise SourceError(f"{what} holds {listed([found.other])}, {expected}; pack it without that, {instead}")
    if not all(map(_SYNSET.fullmatch, classes)):
        raise SourceError(
            f"{where}: {len(names):,} tars of images without .cls labels, expected WebDataset shards, or a tar "
            f"for each class, named like n01440764.tar; add the labels, {instead}"
        )


def _record(siblings: tuple[str, str]) -> str:
    image, other = (listed([name]) for name in siblings)
    return f"{image} and {other} make a WebDataset record without a .cls label"
