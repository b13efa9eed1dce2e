"""The measurements of a run for TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from dali_lmdb.disk import os_errors
from dali_lmdb.errors import StateError

__all__ = ["Scalars", "has_tensorboard"]


def has_tensorboard() -> bool:
    """Whether TensorBoard, which torch's writer needs, is installed."""
    return importlib.util.find_spec("tensorboard") is not None


class Scalars:
    """TensorBoard's event files in a folder, or nothing.

    Values stand at the number of images trained on, so that a run goes on where it was with another batch size.

    Args:
        folder: None to write nothing.
        images: where the run begins or resumes; what an earlier start wrote of later images is not shown.

    Raises:
        StateError: the files cannot be written.
    """

    def __init__(self, folder: str | None, *, images: int) -> None:
        self._folder, self._writer = folder, None
        if folder is not None:
            # Not installed everywhere, and slow to import.
            from torch.utils.tensorboard import SummaryWriter

            with self._errors():
                self._writer = SummaryWriter(folder, purge_step=images + 1)

    def write(self, values: Mapping[str, float], *, images: int) -> None:
        """Add the values that are there after training on so many images."""
        if self._writer is not None:
            with self._errors():
                for name, value in values.items():
                    self._writer.add_scalar(name, value, images)
                self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            with self._errors():
                self._writer.close()

    def _errors(self) -> Any:
        assert self._folder is not None
        return os_errors(self._folder, "cannot be written", StateError, then="or choose another --tensorboard")
