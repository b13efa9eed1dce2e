"""Versions of the libraries that decode on the GPU; read without a GPU or a driver."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

from nvidia import dali
from nvidia.dali import backend

__all__ = ["has_fancy_windows", "load_nvjpeg", "nvimagecodec_version", "nvjpeg_version"]

# What nvImageCodec's extension for nvJPEG opens, and where: first in LD_LIBRARY_PATH, then in its RUNPATH
# ($ORIGIN/../../nvjpeg/lib), then where the system's linker looks.
_NVJPEG = "libnvjpeg.so.12"


def nvimagecodec_version() -> tuple[int, int, int]:
    """(major, minor, patch) of nvImageCodec, through which DALI decodes."""
    number: int = backend.GetNvimgcodecVersion()  # type: ignore[attr-defined]  # missing from DALI's stubs
    return number // 1000, number // 100 % 10, number % 100


@cache
def nvjpeg_version() -> tuple[int, int, int] | None:
    """(major, minor, patch) of the nvJPEG that nvImageCodec loads; None if it cannot be found.

    Not ``nvidia.dali.backend.GetNvjpegVersion``, which is -1 since DALI decodes through nvImageCodec.
    """
    library = load_nvjpeg()
    if library is None:
        return None
    numbers = [ctypes.c_int() for _ in range(3)]
    for kind, number in enumerate(numbers):  # libraryPropertyType: MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL
        if library.nvjpegGetProperty(kind, ctypes.byref(number)) != 0:
            return None
    major, minor, patch = (number.value for number in numbers)
    return major, minor, patch


def load_nvjpeg() -> ctypes.CDLL | None:
    """The nvJPEG that nvImageCodec loads; None if it cannot be found."""
    wheel = str(Path(dali.__file__).parents[1] / "nvjpeg" / "lib")
    folders = [*filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")), wheel]
    paths = [path for folder in folders if (path := Path(folder, _NVJPEG)).is_file()]
    try:
        return ctypes.CDLL(str(paths[0]) if paths else _NVJPEG)
    except OSError:
        return None


def has_fancy_windows(nvjpeg: tuple[int, ...] | None) -> bool:
    """Whether nvImageCodec decodes windows with fancy upsampling on this version of nvJPEG; None: unknown."""
    return nvjpeg is not None and nvjpeg >= (13, 2)
