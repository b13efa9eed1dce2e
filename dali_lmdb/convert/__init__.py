"""Making stores: sources of images, their audit, safe writing."""

from dali_lmdb.convert.converter import ConvertSettings, Progress, Summary, convert

__all__ = ["ConvertSettings", "Progress", "Summary", "convert"]
