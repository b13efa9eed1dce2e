"""Making stores: sources of images, their audit, safe writing."""

from dali_lmdb.convert._converter import convert
from dali_lmdb.convert.settings import ConvertSettings, Progress, Summary

__all__ = ["ConvertSettings", "Progress", "Summary", "convert"]
