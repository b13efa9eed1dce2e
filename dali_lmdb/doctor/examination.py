"""All checks, each on its own: one that fails says why, and the others go on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dali_lmdb.doctor import libraries, machine, storage
from dali_lmdb.doctor.findings import Check, Finding, found, unknown, warning
from dali_lmdb.doctor.processes import Reply, ask

__all__ = ["examine"]


def examine(
    store: str | os.PathLike[str] | None = None,
    *,
    root: Path = Path("/"),
    probe: Callable[[Sequence[str]], dict[str, Reply]] | None = None,
) -> list[Finding]:
    """Check this machine and, if given, a store on it; raises nothing that a check may raise.

    Args:
        root: where ``proc``, ``sys`` and ``dev`` are.
        probe: asks about libraries and the store by name in processes of their own, see ``probe.py``.
    """
    probe = probe or partial(ask, store=store or "")
    replies = probe(["torch", "dali", *([] if store is None else storage.CHECKS)])
    torch, dali = replies["torch"], replies["dali"]
    gpu = probe(["gpu"])["gpu"] if dali.value and torch.value and torch.value["gpus"] else None
    checks: dict[str, Check] = {
        "versions": libraries.versions,
        "torch": lambda: libraries.torch(torch),
        "driver": lambda: libraries.driver(root, torch),
        "GPUs": lambda: libraries.gpus(root, torch),
        "DALI": lambda: libraries.dali(dali),
        "GPU decoding": lambda: libraries.gpu_decoding(dali, gpu),
        "NCCL": lambda: libraries.nccl(torch),
        "cores": lambda: machine.cores(root),
        "memory": lambda: machine.memory(root),
        "processes": lambda: machine.processes(root),
        "open files": machine.open_files,
        "other limits": machine.other_limits,
        "shared memory": lambda: machine.shared_memory(root),
    }
    if store is not None:
        checks |= {name: partial(_of_store, name, store, replies[name]) for name in storage.CHECKS}
    return [finding for name, check in checks.items() for finding in found(name, check)]


def _of_store(name: str, store: str | os.PathLike[str], reply: Reply) -> list[Finding]:
    """What a check of the store has found; why it did not end, if so."""
    if reply.value is not None:
        return [Finding(**values) for values in reply.value]
    if name != "store":
        return [unknown(name, f"cannot be found out: {reply.cause}")]
    path = os.fspath(store)
    return [warning(name, f"{path}: its check {reply.cause}", f"see whether its disk answers: ls -l {path}")]
