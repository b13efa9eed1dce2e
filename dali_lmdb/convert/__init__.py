"""Convert a source of images to a store: read, validate, write, verify, publish."""

from dali_lmdb.convert._converter import convert
from dali_lmdb.convert.settings import ConvertProgress, ConvertSettings, Summary

__all__ = ["ConvertProgress", "ConvertSettings", "Summary", "convert"]
