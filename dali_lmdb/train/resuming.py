"""What a checkpoint's settings must have in common with those of the run that resumes from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dali_lmdb.errors import StateError
from dali_lmdb.train.settings import TrainSettings

__all__ = ["differences"]

# Without the same values of these, a checkpoint means nothing. The loader's state refuses other data or seeds.
_MUST_AGREE = ("opt", "zero_init_residual")
_NOT_SAID = ("resume", "weights", *_MUST_AGREE)


def differences(saved: Mapping[str, Any], settings: TrainSettings, *, path: Path) -> list[str]:
    """Say which settings are not those of the checkpoint, a line each; those given now rule.

    Raises:
        StateError: a run with these settings cannot go on from the checkpoint.
    """
    now = asdict(settings)
    for name in _MUST_AGREE:
        if name in saved and saved[name] != now[name]:
            option = f"--{name.replace('_', '-')}"
            raise StateError(
                f"{path}: trained with {option} {saved[name]}, not {now[name]}; use the same or another --output"
            )
    return [
        f"{name} {saved[name]} -> {value} (was {saved[name]} in the checkpoint)"
        for name, value in now.items()
        if name in saved and name not in _NOT_SAID and saved[name] != value
    ]
