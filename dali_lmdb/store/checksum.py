"""CRC-32, the same as zlib's but computed by ISA-L.

It reaches 53 GB/s on one core and zlib 1.2 only 4, and converting computes it twice for each image.
"""

from isal.isal_zlib import crc32

__all__ = ["crc32"]
