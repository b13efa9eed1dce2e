"""Kinds of image file, and which decoders support them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["DecoderCounts", "Kind"]


class Kind(enum.IntEnum):
    """Kind of image file, as far as it matters to decoders; the index column ``kind``."""

    UNKNOWN = 0
    """Not inspected, or no known decoder."""
    JPEG_BASELINE = 1
    JPEG_EXTENDED = 2
    """Sequential, 8 bit, Huffman, but not baseline (SOF1)."""
    JPEG_PROGRESSIVE = 3
    JPEG_GRAYSCALE = 4
    """One component, baseline or extended."""
    JPEG_CMYK = 5
    """Four components: no GPU decoder takes them, whatever their encoding."""
    JPEG_CPU_ONLY = 6
    """Arithmetic coding, 12 bit, lossless or two components: no GPU decoder takes it."""
    PNG = 7
    WEBP = 8
    BMP = 9
    TIFF = 10
    GIF = 11
    PNM = 12
    OTHER = 13
    """None of the above, but Pillow can open it."""

    @property
    def is_jpeg(self) -> bool:
        """True for a JPEG of any kind."""
        return Kind.JPEG_BASELINE <= self <= Kind.JPEG_CPU_ONLY

    @property
    def decodes_on_cpu(self) -> bool:
        """True if it needs a decoder on the CPU: one of DALI's, or Pillow."""
        return self >= Kind.JPEG_CMYK

    @property
    def decodes_on_gpu(self) -> bool:
        """True if nvJPEG decodes it, in hardware or with CUDA, where DALI decodes on the GPU.

        So says ``canDecode`` of both decoders in nvImageCodec 0.8 (``extensions/nvjpeg``), which DALI 2.4 asks.
        Chroma subsampling other than 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1 and 4:1:0 needs the CPU too, but is not
        part of a kind.
        """
        return Kind.JPEG_BASELINE <= self <= Kind.JPEG_GRAYSCALE


@dataclass(frozen=True)
class DecoderCounts:
    """Number of records by what decodes them where DALI decodes on the GPU (``decode_device="gpu"``)."""

    gpu: int
    """Decoded by nvJPEG."""
    cpu: int
    """Decoded by DALI's fallback on the CPU, or by Pillow instead."""
    none: int
    """No known decoder, or not inspected."""

    @classmethod
    def of(cls, kinds: npt.NDArray[np.uint8]) -> DecoderCounts:
        """Count the kinds in the index column ``kind``, uint8 of shape (n,)."""
        gpu = int(np.isin(kinds, [kind for kind in Kind if kind.decodes_on_gpu]).sum())
        cpu = int(np.isin(kinds, [kind for kind in Kind if kind.decodes_on_cpu]).sum())
        return cls(gpu, cpu, len(kinds) - gpu - cpu)
