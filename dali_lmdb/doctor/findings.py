"""What a check has found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from dali_lmdb.errors import one_line

__all__ = ["Check", "Finding", "found", "ok", "unknown", "warning"]


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


Check = Callable[[], Iterable[Finding]]


def found(name: str, check: Check) -> list[Finding]:
    """What a check finds; why it fails, if it does."""
    try:
        return list(check())
    except Exception as error:
        return [unknown(name, one_line(f"cannot be found out: {error or type(error).__name__}"))]
