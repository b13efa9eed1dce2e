"""Tells Accelerate when a loader's epoch ends, as its own loaders do: gradients must not accumulate past it."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

__all__ = ["add_loader", "remove_loader"]


def add_loader(loader: Any) -> None:
    """Make a loader the one whose ``end_of_dataloader`` and ``remainder`` Accelerate asks for.

    Does nothing unless the program uses Accelerate, which this package does not need.
    """
    remove_loader(loader)  # it may not be the last one added
    state = sys.modules.get("accelerate.state")
    if state is not None:
        # Not a public interface, but the only one that a loader which is no DataLoader has.
        with suppress(AttributeError):
            state.GradientState()._add_dataloader(loader)


def remove_loader(loader: Any) -> None:
    """Undo ``add_loader``: the loader around this one, if any, is asked again."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        with suppress(AttributeError):
            state.GradientState()._remove_dataloader(loader)
