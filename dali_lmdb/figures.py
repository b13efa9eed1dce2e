"""Figures of matplotlib as files; it is optional, the extra ``plot``."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from dali_lmdb.disk import os_errors
from dali_lmdb.errors import StateError

__all__ = ["GREY", "check_figure", "save_figure"]

GREY = "#808080"
"""Of text and lines, readable on white and on black: figures have no background."""


def check_figure(path: Path) -> None:
    """Find what would stop ``save_figure``, before anything is measured.

    Raises:
        ValueError: matplotlib is missing, the file has an unknown suffix, or its folder does not exist or is not
            writable.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'dali-lmdb[plot]'") from error
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: expected a name that ends in .png or .svg")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist; create it first")
    if path.is_dir():
        raise ValueError(f"{path}: a folder; give a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: its folder is not writable; choose another")


def save_figure(figure: Any, path: Path) -> None:
    """Write a ``matplotlib.figure.Figure``, replacing an older file only once it is complete.

    Raises:
        StateError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    with os_errors(path, "cannot be written", StateError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)  # shown as a box
        partial.unlink(missing_ok=True)  # follows no link
        try:
            figure.savefig(partial, format=path.suffix[1:], dpi=150, transparent=True)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
