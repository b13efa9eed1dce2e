"""Folders of images packed as the other kinds of source, and what a source or store holds, to compare."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dali_lmdb.store import open_store


def image_paths(folder):
    """Paths of all image files below a folder, relative, in no particular order."""
    return [
        path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.suffix.lower() == ".jpg"
    ]


def pack(path, members):
    """A tar of (name, bytes) or ``tarfile.TarInfo``, in that order."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                name, data = member
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def pack_folder(path, folder, *, prefix=""):
    """A tar of class folders, members in an order that is not that of the records."""
    names = sorted(image_paths(folder), reverse=True)
    return pack(path, [(prefix + name, (Path(folder) / name).read_bytes()) for name in names])


def write_parquet(path, rows, *, names=None, row_group_size=None, image_type=None, columns=("image", "label")):
    """Rows of (path, bytes, label) as Hugging Face writes them, with class names in the schema's metadata."""
    image_type = image_type or pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image, label = columns
    schema = pa.schema([(image, image_type), (label, pa.int64())])
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    images = [None if data is None and path is None else {"bytes": data, "path": path} for path, data, _ in rows]
    labels = [label for _, _, label in rows]
    table = pa.table([pa.array(images, image_type), pa.array(labels, pa.int64())], schema=schema)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def records_of(path):
    """(classes, [(name, label, bytes)]) of a store."""
    with open_store(path) as store:
        rows = [(store.name(i), int(store.labels[i]), bytes(store.read(i))) for i in range(len(store))]
        return store.classes, rows


def items_of(source):
    """(classes, [(name, label, bytes)]) of a source."""
    count = source.count()
    rows = [(item.name, item.label, item.read()) for item in source.items()]
    assert count == len(rows)
    return source.classes, rows
