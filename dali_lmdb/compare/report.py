"""What all results contain: versions, machine, and the spread of the rounds.

The scripts in ``scripts/benchmarks/`` use it too.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dali_lmdb.errors import one_line
from dali_lmdb.loaders.versions import nvimagecodec_version, nvjpeg_version

__all__ = ["Measured", "driver_of", "machine", "spread", "versions"]


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

    def _described(self, **figures: Any) -> dict[str, Any]:
        """Convert to plain types for JSON, with the figures between the settings and the versions."""
        return {
            "store": self.store,
            "num_records": self.num_records,
            "image_bytes": self.image_bytes,
            "settings": asdict(self.settings),
            **figures,
            "versions": self.versions,
            "machine": self.machine,
        }


def versions() -> dict[str, str]:
    """Versions by name of Python, this package and the packages and libraries that affect the speed."""
    names = ["dali-lmdb", "torch", "torchvision", "nvidia-dali-cuda120", "pillow", "lmdb", "numpy"]
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    libraries = {"nvimagecodec": nvimagecodec_version(), "nvjpeg": nvjpeg_version()}
    return found | {name: ".".join(map(str, numbers or ["unknown"])) for name, numbers in libraries.items()}


def spread(rounds: list[float]) -> dict[str, Any]:
    """The median, minimum and maximum of some rounds, and the rounds."""
    return {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds), "rounds": rounds}


def machine(device: str) -> dict[str, Any]:
    """``system``, ``cpu``, ``cores``, the ``gpu`` and its ``driver``; the last two are None on the CPU."""
    on_gpu = device == "cuda"
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "driver": driver_of(_read("/proc/driver/nvidia/version")) if on_gpu else None,
    }


def driver_of(text: str) -> str:
    """The driver's version, from the text of ``/proc/driver/nvidia/version``."""
    found = re.search(r"Kernel Module\D.*?(\d+(?:\.\d+)+)", text)
    return found[1] if found else "unknown"


def _cpu_name() -> str:
    lines = _read("/proc/cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
