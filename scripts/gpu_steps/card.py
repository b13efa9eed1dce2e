"""The card: its name and driver, the libraries' versions, and how busy its engines are."""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dali_lmdb.compare.report import machine
from dali_lmdb.compare.report import versions as package_versions
from dali_lmdb.loaders.settings import Device
from dali_lmdb.loaders.versions import nvimagecodec_version, nvjpeg_version
from gpu_steps.isolated import Row

__all__ = ["Utilization", "loaded_nvjpeg", "synchronize", "used_bytes", "utilization", "versions"]

_SAMPLE_S = 0.02  # NVML updates its figures every 20 ms, or less often


def versions(device: Device) -> Iterator[Row]:
    """What is installed, and the machine, one item a row."""
    found: dict[str, Any] = package_versions() | machine(device)
    found["nvimagecodec"] = ".".join(map(str, nvimagecodec_version()))
    nvjpeg = nvjpeg_version()
    found["nvjpeg"] = "not found" if nvjpeg is None else ".".join(map(str, nvjpeg))
    found["cuda of torch"] = torch.version.cuda
    if device == "cuda":
        card = torch.cuda.get_device_properties()
        found["gpu memory"] = f"{card.total_memory / 2**30:.1f} GiB"
        found["compute capability"] = f"{card.major}.{card.minor}"
        nvml = _nvml()
        found["driver"] = "unknown" if nvml is None else nvml[0].system_get_driver_version()
    for what, value in found.items():
        yield {"what": what, "value": value}


def loaded_nvjpeg() -> str:
    """The path of the nvJPEG library that this process has loaded; empty if it has not."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/libnvjpeg.so" in line}
    return ", ".join(sorted(os.path.realpath(path) for path in paths))


def used_bytes() -> int:
    """Memory in use on the current GPU by all processes, apart from what torch has reserved in this one."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def synchronize(device: Device) -> None:
    """Wait for all work given to the device."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Utilization:
    """Samples of how busy a GPU was, in percent; empty where NVML does not say."""

    gpu: list[int] = field(default_factory=list)
    jpeg: list[int] = field(default_factory=list)

    def to_row(self) -> Row:
        """The means, None where there are no samples."""
        means = {"GPU %": self.gpu, "JPEG engine %": self.jpeg}
        return {name: round(statistics.mean(values)) if values else None for name, values in means.items()}


@contextmanager
def utilization(device: Device) -> Iterator[Utilization]:
    """Sample the current GPU's utilization while the block runs."""
    found, stop = Utilization(), threading.Event()
    nvml = _nvml() if device == "cuda" else None
    if nvml is None:
        yield found
        return
    thread = threading.Thread(target=_sample, args=(*nvml, found, stop))
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def _sample(nvml: Any, handle: int, found: Utilization, stop: threading.Event) -> None:
    while not stop.wait(_SAMPLE_S):
        try:
            found.gpu.append(nvml.device_get_utilization_rates(handle).gpu)
            found.jpeg.append(nvml.device_get_jpg_utilization(handle)[0])
        except nvml.NvmlError:  # some cards do not report it, nor do MIG instances
            return


def _nvml() -> tuple[Any, int] | None:
    """NVML and its handle of the current GPU; None if there is no NVML; the reason is printed."""
    try:
        from cuda.bindings import nvml  # comes with torch
    except ImportError as error:
        print(f"no NVML: {error}")
        return None
    try:
        nvml.init_v2()
        return nvml, nvml.device_get_handle_by_uuid(f"GPU-{torch.cuda.get_device_properties().uuid}")
    except (RuntimeError, nvml.NvmlError) as error:  # no driver; or it does not know the card
        print(f"no NVML: {error}")
        return None
