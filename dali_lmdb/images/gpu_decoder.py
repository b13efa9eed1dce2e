"""The libraries that decode on a GPU, by name and installed version; DALI is not imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["gpu_decoder"]

_KNOWN = ("0.8.", "0.9.")  # versions of nvImageCodec in which ``Kind.decodes_on_gpu`` was read


def gpu_decoder() -> str:
    """What ``Kind.decodes_on_gpu`` is about: ``nvJPEG 12.4.0.76 (nvImageCodec 0.9.0.20)``."""
    codec, jpeg = _version("nvidia-nvimgcodec-cu12"), _version("nvidia-nvjpeg-cu12")
    known = "" if codec.startswith(_KNOWN) else ", taken for 0.9"
    return f"nvJPEG {jpeg} (nvImageCodec {codec}{known})"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"
