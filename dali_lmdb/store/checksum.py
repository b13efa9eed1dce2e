"""CRC-32 as zlib's, from ISA-L: 53 GB/s on a core where zlib 1.2 takes 4, and each image is summed up twice."""

from isal.isal_zlib import crc32

__all__ = ["crc32"]
