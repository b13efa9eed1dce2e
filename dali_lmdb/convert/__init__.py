"""Making stores: sources of images, their audit, safe writing."""

from dali_lmdb.convert._converter import convert
from dali_lmdb.convert.settings import ConvertProgress, ConvertSettings, Summary

__all__ = ["ConvertProgress", "ConvertSettings", "Summary", "convert"]
