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
from dali_lmdb.threads import threads_per_rank

__all__ = ["check_target", "read_tuned", "with_tuned", "write_tuned"]

_log = logging.getLogger("dali_lmdb")

_TUNED: dict[str, tuple[type, ...]] = {
    "num_threads": (int,),
    "prefetch_queue_depth": (int,),
    "readahead_bytes": (int,),
    "decode_device": (str,),
    "hw_decoder_load": (int, float),
}
"""The arguments that such a file may hold, and the types of their values."""

_FORMAT = "dali_lmdb tuned 1"
_MAX_BYTES = 1 << 20


def check_target(path: str | os.PathLike[str]) -> None:
    """Refuse a file that ``write_tuned`` must not replace, or cannot write.

    Raises:
        StateError: it is something else than such a file, or its folder does not exist or is not writable.
    """
    if not Path(path).parent.is_dir():
        raise StateError(f"{path}: its folder does not exist; create it first")
    if not os.access(Path(path).parent, os.W_OK | os.X_OK):
        raise StateError(f"{path}: its folder is not writable; choose another")
    if os.path.lexists(path):
        read_tuned(path)


def write_tuned(path: str | os.PathLike[str], values: dict[str, Any], *, machine: dict[str, Any]) -> None:
    """Write arguments, by name; others are left at their defaults.

    Args:
        machine: where they were found, in plain types: ``cores``, and ``workers``, the threads that are one rank's
            share, with which the search began.

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


def read_tuned(path: str | os.PathLike[str], *, ranks_per_node: int | None = None) -> dict[str, Any]:
    """Read arguments; log a warning if they were found with another number of cores.

    ``num_threads`` is less than in the file if this rank's share of the cores is less than what the search began
    with: otherwise 8 ranks would each take the threads that are right for one.

    Args:
        ranks_per_node: of ``threads_per_rank``.

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
        if content["format"] != _FORMAT or not set(values) <= set(_TUNED):
            raise ValueError("other entries")
        for name, value in values.items():
            if type(value) not in _TUNED[name]:
                raise ValueError(f"{name} is {value!r}")
        DaliSettings(**values)
        cores, share = machine["cores"], threads_per_rank(ranks_per_node)
        began_with = machine.get("workers", threads_per_rank(1))
        if not (type(cores) is type(began_with) is int and min(cores, began_with) > 0):
            raise ValueError(f"cores and workers are {cores!r} and {began_with!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StateError(f"{path}: not a file of dali-lmdb tune --save: {error}; run it again") from error
    if cores != len(os.sched_getaffinity(0)):
        _log.warning(
            "%s: found with %d cores, this process may use %d; run dali-lmdb tune again here",
            path,
            cores,
            len(os.sched_getaffinity(0)),
        )
    if "num_threads" in values and share < began_with:
        values["num_threads"] = max(1, values["num_threads"] * share // began_with)
    return dict(values)


def with_tuned(settings: DaliSettings, path: str | os.PathLike[str]) -> DaliSettings:
    """Settings with a file's values in place of those that are at their defaults."""
    defaults = DaliSettings()
    found = read_tuned(path).items()
    values = {name: value for name, value in found if getattr(settings, name) == getattr(defaults, name)}
    return dataclasses.replace(settings, **values)
