"""Records that have killed a run: named when it dies, found when it resumes, and refused from then on."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from dali_lmdb.disk import os_errors
from dali_lmdb.errors import DaliLmdbError, StateError
from dali_lmdb.loaders.dali_loader import DaliLoader
from dali_lmdb.loaders.in_flight import read_left_over
from dali_lmdb.loaders.lines import write_line
from dali_lmdb.store import open_store
from dali_lmdb.store.regular import check_regular
from dali_lmdb.torchrun import RankEnvironment

__all__ = ["FILE_NAME", "in_flight_path", "refuse_crashing", "what_was_decoded"]

FILE_NAME = "crashing.jsonl"

_NAMED = 3  # records that a message names
_FIELDS = {"fingerprint": str, "index": int, "name": str, "cause": str}

_Causes = dict[str, dict[int, str]]
"""Why records crash a decoder, by fingerprint of the store and index."""

_log = logging.getLogger(__name__)


def in_flight_path(output: str | os.PathLike[str], split: str, rank: int) -> Path:
    """The file in which a rank keeps what it is decoding.

    Args:
        split: ``"train"`` or ``"val"``.
    """
    return Path(output) / f"in-flight-{split}-{rank}"


def what_was_decoded(output: str | os.PathLike[str], stores: Mapping[str, str], *, rank: int) -> str:
    """Say which records a dead rank was decoding, and what to do, as the end of a message; empty if none.

    Args:
        stores: paths of the stores, by split.
    """
    parts = []
    for split, path in stores.items():
        left_over = read_left_over(in_flight_path(output, split, rank))
        if left_over is None or not left_over.records:
            continue
        with contextlib.suppress(DaliLmdbError), open_store(path) as store:
            if store.fingerprint != left_over.fingerprint:
                continue
            records = [record for record in left_over.records if record < len(store)]
            named = ", ".join(f"{record} ({store.name(record)})" for record in records[:_NAMED])
            more = f" and {len(records) - _NAMED} more" if len(records) > _NAMED else ""
            parts.append(f"{len(records)} records of {path}: {named}{more}")
    if not parts:
        return ""
    return (
        f" while it decoded {'; '.join(parts)}; continue with --resume --on-bad substitute, which finds those "
        "that crash the decoder and uses others in their place"
    )


def refuse_crashing(
    loaders: Mapping[str, DaliLoader], *, output: str | os.PathLike[str], ranks: RankEnvironment
) -> None:
    """Keep records that have killed an earlier run in ``output`` from being decoded again; a collective.

    On each machine one rank decodes, in a process of its own, what dead ranks were decoding, however many ranks
    there were. Rank 0 remembers those that crash it in ``FILE_NAME``.

    Args:
        loaders: the loaders, by split; they must not have been used.

    Raises:
        StateError: ``FILE_NAME`` cannot be read or written.
        DeviceError: not even a blank image can be decoded.
    """
    output = Path(output)
    left_over = [path for split in loaders for path in sorted(output.glob(f"in-flight-{split}-*"))]
    found: _Causes = {}
    if ranks.local_rank == 0:
        for split, loader in loaders.items():
            found.setdefault(loader.store.fingerprint, {}).update(_find(loader, left_over, split=split))
    known = _agree(found, loaders, output=output, ranks=ranks)
    for loader in loaders.values():
        loader.refuse(known.get(loader.store.fingerprint, {}))
    if ranks.local_rank == 0:  # not before they are remembered
        for path in left_over:
            with contextlib.suppress(OSError):
                path.unlink()
    if ranks.world_size > 1:
        dist.barrier()  # the names are free for new files


def _find(loader: DaliLoader, left_over: list[Path], *, split: str) -> dict[int, str]:
    """Those records of a loader that dead ranks were decoding, and that crash the decoder."""
    found: dict[int, str] = {}
    for path in left_over:
        read = read_left_over(path)
        if not path.name.startswith(f"in-flight-{split}-") or read is None or not read.records:
            continue
        if read.fingerprint != loader.store.fingerprint:
            continue
        _log.warning(
            "%s: the last run ended while it decoded %d records of %s; looking for any that crash the decoder",
            path,
            len(read.records),
            loader.store.path,
        )
        found |= loader.find_crashing(read.batches)
    return found


def _agree(found: _Causes, loaders: Mapping[str, DaliLoader], *, output: Path, ranks: RankEnvironment) -> _Causes:
    """What all ranks have found, now and in earlier runs; a collective."""
    gathered = [found]
    if ranks.world_size > 1:
        gathered = [{} for _ in range(ranks.world_size)]
        dist.all_gather_object(gathered, found)
    known: _Causes = {}
    if ranks.rank == 0:
        known = _read(output / FILE_NAME)
        for loader in loaders.values():
            ours = known.setdefault(loader.store.fingerprint, {})
            causes = {k: v for one in gathered for k, v in one.get(loader.store.fingerprint, {}).items()}
            _append(output / FILE_NAME, loader, {index: causes[index] for index in sorted(causes.keys() - ours)})
            ours |= causes
    agreed = [known]
    if ranks.world_size > 1:
        dist.broadcast_object_list(agreed, src=0)
    return agreed[0]


def _read(path: Path) -> _Causes:
    known: _Causes = {}
    with os_errors(path, "cannot be read", StateError):
        if not os.path.lexists(path):
            return known
        check_regular(path, error=StateError)
        lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if {name: type(values[name]) for name in _FIELDS} != _FIELDS:
                raise ValueError("not such an object")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StateError(
                f"{path}: line {number} is not an object with {', '.join(_FIELDS)}; remove the line"
            ) from error
        known.setdefault(values["fingerprint"], {})[values["index"]] = values["cause"]
    return known


def _append(path: Path, loader: DaliLoader, causes: Mapping[int, str]) -> None:
    """Add records to the file, and say so."""
    if not causes:
        return
    with (
        os_errors(path, "cannot be written", StateError),
        io.FileIO(path, "a", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)) as file,
    ):
        for index, cause in causes.items():
            name = loader.store.name(index)
            values = (loader.store.fingerprint, index, name, cause)
            write_line(file, dict(zip(_FIELDS, values, strict=True)))
            _log.warning("%s crashes the decoder; it is not decoded again: %s", loader.store.where(index), cause)
        os.fsync(file.fileno())
