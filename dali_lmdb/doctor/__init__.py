"""Examine a machine, and a store on it, for what would make training slow or fail."""

from dali_lmdb.doctor.examination import examine
from dali_lmdb.doctor.findings import Finding

__all__ = ["Finding", "examine"]
