"""Checks of the driver and the libraries: what is there, what it can do, what does not fit together."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from dali_lmdb.doctor.findings import Finding, ok, unknown, warning
from dali_lmdb.doctor.machine import gigabytes
from dali_lmdb.doctor.processes import Reply
from dali_lmdb.images.gpu_decoder import gpu_decoder

__all__ = ["dali", "driver", "gpu_decoding", "gpus", "nccl", "torch", "versions"]

_OURS = "dali-lmdb"
_CHECKED = (_OURS, "nvidia-dali-cuda120", "torch", "torchvision")
# The first driver for a CUDA version, from NVIDIA's table of minor version compatibility; DALI's build for CUDA 12
# needs the same as torch's for 12.
_DRIVERS = {12: (525, 60), 13: (580, 0)}
_DALI_DRIVER = _DRIVERS[12]
_DRIVER_PAGE = "https://docs.nvidia.com/deploy/cuda-compatibility"
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # vendor, and class of graphics and 3D controllers, in PCI's numbers


def versions() -> Iterator[Finding]:
    """Whether what is installed is what each package asks for."""
    from packaging.requirements import Requirement  # here, so that a broken library costs only its check

    found: dict[str, str] = {}
    problems = []
    for name in _CHECKED:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed")
            continue
        found[name] = distribution.version
        problems += [
            f"{name} needs {requirement.name}{requirement.specifier}, {installed} is installed"
            for text in distribution.requires or ()
            if (requirement := Requirement(text)).marker is None or requirement.marker.evaluate({"extra": ""})
            if (installed := _installed(requirement)) is not None
        ]
    dalis = sorted(
        {name for one in metadata.distributions() if (name := one.name or "").startswith("nvidia-dali-cuda")}
    )
    if len(dalis) > 1:
        problems.append(f"{' and '.join(dalis)} overwrite each other's files")
    if problems:
        remedy = f"install again in a fresh environment: pip install {_OURS}"
        yield from (warning("versions", problem, remedy) for problem in problems)
        return
    shown = ", ".join(f"{name} {version}" for name, version in found.items())
    yield ok("versions", f"Python {platform.python_version()}, {shown}: fit together")


def _installed(requirement: Any) -> str | None:
    """The installed version if it is not what is required; "none" if there is none."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "none"
    return None if requirement.specifier.contains(version, prereleases=True) else version


def torch(probe: Reply) -> Iterator[Finding]:
    """Whether torch can be imported, and for which CUDA it is built."""
    if probe.value is None:
        yield warning(
            "torch", f"cannot be used: {probe.cause}", "install it again: pip install --force-reinstall torch"
        )
        return
    cuda = probe.value["cuda"]
    built = f"built for CUDA {cuda}" if cuda else "built for the CPU alone"
    yield ok("torch", f"{probe.value['version']}, {built}")


def driver(root: Path, probe: Reply) -> Iterator[Finding]:
    """Whether the driver is new enough for torch and DALI."""
    file = root / "proc/driver/nvidia/version"
    if not file.exists():
        if _has_card(root):
            yield warning(
                "driver",
                "this machine has an NVIDIA GPU, but no driver is loaded (in a container: it was not passed in)",
                "install the driver, or start the container with: docker run --gpus all",
            )
        elif probe.value and probe.value["gpus"]:  # as in WSL, where the driver is Windows'
            yield unknown("driver", "its version is not in /proc/driver/nvidia/version")
        else:
            yield ok("driver", "none, and no NVIDIA GPU: everything runs on the CPU")
        return
    found = re.search(r"Kernel Module\D.*?(\d+(?:\.\d+)+)", file.read_text(encoding="utf-8"))
    if found is None:
        yield unknown("driver", f"its version is not in {file}")
        return
    cuda = probe.value["cuda"] if probe.value else None
    needs = {"DALI": _DALI_DRIVER}
    if cuda and (least := _DRIVERS.get(int(cuda.split(".")[0]))):
        needs[f"torch (CUDA {cuda})"] = least
    installed = tuple(map(int, found[1].split(".")))[:2]
    short = [f"{what} needs {'.'.join(map(str, least))}" for what, least in needs.items() if installed < least]
    if short:
        remedy = f"install a newer driver, or a torch built for an older CUDA: {_DRIVER_PAGE}"
        yield warning("driver", f"{found[1]} is too old: {' and '.join(short)}", remedy)
    else:
        yield ok("driver", f"{found[1]}, new enough for {' and '.join(needs)}")


def gpus(root: Path, probe: Reply) -> Iterator[Finding]:
    """The GPUs that torch can use."""
    if probe.value is None:
        yield unknown("GPUs", "torch cannot be asked")
        return
    found = probe.value["gpus"]
    for index, card in enumerate(found):
        capability = _dotted(card["capability"])
        text = f"{index}: {card['name']}, {gigabytes(card['memory'])}, compute capability {capability}"
        built, name = probe.value["architectures"], "sm_{}{}".format(*card["capability"])
        if built and not _is_supported(card["capability"], built):
            remedy = "install a build of torch for this GPU: https://pytorch.org/get-started/locally"
            yield warning("GPUs", f"{text}: torch is built for {', '.join(built)}, not {name}", remedy)
        else:
            yield ok("GPUs", text)
    if found:
        return
    cause = probe.value["cause"] or "torch sees none"
    if probe.value["cuda"] is None and _has_card(root):
        remedy = "install a build of torch for CUDA: https://pytorch.org/get-started/locally"
        yield warning("GPUs", "torch is built for the CPU alone, and cannot use the GPU of this machine", remedy)
    elif (root / "proc/driver/nvidia/version").exists():
        remedy = "check nvidia-smi and CUDA_VISIBLE_DEVICES; after an update of the driver, restart the machine"
        yield warning("GPUs", f"there is a driver, but no GPU can be used: {cause}", remedy)
    else:
        yield ok(
            "GPUs", "none: decoding and training run on the CPU (--device cpu), which needs nothing of NVIDIA's"
        )


def _is_supported(capability: list[int], architectures: list[str]) -> bool:
    """Whether code for some architectures runs on a GPU: same major version, or compiled when it is loaded."""
    major, minor = capability
    for kind, number in (
        match.groups() for name in architectures if (match := re.match(r"(sm|compute)_(\d+)", name))
    ):
        built = divmod(int(number), 10)
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return False


def dali(probe: Reply) -> Iterator[Finding]:
    """Whether DALI can be imported and decodes an image on the CPU."""
    if probe.value is None:
        remedy = (
            "install it again: pip install --force-reinstall nvidia-dali-cuda120; meanwhile use --backend torch"
        )
        yield warning("DALI", f"cannot be used: {probe.cause}", remedy)
        return
    codec = _dotted(probe.value["nvimagecodec"])
    yield ok("DALI", f"{probe.value['version']} with nvImageCodec {codec}; decodes a JPEG on the CPU")


def gpu_decoding(probe: Reply, gpu: Reply | None) -> Iterator[Finding]:
    """What nvJPEG decodes on the GPU, by which decoder."""
    if probe.value is None:
        yield unknown("GPU decoding", "DALI cannot be asked")
        return
    nvjpeg = probe.value["nvjpeg"]
    what = (
        f"{gpu_decoder()} decodes JPEGs of 8 bits, baseline, progressive and grey; CMYK, arithmetic coding and "
        "all other formats are decoded on the CPU (convert --transcode makes them JPEGs that it decodes)"
    )
    if gpu is None:
        yield ok("GPU decoding", f"not used here, for lack of a GPU; with one {what}")
        return
    if nvjpeg is None:
        yield warning("nvJPEG", "not found: DALI decodes on the CPU", "pip install nvidia-nvjpeg-cu12")
        return
    if gpu.value is None:
        remedy = "check that nvidia-smi works and the driver is new enough; meanwhile use --decode-device cpu"
        yield warning("GPU decoding", f"DALI cannot decode on the GPU: {gpu.cause}", remedy)
        return
    yield ok("GPU decoding", what)
    windows = (
        "fancy"
        if tuple(nvjpeg) >= (13, 2)
        else "plain, since nvJPEG is older than 13.2; whole images are not affected"
    )
    yield ok("nvJPEG", f"{_dotted(nvjpeg)}; chroma upsampling of crop windows (--decode window): {windows}")
    engines, cores = gpu.value["engines"], gpu.value["cores_per_engine"]
    if engines:
        text = f"{engines} with {cores} cores each, for --hw-decoder-load"
    else:
        text = "none on this GPU: its CUDA cores decode, beside the model"
    yield ok("JPEG engines", text)


def nccl(probe: Reply) -> Iterator[Finding]:
    """Whether several GPUs can train together."""
    if probe.value is None:
        yield unknown("NCCL", "torch cannot be asked")
        return
    found, count = probe.value["nccl"], len(probe.value["gpus"])
    if found is not None:
        use = f"for {count} GPUs" if count > 1 else "needed for several GPUs only"
        yield ok("NCCL", f"{_dotted(found)}, {use}")
    elif count > 1:
        yield warning("NCCL", f"this torch has none, which {count} GPUs need", "install a build of torch for CUDA")
    else:
        yield ok("NCCL", "none in this torch; gloo connects ranks on the CPU")


def _has_card(root: Path) -> bool:
    """Whether an NVIDIA GPU is on the PCI bus."""
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == _NVIDIA and kind.startswith(_DISPLAY):
            return True
    return False


def _dotted(numbers: Any) -> str:
    return ".".join(map(str, numbers))
