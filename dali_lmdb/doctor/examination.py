"""All checks, each on its own: one that fails says why, and the others go on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dali_lmdb.doctor import libraries, machine, storage
from dali_lmdb.doctor.findings import Finding, unknown
from dali_lmdb.doctor.processes import Reply, ask
from dali_lmdb.errors import one_line

__all__ = ["examine"]

Check = Callable[[], Iterable[Finding]]


def examine(
    store: str | os.PathLike[str] | None = None,
    *,
    root: Path = Path("/"),
    probe: Callable[[Sequence[str]], dict[str, Reply]] = ask,
) -> list[Finding]:
    """Check this machine and, if given, a store on it; raises nothing that a check may raise.

    Args:
        root: where ``proc``, ``sys`` and ``dev`` are.
        probe: asks about libraries by name in processes of their own, see ``probe.py``.
    """
    found = probe(["torch", "dali"])
    torch, dali = found["torch"], found["dali"]
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
        path = Path(store)
        checks |= {
            "store": lambda: storage.store(path),
            "file system": lambda: storage.file_system(path, root),
            "page cache": lambda: storage.page_cache(path, root),
        }
    return [finding for name, check in checks.items() for finding in _found(name, check)]


def _found(name: str, check: Check) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:
        return [unknown(name, one_line(f"cannot be found out: {error or type(error).__name__}"))]
