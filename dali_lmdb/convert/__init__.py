"""Convert a source of images to a store: read, validate, write, verify, publish."""

from dali_lmdb.convert._converter import convert, convert_split
from dali_lmdb.convert._split import Split
from dali_lmdb.convert.settings import ConvertProgress, ConvertSettings, Summary

__all__ = ["ConvertProgress", "ConvertSettings", "Split", "Summary", "convert", "convert_split"]
