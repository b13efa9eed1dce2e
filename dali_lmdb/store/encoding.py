"""Index and names as Arrow IPC streams of one batch each."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import pyarrow as pa

__all__ = ["ARROW_ERRORS", "columns_of", "from_ipc", "read_batch", "to_ipc", "write_ipc"]

ARROW_ERRORS = (
    pa.ArrowException,
    StopIteration,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
)
"""Errors that ``read_batch`` and pyarrow raise for malformed bytes; not all of them are an ArrowException."""

# A schema of n bytes may describe 8 * n fields (max_tables in Arrow's VerifyMessage). Ours and those of
# pa.serialize take less than 1 KB.
_MAX_SCHEMA_BYTES = 16 << 10


def write_ipc(sink: Any, columns: Mapping[str, Any], schema: pa.Schema) -> None:
    """Write columns named as in ``schema``, arrays of shape (n,), to a file or Arrow stream."""
    batch = pa.RecordBatch.from_pydict(columns, schema=schema)
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(batch)


def to_ipc(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Buffer:
    """Encode columns, see ``write_ipc``."""
    sink = pa.BufferOutputStream()
    write_ipc(sink, columns, schema)
    return sink.getvalue()


def read_batch(buffer: pa.Buffer, *, num_rows: int | None = None) -> pa.RecordBatch:
    """Decode the first batch of a stream, as views of its bytes; no memory is allocated for its columns.

    Args:
        num_rows: refuse another number of rows before they are validated.

    Raises:
        ARROW_ERRORS: there is no batch, it is not valid, or it is compressed or dictionary-encoded, so that a few
            bytes could stand for gigabytes.
    """
    messages = pa.ipc.MessageReader.open_stream(buffer)
    if messages.read_next_message().metadata.size > _MAX_SCHEMA_BYTES:
        raise pa.ArrowInvalid("a schema of unexpected size")
    message = messages.read_next_message()
    if message.type != "record batch" or _may_be_compressed(message.metadata):
        raise pa.ArrowInvalid("a compressed or dictionary-encoded batch")
    batch = pa.ipc.open_stream(buffer).read_next_batch()
    if num_rows is not None and batch.num_rows != num_rows:
        raise pa.ArrowInvalid(f"{batch.num_rows} rows, expected {num_rows}")
    batch.validate(full=True)  # Arrow does not check strings' offsets otherwise; 0.6 ms for 131,072 names
    return batch


def from_ipc(view: Any, schema: pa.Schema, *, num_records: int) -> pa.RecordBatch | None:
    """Decode a stream of one batch without copying it.

    Returns:
        The batch; None unless the stream holds one with this schema (its metadata may differ), this number of
        records and no nulls.
    """
    try:
        batch = read_batch(pa.py_buffer(view), num_rows=num_records)
    except ARROW_ERRORS:
        return None
    if batch.schema != schema or any(c.null_count for c in batch.columns):
        return None
    return batch


def columns_of(batch: pa.RecordBatch) -> dict[str, npt.NDArray[Any]]:
    """The columns of an index as numpy arrays, without copying."""
    return {name: batch.column(name).to_numpy(zero_copy_only=True) for name in batch.schema.names}


def _may_be_compressed(metadata: pa.Buffer) -> bool:
    """Whether the metadata of a record batch, which Arrow has verified, names a compression.

    In Arrow's ``Message.fbs``, field 2 of ``Message`` is the batch, whose field 3 is the compression; field 4
    holds key-value pairs, where early versions kept it.
    """
    view = memoryview(metadata)
    message = struct.unpack_from("<I", view)[0]
    header = _field(view, message, 2)
    batch = header + struct.unpack_from("<I", view, header)[0]
    return bool(_field(view, batch, 3) or _field(view, message, 4))


def _field(view: memoryview, table: int, number: int) -> int:
    """Position of a field of a flatbuffers table; 0 if it is absent."""
    vtable = table - struct.unpack_from("<i", view, table)[0]
    (num_bytes,) = struct.unpack_from("<H", view, vtable)
    entry = 4 + 2 * number
    offset: int = struct.unpack_from("<H", view, vtable + entry)[0] if entry + 2 <= num_bytes else 0
    return table + offset if offset else 0
