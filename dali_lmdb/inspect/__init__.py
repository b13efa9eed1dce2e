"""Inspect stores: describe, verify and export them."""

from dali_lmdb.inspect.export import ExportSummary, export
from dali_lmdb.inspect.info import Spread, StoreInfo, info
from dali_lmdb.inspect.records import Progress
from dali_lmdb.inspect.verify import Verification, verify

__all__ = [
    "ExportSummary",
    "Progress",
    "Spread",
    "StoreInfo",
    "Verification",
    "export",
    "info",
    "verify",
]
