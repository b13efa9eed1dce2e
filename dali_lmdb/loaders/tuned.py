"""Files of ``dali-lmdb tune --save``: arguments of ``DaliLoader`` that were found to be fast on a machine."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

from dali_lmdb.disk import os_errors
from dali_lmdb.errors import StateError
from dali_lmdb.loaders.settings import DaliSettings
from dali_lmdb.store.regular import check_regular

__all__ = ["TUNED", "check_target", "read_tuned", "with_tuned", "write_tuned"]

_log = logging.getLogger("dali_lmdb")

TUNED = ("num_threads", "prefetch_queue_depth", "readahead_bytes", "decode_device", "hw_decoder_load")
"""The arguments that such a file may hold."""

_FORMAT = "dali_lmdb tuned 1"
_MAX_BYTES = 1 << 20


def check_target(path: str | os.PathLike[str]) -> None:
    """Refuse a file that ``write_tuned`` must not replace, or cannot write.

    Raises:
        StateError: it is something else than such a file, or its folder does not exist.
    """
    if not Path(path).parent.is_dir():
        raise StateError(f"{path}: its folder does not exist; create it first")
    if os.path.lexists(path):
        read_tuned(path)


def write_tuned(path: str | os.PathLike[str], values: dict[str, Any], *, machine: dict[str, Any]) -> None:
    """Write arguments, by name; others are left at their defaults.

    Args:
        machine: where they were found, in plain types.

    Raises:
        StateError: the file cannot be written.
    """
    partial = Path(f"{os.fspath(path)}.partial")
    text = json.dumps({"format": _FORMAT, "values": values, "machine": machine}, indent=1)
    with os_errors(path, "cannot be written", StateError):
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read_tuned(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read arguments; log a warning if they were found with another number of cores.

    Raises:
        StateError: the file cannot be read, or is none of ``write_tuned``.
    """
    with os_errors(path, "cannot be read", StateError):
        if check_regular(path, error=StateError).st_size > _MAX_BYTES:
            raise StateError(f"{path}: too large for a file of dali-lmdb tune --save")
        text = Path(path).read_bytes()
    try:
        content = json.loads(text)
        values, machine = content["values"], content["machine"]
        if content["format"] != _FORMAT or not set(values) <= set(TUNED):
            raise ValueError("other entries")
        DaliSettings(**values)
        cores = int(machine["cores"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StateError(f"{path}: not a file of dali-lmdb tune --save: {error}; run it again") from error
    if cores != len(os.sched_getaffinity(0)):
        _log.warning(
            "%s: found with %d cores, this process may use %d; run dali-lmdb tune again here",
            path,
            cores,
            len(os.sched_getaffinity(0)),
        )
    return dict(values)


def with_tuned(settings: DaliSettings, path: str | os.PathLike[str]) -> DaliSettings:
    """Settings with a file's values in place of those that are at their defaults."""
    defaults = DaliSettings()
    found = read_tuned(path).items()
    values = {name: value for name, value in found if getattr(settings, name) == getattr(defaults, name)}
    return dataclasses.replace(settings, **values)
