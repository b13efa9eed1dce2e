"""What all results contain: versions, machine, and the spread of the rounds.

The scripts in ``scripts/benchmarks/`` use it too.
"""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from dali_lmdb.errors import one_line

__all__ = ["Measured", "machine", "spread", "versions"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured, how and where; subclasses add the figures."""

    store: str
    num_records: int
    image_bytes: int
    """Total size of all records."""
    settings: Any
    """The settings that were used, fitted to the store."""
    versions: dict[str, str]
    machine: dict[str, Any]

    def heading(self, *lines: str) -> str:
        """The lines above a table: the store, the lines given, the machine."""
        return "\n".join(
            [
                f"{one_line(self.store)}: {self.num_records:,} records, {self.image_bytes / 1e6:,.1f} MB",
                *lines,
                f"{self.machine['gpu'] or 'no GPU used'}, {self.machine['cores']} cores of {self.machine['cpu']}",
                "",
            ]
        )

    def _described(self, **found: Any) -> dict[str, Any]:
        """Convert to plain types for JSON, with the figures between the settings and the versions."""
        return {
            "store": self.store,
            "num_records": self.num_records,
            "image_bytes": self.image_bytes,
            "settings": asdict(self.settings),
            **found,
            "versions": self.versions,
            "machine": self.machine,
        }


def versions() -> dict[str, str]:
    """Versions by name of Python, this package and the packages that affect the speed."""
    names = ["dali-lmdb", "torch", "torchvision", "nvidia-dali-cuda120", "pillow", "lmdb", "numpy"]
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def spread(rounds: list[float]) -> dict[str, Any]:
    """The median, minimum and maximum of some rounds, and the rounds."""
    return {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds), "rounds": rounds}


def machine(device: str) -> dict[str, Any]:
    """``system``, ``cpu``, ``cores`` and ``gpu``: its name with device ``"cuda"``, else None."""
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
