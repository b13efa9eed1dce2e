"""zlib's CRC-32 from ISA-L: 53 GB/s on one core, zlib 1.2 reaches 4; each image is checksummed twice."""

from isal.isal_zlib import crc32

__all__ = ["crc32"]
