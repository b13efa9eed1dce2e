"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "ok", "unknown", "warning"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line about the machine or the store."""

    name: str
    state: Literal["ok", "warning", "unknown"]
    """``"unknown"``: the machine does not say."""
    text: str
    remedy: str | None = None
    """What to do about a warning."""


def ok(name: str, text: str) -> Finding:
    """A finding that needs no attention."""
    return Finding(name=name, state="ok", text=text)


def warning(name: str, text: str, remedy: str) -> Finding:
    """A finding that makes training slow or fail."""
    return Finding(name=name, state="warning", text=text, remedy=remedy)


def unknown(name: str, text: str) -> Finding:
    """What could not be found out."""
    return Finding(name=name, state="unknown", text=text)
